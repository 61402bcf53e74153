"""The command line against a Hub on loopback: what is there afterwards, and what a stranger can do with it."""

from __future__ import annotations

import itertools
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from charseq2seq.publishing.repository_folder import build_folder
from tests.hub_client import LFS_ONLY, ONE_REPO, STRANGER, WHOLE_ORG, WRITE, hub_with_people
from tests.hub_server import HubServer, fake_token
from tests.push_client import ALL_FILES, ROOT, Publisher, tiny_checkpoint

NAME = "shakespeare-transformer"
REPO = f"alice/{NAME}"

# From the guide, letter for letter; so the Hub has a user "username" with a repository "repo-name".
GUIDE_SNIPPET = """
from huggingface_hub import hf_hub_download
model_path = hf_hub_download("username/repo-name", "pytorch_model.bin")
config_path = hf_hub_download("username/repo-name", "config.json")
vocab_path = hf_hub_download("username/repo-name", "vocab.json")

import torch
import json
from encoder_decoder_transformer import Transformer

with open(config_path) as f:
    config = json.load(f)
with open(vocab_path) as f:
    vocab = json.load(f)

model = Transformer(**config)
checkpoint = torch.load(model_path, map_location="cpu")
model.load_state_dict(checkpoint["model_state_dict"])
model.eval()
"""
INFERENCE = """
written = model.generate(torch.tensor([[vocab["R"]]]), 40, temperature=0)
token_of = {index: token for token, index in vocab.items()}
print("".join(token_of[index] for index in written[0].tolist()))
"""


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with people and with Xet."""
    with hub_with_people() as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository folder of a tiny checkpoint, for --from_dir, which saves building it."""
    folder = tmp_path_factory.mktemp("built") / "folder"
    build_folder(tiny_checkpoint(), folder, REPO)
    return folder


@pytest.fixture
def alice(hub: HubServer, tmp_path: Path) -> Publisher:
    """Alice with a checkpoint."""
    return Publisher(hub, tmp_path / "alice")


def built(where: Path, loss: float, **metrics: Any) -> str:
    """Another repository folder, of a model with this loss."""
    build_folder(tiny_checkpoint(loss, **metrics), where / f"loss {loss}", REPO)
    return str(where / f"loss {loss}")


def head_files(hub: HubServer, repo_id: str = REPO) -> set[str]:
    """The files at the head of main, but for the Hub's own."""
    return set(hub.repo(repo_id).files()) - {".gitattributes"}


def titles(hub: HubServer, repo_id: str = REPO) -> list[str]:
    """The commits of main, oldest first, but for the Hub's own."""
    return [commit.title for commit in hub.repo(repo_id).commits][::-1][1:]


