"""What is there already when a push comes: nothing of it is lost, done twice or left half done."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import pytest

from charseq2seq.errors import ExitCode
from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.preflight import check_ref
from tests.hub.server import STRANGER, HubServer
from tests.push_client import ALL_FILES, REPO, Publisher, tiny_checkpoint, titles


def card_of(hub: HubServer, repo_id: str = REPO) -> str:
    """The published README.md."""
    return hub.repo(repo_id).files()["README.md"].decode()


def test_a_name_in_other_capitals_is_the_same_repository(alice: Publisher, hub: HubServer) -> None:
    hub.add_repo("alice/Shakespeare-Transformer")
    done = alice.push("--no_verify", "--json")
    assert done.code == 0 and done.json["repo_id"] == "alice/Shakespeare-Transformer" and len(hub.repos) == 1
    card = card_of(hub, "alice/Shakespeare-Transformer")
    assert REPO not in card and "# Shakespeare-Transformer\n" in card


def test_what_a_person_wrote_into_the_card_is_kept_or_told_of(alice: Publisher, hub: HubServer) -> None:
    assert alice.push("--no_verify").code == 0
    edited = card_of(hub).replace("language: en\n", "language: no # bokmål\n")
    commit = hub.repo(REPO).push({"README.md": edited.replace("## What it writes", "## My texts").encode()})
    alice.save(tiny_checkpoint(1.4))
    done = alice.push("--no_verify")
    assert done.code == 0 and "language: no # bokmål\n" in card_of(hub) and "## My texts" not in card_of(hub)
    assert "note: README.md on the Hub: somebody edited the part between the marks" in done.log
    assert f"Commit {commit.id[:8]} keeps what was there" in done.log
    assert "up to date" in alice.push("--no_verify").log


def test_a_published_card_that_cannot_be_kept_is_refused_before_anything_slow(alice: Publisher, hub: HubServer) -> None:
    for card, said in (
        ("# für Elise\n".encode("latin-1"), "byte 3 is not UTF-8"),
        ("# UTF-16\n".encode("utf-16"), "byte 0 is not UTF-8"),
        (b"---\nlanguage: false\n---\n", '"language" must be a string'),
        (b"---\ntags: [a]\nmodel-index:\n- name: another\n  results: [1]\n---\n", "Invalid YAML"),
    ):
        hub.add_repo(REPO, {"README.md": card})
        done = alice.push("--json")
        assert done.code == ExitCode.BAD_DATA and done.json["error"] == "card" and said in done.json["cause"], done.log
        assert "folder: built" not in done.log and hub.repo(REPO).files()["README.md"] == card
    hub.add_repo(REPO, {"README.md": b"---\nmodel-index:\n- name: shakespeare-transformer\n  results: [1]\n---\n"})
    assert alice.push("--check").code == 0, "results of this model are made anew"


NOT_IN_GIT = ["v1 beta", "a..b", "v1~", "a:b", "-v1", ".v1", "a/.b", "v1.", "v1.lock", "a//b", "a@{b", "", "x\\y"]
NOT_IN_GIT += ["a\nb", "*", "a/", "HEAD"]
NO_BRANCHES = ["@", "refs/pr/1", "refs/heads/main", "0123456789" * 4]


@pytest.mark.parametrize("name", [*NOT_IN_GIT, *NO_BRANCHES])
def test_a_branch_or_tag_that_cannot_be_made_has_no_name(name: str) -> None:
    with pytest.raises(PublishError, match="impossible name of a branch or tag") as refusal:
        check_ref("--tag", name)
    assert refusal.value.exit_code == ExitCode.USAGE and f"--tag {name!r}" in str(refusal.value)
    if name in NOT_IN_GIT:  # git itself says so
        assert subprocess.run(["git", "check-ref-format", "--branch", name], check=False).returncode != 0


def test_a_reference_that_cannot_be_pushed_to_is_refused_by_a_check(alice: Publisher, hub: HubServer) -> None:
    hub.add_repo(REPO)
    for revision, said in (("refs/pr/1", "--create_pr"), ("main/one", "where there is a branch main")):
        done = alice.push("--check", "--revision", revision)
        assert done.code == ExitCode.USAGE and said in done.log, done.log


def test_a_tag_that_cannot_be_made_after_the_commit_is_told_and_made_later(alice: Publisher, hub: HubServer) -> None:
    hub.fail("POST", "/tag/", status=403, times=1)
    done = alice.push("--no_verify", "--tag", "v1")
    assert done.code == ExitCode.UNCONFIRMED and "sent, but not confirmed" in done.log
    assert "verified: the 12 files" in done.log and len(titles(hub)) == 1 and not hub.repo(REPO).tags
    assert alice.push("--no_verify", "--tag", "v1").code == 0
    assert hub.repo(REPO).tags == {"v1": hub.repo(REPO).head} and len(titles(hub)) == 1


def test_reads_that_lag_behind_are_waited_for(alice: Publisher, hub: HubServer) -> None:
    def hide(path: str, code: str) -> Callable[[], object]:
        return lambda: hub.fail("GET", path, status=404, code=code, times=1)

    hub.fail("POST", "/repos/create", call=hide(f"/api/models/{REPO}$", "RepoNotFound"), times=1)
    hub.fail("POST", "/commit/", call=hide("/tree/", "RevisionNotFound"), times=1)
    done = alice.push("--no_verify")
    assert done.code == 0 and "verified: the repository is public" in done.log, done.log
    assert done.log.count("looking again") == 2


def test_a_message_of_several_lines_has_a_title_and_a_description(alice: Publisher, hub: HubServer) -> None:
    assert alice.push("--no_verify", "--commit_message", "\nBetter\n\nBy a tenth.\nOr so.\n").code == 0
    header = json.loads(hub.calls("POST", "/commit/")[0].body.splitlines()[0])["value"]
    assert titles(hub) == ["Better"] and header["description"] == "By a tenth.\nOr so."


Propose = Callable[[float], tuple[str, str]]


@pytest.fixture
def propose(hub: HubServer, alice: Publisher) -> Propose:
    """Lets a stranger propose a model of this loss to alice's repository; how that ended, and where."""
    hub.add_repo("alice/m", {"README.md": b"# Mine\n"})

    def run(loss: float) -> tuple[str, str]:
        alice.save(tiny_checkpoint(loss))
        where = ["--create_pr", "--username", "alice", "--repo_name", "m"]
        done = alice.push(*where, "--no_verify", "--json", token=STRANGER)
        assert done.code == 0, done.log
        return done.json["state"], done.json["url"].partition("/alice/m")[2]

    return run


