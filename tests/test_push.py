"""The command line against a Hub on loopback: what is there afterwards, and nothing of what was there is lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode
from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.preflight import check_ref
from tests.hub.server import STRANGER, WHOLE_ORG, WRITE, HubServer
from tests.push_client import ALL_FILES, NAME, REPO, Publisher, tiny_checkpoint, titles


def head_files(hub: HubServer, repo_id: str = REPO) -> set[str]:
    """The files at the head of main, except the Hub's own."""
    return set(hub.repo(repo_id).files()) - {".gitattributes"}


def card_of(hub: HubServer, repo_id: str = REPO) -> str:
    """The published README.md."""
    return hub.repo(repo_id).files()["README.md"].decode()


def test_check_tells_what_would_happen_and_changes_nothing(alice: Publisher, hub: HubServer) -> None:
    done = alice.push("--check")
    assert done.code == 0
    assert "token: from HF_TOKEN\n" in done.log and "repository: new, to be made public" in done.log
    assert "account: alice, token role write; namespace alice: their own" in done.log
    hub.add_repo(REPO, private=True)
    assert "repository: exists, private, may be pushed to" in alice.push("--check").log
    assert "namespace acme: role write" in alice.push("--check", "--username", "acme").log
    narrow = alice.push("--check", "--username", "acme", token=WHOLE_ORG)
    assert narrow.code == 0 and "alice, token role fineGrained for acme; namespace acme" in narrow.log
    hub.add_repo("alice/m")
    proposal = ["--check", "--create_pr", "--username", "alice", "--repo_name", "m"]
    assert "exists, public, a pull request may be made" in alice.push(*proposal, token=STRANGER).log
    assert hub.repos == [REPO, "alice/m"] and titles(hub) == [] and not hub.calls("POST", "/commit/|/repos/create")


def test_a_token_comes_from_a_file_or_the_stored_login(alice: Publisher, hub: HubServer) -> None:
    path = alice.home / "token.txt"
    path.touch(0o640)
    path.write_text(f"{WRITE}\n")
    done = alice.push("--check", "--token_file", str(path), token=None)
    assert done.code == 0 and "chmod 600" in done.log and WRITE not in done.log
    stored = alice.home / "huggingface" / "token"
    stored.parent.mkdir(exist_ok=True)
    stored.write_text(WRITE)
    done = alice.push("--check", token=None)
    assert done.code == 0 and "token: from the stored login" in done.log
    path.write_text("two words")
    assert alice.push("--check", "--token_file", str(path), token=None).code == 2
    assert alice.push("--check", "--token_file", "absent", token=None).code == 66


def test_a_dry_run_prints_the_plan_and_sends_nothing(alice: Publisher, hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, {"config.json": (folder / "config.json").read_bytes(), "README.md": b"# Hello\n"})
    hub.repo(REPO).push({"training_args.json": (folder / "training_args.json").read_bytes().replace(b"1.5", b"1.6")})
    done = alice.push("--dry_run", "--output_dir", "out")
    states = {line.split()[-1]: line.split()[0] for line in done.out.splitlines()}
    assert done.code == 0, done.log
    assert states["config.json"] == "same" and states["pytorch_model.bin"] == "new"
    assert states["README.md"] == states["training_args.json"] == "changed"
    assert {path.name for path in (alice.home / "out").iterdir()} == ALL_FILES == set(states)
    assert not hub.calls("POST", "/commit/|/repos/create") and len(titles(hub)) == 2


def test_a_dry_run_needs_neither_token_nor_network(alice: Publisher, hub: HubServer) -> None:
    done = alice.push("--dry_run", "--output_dir", "out", token=None, HF_USERNAME="alice")
    assert done.code == 0 and "what the Hub already has is not known" in done.log
    assert f'"{REPO}"' in (alice.home / "out" / "README.md").read_text()
    assert alice.push("--dry_run", "--tag", "v1 beta", token=None, HF_USERNAME="alice").code == 2
    assert not hub.requests


def test_private_repositories_are_made_and_stay_private(alice: Publisher, hub: HubServer) -> None:
    done = alice.push("--private")
    assert done.code == 0 and hub.repo(REPO).private and "verified: a fresh download" in done.log, done.log
    assert "verified: the repository is private" in done.log and not hub.calls("PUT", "/settings")
    hub.fail("POST", "/commit/", call=lambda: setattr(hub.repo(REPO), "private", False), times=1)
    alice.save(tiny_checkpoint(1.3))
    done = alice.push("--no_verify")
    assert done.code == 78 and "❌ Push failed: the repository is public" in done.log, "it is looked at afterwards"


def test_an_organisation_is_pushed_to_by_its_member(alice: Publisher, hub: HubServer) -> None:
    done = alice.push("--username", "acme", "--no_verify", "--json", token=WHOLE_ORG)
    assert done.code == 0, done.log
    assert '"acme/shakespeare-transformer"' in card_of(hub, f"acme/{NAME}")
    expected = {"ok": True, "state": "pushed", "exit_code": 0, "url": f"{hub.endpoint}/acme/{NAME}"}
    assert done.json.items() >= {**expected, "commit": hub.repo(f"acme/{NAME}").head}.items()
    assert done.json["files"]["config.json"] == "new"