def test_help_and_wrong_arguments_import_neither_torch_nor_the_hubs_client() -> None:
    script = """
import sys
import push_to_huggingface
for argv in (["--help"], ["--bogus"], ["--deadline", "-1"], ["--create_pr", "--tag", "v1"]):
    try:
        push_to_huggingface.main(argv)
    except SystemExit as end:
        print(end.code, sorted({"torch", "huggingface_hub", "numpy", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-4:] == ["0 []", "2 []", "2 []", "2 []"]


def test_the_guides_second_way_ends_with_a_repository_that_the_guides_snippet_loads(
    hub: HubServer, tmp_path: Path
) -> None:
    token = fake_token("username")
    hub.add_user("username", tokens={token: "write"})
    user = Publisher(hub, tmp_path / "user")
    done = user.push("--repo_name", "repo-name", "--username", "username", "--token", token, token=None)
    assert done.code == 0, done.log
    assert done.out == f"{hub.endpoint}/username/repo-name\n"
    assert "verified: a fresh download writes text" in done.log
    assert token not in done.log and "can be seen by everybody" in done.log
    assert head_files(hub, "username/repo-name") == ALL_FILES
    assert titles(hub, "username/repo-name") == ["1.5000 nats per character, step 90 (charseq2seq 0.1.0)"]
    assert not hub.repo("username/repo-name").private
    files = hub.repo("username/repo-name").files()
    assert not any(token.encode() in content for content in files.values())
    assert {one.token for one in hub.requests if one.listener == "storage"} == {None}

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "encoder_decoder_transformer.py").write_bytes(files["encoder_decoder_transformer.py"])
    (stranger / "snippet.py").write_text(GUIDE_SNIPPET + INFERENCE)
    of_the_card = re.findall(r"^(?:hf|python) .*", files["README.md"].decode(), re.MULTILINE)[:2]
    assert [command.split()[0] for command in of_the_card] == ["hf", "python"]
    for command in ["python snippet.py", *of_the_card]:
        program, *arguments = shlex.split(command)
        run = subprocess.run(
            [str(Path(sys.executable).with_name(program)), *arguments],
            cwd=stranger,
            env=hub.environment(stranger),
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert len(run.stdout) > 30


def test_the_same_checkpoint_pushed_twenty_times_makes_one_commit(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    user = Publisher(hub, tmp_path / "user")
    first = user.push("--no_verify", "--json")
    assert first.json["state"] == "pushed"
    with ThreadPoolExecutor(2) as pool:
        again = list(pool.map(lambda _: user.push("--from_dir", str(folder), "--json"), range(18)))
    again.append(user.push("--json"))
    assert [one.code for one in again] == [0] * 19
    assert {one.json["state"] for one in again} == {"up to date"}
    assert {one.json["commit"] for one in again} == {first.json["commit"]}
    assert len(titles(hub)) == 1 and len(hub.calls("POST", "/commit/")) == 1


def test_check_tells_what_would_happen_and_changes_nothing(alice: Publisher, hub: HubServer) -> None:
    done = alice.push("--check")
    assert done.code == 0
    assert "token: from HF_TOKEN; of alice, role write" in done.log and "to be made public" in done.log
    hub.add_repo(REPO, private=True)
    assert "exists, private, can be pushed to" in alice.push("--check").log
    assert "organisation" not in alice.push("--check", "--username", "acme").log
    assert hub.repos == [REPO] and titles(hub) == []


def test_a_token_comes_from_a_file_or_the_stored_login(alice: Publisher, hub: HubServer) -> None:
    path = alice.home / "token.txt"
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
    assert not hub.calls("POST", "/commit/|/repos/create|validate") and len(titles(hub)) == 2
    example = subprocess.run(
        [sys.executable, "usage_example.py", "--prompt", "R", "--num_chars", "9"],
        cwd=alice.home / "out",
        env=hub.environment(alice.home),
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(example.stdout) == 11


def test_a_dry_run_needs_neither_token_nor_network(alice: Publisher, hub: HubServer) -> None:
    done = alice.push("--dry_run", "--output_dir", "out", token=None, HF_USERNAME="alice")
    assert done.code == 0 and "what the Hub already has is not known" in done.log
    assert f'"{REPO}"' in (alice.home / "out" / "README.md").read_text()
    assert not hub.requests


def test_private_repositories_are_made_and_stay_private(alice: Publisher, hub: HubServer, folder: Path) -> None:
    assert alice.push("--private", "--no_verify", "--from_dir", str(folder)).code == 0
    assert hub.repo(REPO).private
    done = alice.push("--from_dir", built(alice.home, 1.4))
    assert done.code == 0 and hub.repo(REPO).private and "verified: a fresh download" in done.log, done.log
    assert not hub.calls("PUT", "/settings")


def test_an_organisation_is_pushed_to_by_its_member(alice: Publisher, hub: HubServer, folder: Path) -> None:
    done = alice.push("--username", "acme", "--from_dir", str(folder), "--no_verify", token=WHOLE_ORG)
    assert done.code == 0, done.log
    assert b'"acme/shakespeare-transformer"' in hub.repo(f"acme/{NAME}").files()["README.md"]
    hub.add_repo("alice/m")
    done = alice.push("--repo_name", "m", "--from_dir", str(folder), "--no_verify", token=ONE_REPO)
    assert done.code == 0, done.log
    assert head_files(hub, "alice/m") == ALL_FILES


def test_what_people_wrote_stays_and_what_we_no_longer_make_goes(
    alice: Publisher, hub: HubServer, folder: Path
) -> None:
    assert alice.push("--no_verify", "--from_dir", str(folder)).code == 0
    card = hub.repo(REPO).files()["README.md"].decode()
    edited = card.replace("license: apache-2.0", "license: cc0-1.0") + "\nWith thanks to my cat.\n"
    hub.repo(REPO).push({"README.md": edited.encode(), "notes.txt": b"mine", "training_curve.png.txt": b"mine"})
    alice.save(tiny_checkpoint(1.4, history=[]))
    done = alice.push("--no_verify", "--commit_message", "better", "--json")
    assert done.code == 0, done.log
    assert done.json["files"]["training_curve.png"] == "removed" and done.json["files"]["config.json"] == "same"
    assert head_files(hub) == ALL_FILES - {"training_curve.png"} | {"notes.txt", "training_curve.png.txt"}
    card = hub.repo(REPO).files()["README.md"].decode()
    assert "license: cc0-1.0" in card and card.endswith("\nWith thanks to my cat.\n") and "1.4000 nats" in card
    assert titles(hub)[-1] == "better" and len(titles(hub)) == 3


def test_what_others_made_is_pushed_over_only_when_told(alice: Publisher, hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO, {"config.json": b"{}", "data.csv": b"1,2"})
    push = ["--from_dir", str(folder), "--no_verify"]
    refused = alice.push(*push)
    assert refused.code == 78 and "❌ Repository already exists" in refused.log and len(titles(hub)) == 1
    assert alice.push(*push, "--overwrite").code == 0
    assert head_files(hub) == ALL_FILES | {"data.csv"}
    assert "up to date" in alice.push(*push).log, "from now on it is ours"


def test_branches_tags_and_pull_requests(alice: Publisher, hub: HubServer, folder: Path) -> None:
    push = ["--no_verify", "--from_dir", str(folder)]
    assert alice.push(*push, "--revision", "trial/one", "--tag", "v1").code == 0
    repository = hub.repo(REPO)
    assert head_files(hub) == set() and set(repository.files("trial/one")) > ALL_FILES
    assert repository.tags == {"v1": repository.branches["trial/one"]}
    again = alice.push(*push, "--revision", "trial/one", "--tag", "v1")
    assert again.code == 0 and "up to date" in again.log
    done = alice.push(*push, "--tag", "v1")
    assert done.code == 78 and "❌ Push failed: the tag exists" in done.log and head_files(hub) == set()
    assert alice.push(*push, "--revision", "v1").code == 66
    assert alice.push(*push).code == alice.push(*push, "--revision", "copy").code == 0
    assert repository.branches["copy"] == repository.head != repository.branches["trial/one"]
    hub.add_repo("alice/m", {"README.md": b"# Mine\n"})
    proposal = [*push, "--create_pr", "--repo_name", "m", "--username", "alice"]
    done = alice.push(*proposal, token=STRANGER)
    repository = hub.repo("alice/m")
    assert done.code == 0 and done.out == f"{hub.endpoint}/alice/m/discussions/1\n", done.log
    assert set(repository.files("refs/pr/1")) > ALL_FILES and head_files(hub, "alice/m") == {"README.md"}


def test_only_a_better_model_is_pushed(alice: Publisher, hub: HubServer, folder: Path) -> None:
    push = ["--no_verify", "--only_if_better"]
    done = alice.push("--from_dir", str(folder), *push)
    assert done.code == 0 and "pushed" in done.log, "nothing is published, so it is better"
    for loss, said in ((1.45, "the published loss is 1.5, this one 1.45"), (1.3, "pushed:")):
        done = alice.push("--from_dir", built(alice.home, loss), *push, "0.1")
        assert done.code == 0 and said in done.log, done.log
    assert [title[:3] for title in titles(hub)] == ["1.5", "1.3"]
    done = alice.push("--from_dir", built(alice.home, 1.0, protocol="another one"), *push)
    assert done.code == 78 and "❌ Push failed: the models cannot be compared" in done.log
    assert "leave out --only_if_better" in done.log and len(titles(hub)) == 2


def test_a_failed_push_leaves_a_folder_that_is_pushed_later(alice: Publisher, hub: HubServer, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", status=413)
    failed = alice.push("--no_verify", TMPDIR=str(tmp_path))
    assert failed.code == 79
    kept = failed.log.partition("--from_dir ")[2].split()[0]
    assert {path.name for path in Path(kept).iterdir()} == ALL_FILES
    hub.mend()
    (alice.home / "transformer_model.pth").unlink()
    assert alice.push("--from_dir", kept, "--no_verify", "--repo_name", "m2", TMPDIR=str(tmp_path)).code == 0
    assert head_files(hub, "alice/m2") == ALL_FILES
    card = hub.repo("alice/m2").files()["README.md"].decode()
    assert '"alice/m2"' in card and REPO not in card
    Publisher(hub, tmp_path / "tidy").push("--no_verify", TMPDIR=str(tmp_path / "tidy"))
    assert not list((tmp_path / "tidy").glob(f"{NAME}-*")), "after a push nothing is left behind"


def test_a_lost_answer_is_not_committed_twice(alice: Publisher, hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "/commit/", drop="after", times=1)
    done = alice.push("--from_dir", str(folder), "--no_verify", "--json")
    assert done.code == 0 and done.json["state"] == "pushed", done.log
    assert done.json["commit"] == hub.repo(REPO).head and len(titles(hub)) == 1
    hub.fail("POST", "/commit/", status=504, body=b"<html>", drop="after", times=1)
    assert alice.push("--no_verify", "--from_dir", built(alice.home, 1.4)).code == 0
    assert len(titles(hub)) == 2 and len(hub.calls("POST", "/commit/")) == 2


def test_a_lost_proposal_is_not_proposed_twice(alice: Publisher, hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO)
    hub.fail("POST", "/commit/", drop="after", times=1)
    done = alice.push("--from_dir", str(folder), "--create_pr")
    assert done.code == 76 and "sent, but not confirmed" in done.log
    assert list(hub.repo(REPO).pull_requests) == ["1"]


def test_a_commit_in_between_is_followed_and_not_lost(alice: Publisher, hub: HubServer, folder: Path) -> None:
    repository = hub.add_repo(REPO, {"README.md": b"# Mine\n"})
    words = {"README.md": b"# Mine, and newer\n", "LICENSE": b"free"}
    hub.fail("POST", "/commit/", call=lambda: repository.push(words), times=1)
    done = alice.push("--from_dir", str(folder), "--no_verify")
    assert done.code == 0 and "trying again" in done.log
    assert b"# Mine, and newer" in repository.files()["README.md"] and b"charseq2seq" in repository.files()["README.md"]
    assert [one.status for one in hub.calls("POST", "/commit/")] == [412, 200]


def test_two_pushes_at_once_never_mix(hub: HubServer, tmp_path: Path) -> None:
    users = []
    for number, loss in enumerate((1.5, 1.4)):
        user = Publisher(hub, tmp_path / str(number))
        build_folder(tiny_checkpoint(loss, seed=number), user.home / "out", REPO)
        users.append(user)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda user: user.push("--from_dir", "out", "--no_verify"), users))
    assert [one.code for one in done] == [0, 0], done
    repository = hub.repo(REPO)
    expected = [{p.name: p.read_bytes() for p in (user.home / "out").iterdir()} for user in users]
    for commit in repository.commits[:-1]:
        files = repository.files(commit.id)
        assert any(all(files[name] == one[name] for name in ALL_FILES) for one in expected), commit.title
    assert len(titles(hub)) == 2


# The part of a push that talks to the Hub, without the seconds of its proofs.
TALK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from charseq2seq.publishing.plan import Local
from charseq2seq.publishing.publish import PublishRequest, commit_folder, preflight
request = PublishRequest()
standing = preflight(request)
commit_folder(standing, request, Local(Path(sys.argv[2]), standing.repo_id))
"""