@pytest.mark.slow
def test_an_open_pull_request_is_left_or_updated(hub: HubServer, propose: Propose) -> None:
    assert propose(1.5) == ("proposed", "/discussions/1")
    assert propose(1.5) == ("up to date", "/discussions/1")
    assert propose(1.4) == ("proposed", "/discussions/1")
    repository = hub.repo("alice/m")
    files = repository.files("refs/pr/1")
    assert set(files) > ALL_FILES and b"1.4000 nats" in files["README.md"] and b"# Mine" in files["README.md"]
    repository.proposals["1"] = (*repository.proposals["1"][:2], "merged")
    repository.refs["refs/heads/main"] = repository.refs["refs/pr/1"]
    assert propose(1.4) == ("up to date", "")
    assert propose(1.3) == ("proposed", "/discussions/2"), "the first is closed"
    assert list(repository.proposals) == ["1", "2"]


@pytest.mark.slow
def test_a_pull_request_of_another_kind_is_left_alone(hub: HubServer, propose: Propose) -> None:
    repository = hub.repo("alice/m")
    repository.refs["refs/pr/1"] = repository.head
    repository.proposals["1"] = ("mallory", "Correct a word", "open")
    assert propose(1.5) == ("proposed", "/discussions/2")
    hub.fail("GET", "/discussions", status=403, times=2)
    assert propose(1.4) == ("proposed", "/discussions/3"), "as far as can be seen"
    assert set(repository.files("refs/pr/1")) == {".gitattributes", "README.md"}


def test_a_lost_answer_to_a_proposal_is_found_again(hub: HubServer, propose: Propose) -> None:
    hub.fail("POST", "/commit/", drop="after", times=1)
    assert propose(1.5) == ("proposed", "/discussions/1")
    assert list(hub.repo("alice/m").proposals) == ["1"]