def test_what_people_wrote_stays_and_what_we_no_longer_make_goes(alice: Publisher, hub: HubServer) -> None:
    assert alice.push("--no_verify").code == 0
    edited = card_of(hub).replace("license: apache-2.0", "license: cc0-1.0") + "\nWith thanks to my cat.\n"
    hub.repo(REPO).push({"README.md": edited.encode(), "notes.txt": b"mine", "training_curve.png.txt": b"mine"})
    alice.save(tiny_checkpoint(1.4, history=[]))
    done = alice.push("--no_verify", "--commit_message", "better", "--json")
    assert done.code == 0, done.log
    assert done.json["files"]["training_curve.png"] == "removed" and done.json["files"]["config.json"] == "same"
    assert head_files(hub) == ALL_FILES - {"training_curve.png"} | {"notes.txt", "training_curve.png.txt"}
    card = card_of(hub)
    assert "license: cc0-1.0" in card and card.endswith("\nWith thanks to my cat.\n") and "1.4000 nats" in card
    assert titles(hub)[-1] == "better" and len(titles(hub)) == 3


def test_what_others_made_is_pushed_over_only_when_told(alice: Publisher, hub: HubServer) -> None:
    hub.add_repo(REPO, {"config.json": b"{}", "data.csv": b"1,2"})
    refused = alice.push("--no_verify")
    assert refused.code == 78 and "❌ Repository already exists" in refused.log and len(titles(hub)) == 1
    assert alice.push("--no_verify", "--overwrite").code == 0
    assert head_files(hub) == ALL_FILES | {"data.csv"}
    assert "up to date" in alice.push("--no_verify").log, "from now on it is ours"


def test_branches_and_tags(alice: Publisher, hub: HubServer) -> None:
    push = ["--no_verify"]
    assert alice.push(*push, "--revision", "trial/one", "--tag", "v1").code == 0
    repository = hub.repo(REPO)
    assert head_files(hub) == set() and set(repository.files("trial/one")) > ALL_FILES
    assert repository.tags == {"v1": repository.branches["trial/one"]}
    again = alice.push(*push, "--revision", "trial/one", "--tag", "v1")
    assert again.code == 0 and "up to date" in again.log
    done = alice.push(*push, "--tag", "v1")
    assert done.code == 78 and "❌ Push failed: the tag exists" in done.log and head_files(hub) == set()
    assert alice.push("--dry_run", "--tag", "v1").code == 78, "a dry run refuses what a push would"
    assert alice.push(*push, "--revision", "v1").code == 66
    assert alice.push(*push).code == alice.push(*push, "--revision", "copy").code == 0
    assert repository.branches["copy"] == repository.head != repository.branches["trial/one"]


def test_a_repository_made_on_the_website_is_no_conflict(alice: Publisher, hub: HubServer) -> None:
    for made in ({}, {"LICENSE": b"free"}, {"README.md": b"# Mine\n", "LICENSE": b"free"}):
        hub.add_repo(REPO, made)
        assert alice.push("--check").code == 0
    assert alice.push("--no_verify").code == 0
    files = hub.repo(REPO).files()
    assert set(files) >= ALL_FILES and files["LICENSE"] == b"free" and b"# Mine\n" in files["README.md"]


def test_only_a_better_model_is_pushed(alice: Publisher, hub: HubServer) -> None:
    push = ["--no_verify", "--only_if_better"]
    done = alice.push(*push)
    assert done.code == 0 and "pushed" in done.log, "nothing is published, so it is better"
    for loss, said in ((1.45, "the published loss is 1.5000, this one 1.4500"), (1.3, "pushed:")):
        alice.save(tiny_checkpoint(loss))
        done = alice.push(*push, "0.1")
        assert done.code == 0 and said in done.log, done.log
    assert [title[:3] for title in titles(hub)] == ["1.5", "1.3"]
    for loss, another in ((1.1, {"protocol": "another one"}), (1.0, {"characters": 999})):
        alice.save(tiny_checkpoint(loss, **another))
        done = alice.push(*push)
        assert done.code == 78 and "❌ Push failed: the models cannot be compared" in done.log
        assert f"different or not stated: {next(iter(another))}" in done.log, done.log
    assert "leave out --only_if_better" in done.log and len(titles(hub)) == 2


def test_files_beside_those_of_the_folder_stay_at_home(alice: Publisher, hub: HubServer, folder: Path) -> None:
    shutil.copytree(folder, alice.home / "mine")
    (alice.home / "mine" / "diary.txt").write_text("private")
    assert alice.push("--output_dir", "mine", "--no_verify").code == 0
    assert head_files(hub) == ALL_FILES
    assert json.loads(hub.repo(REPO).files()["training_args.json"])["made_by"] == "charseq2seq"


# --- repositories that people have changed, names, pull requests


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


@pytest.mark.slow
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