def test_a_push_killed_at_any_moment_leaves_the_old_head_or_the_new_one(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    repository = hub.add_repo(REPO)
    other = tmp_path / "other"
    build_folder(tiny_checkpoint(1.4, seed=1), other, REPO)
    complete = [{path.name: path.read_bytes() for path in one.iterdir()} for one in (folder, other)]
    moments = random.Random(4)
    for attempt in range(50):
        kill_at = moments.randrange(1, 30)
        strike(hub, tmp_path, (folder, other)[attempt % 2], kill_at)
        files = {name: content for name, content in repository.files().items() if name in ALL_FILES}
        assert files in ({}, *complete), f"attempt {attempt}, killed at request {kill_at}"
    assert 3 < len(titles(hub)) < 47, "some were killed before their commit, some after"
    assert Publisher(hub, tmp_path / "user").push("--from_dir", str(other), "--no_verify").code == 0
    assert {name: repository.files()[name] for name in ALL_FILES} == complete[1]


def strike(hub: HubServer, home: Path, folder: Path, kill_at: int) -> None:
    """Push and be killed when the `kill_at`-th request arrives: the odd ones before it takes effect, others anywhen."""
    started = threading.Event()
    process: list[subprocess.Popen[bytes]] = []
    count = itertools.count(1)

    def maybe() -> None:
        started.wait()
        if next(count) == kill_at:
            process[0].kill()
            if kill_at % 2:
                process[0].wait()

    hub.fail(call=maybe)
    command = [sys.executable, "-c", TALK, str(ROOT), str(folder)]
    environment = hub.environment(home, WRITE)
    process.append(subprocess.Popen(command, env=environment, cwd=home, stderr=subprocess.DEVNULL))
    started.set()
    assert process[0].wait() in (-9, 0)
    hub.mend()


@pytest.mark.parametrize("way", ["lfs", "multipart", "no xet on the hub", "dead cas", "tls"])
def test_every_way_of_sending_ends_with_the_same_repository(way: str, folder: Path, tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {
        "multipart": {"lfs_part_size": 10_000},
        "no xet on the hub": {"xet": "off"},
        "tls": {"tls": True},
    }
    with hub_with_people(**options.get(way, {})) as hub:
        if way == "dead cas":
            hub.unplug_cas()
        environment = LFS_ONLY if way in ("lfs", "multipart") else {}
        verify = [] if way == "multipart" else ["--no_verify"]
        user = Publisher(hub, tmp_path / "user")
        done = user.push("--from_dir", str(folder), *verify, **environment)
        assert done.code == 0, done.log
        files = hub.repo(REPO).files()
        assert {name: files[name] for name in ALL_FILES} == {p.name: p.read_bytes() for p in folder.iterdir()}
        puts = hub.calls("PUT", "/lfs/")
        assert len(puts) == {"lfs": 3, "multipart": 3 + 4 + 4, "tls": 0}.get(way, 3)
        assert ("sending by LFS instead" in done.log) == (way in ("no xet on the hub", "dead cas"))
        assert {one.token for one in puts} <= {None}


def test_the_folder_of_a_stranger_is_not_pushed_by_mistake(alice: Publisher, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    done = alice.push("--from_dir", str(tmp_path / "photos"))
    assert done.code == 66 and "not a repository folder of this suite" in done.log


def test_files_beside_those_of_the_folder_stay_at_home(alice: Publisher, hub: HubServer, folder: Path) -> None:
    shutil.copytree(folder, alice.home / "mine")
    (alice.home / "mine" / "diary.txt").write_text("private")
    assert alice.push("--from_dir", "mine", "--no_verify").code == 0
    assert head_files(hub) == ALL_FILES
    assert json.loads(hub.repo(REPO).files()["training_args.json"])["made_by"] == "charseq2seq"
