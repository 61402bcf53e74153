"""Pushes that are repeated, answered by silence, overtaken, doubled, killed, or sent another way: never half a push."""

from __future__ import annotations

import itertools
import subprocess
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from charseq2seq.publishing.folder import build_folder
from tests.hub.server import LFS_ONLY, HubServer, hub_with_people
from tests.push_client import ALL_FILES, REPO, Publisher, tiny_checkpoint, titles


@pytest.mark.slow
def test_the_same_checkpoint_pushed_twenty_times_makes_one_commit(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    user = Publisher(hub, tmp_path / "user")
    (tmp_path / "temporary").mkdir()
    first = user.push("--no_verify", "--json", TMPDIR=str(tmp_path / "temporary"))
    assert first.json["state"] == "pushed" and not list((tmp_path / "temporary").glob("shakespeare*"))
    again = [user.push("--json") for _ in range(19)]
    assert [one.code for one in again] == [0] * 19
    assert {one.json["state"] for one in again} == {"up to date"}
    assert {one.json["commit"] for one in again} == {first.json["commit"]}
    assert len(titles(hub)) == 1 and len(hub.calls("POST", "/commit/")) == 1


def test_a_lost_answer_is_not_committed_twice(alice: Publisher, hub: HubServer, folder: Path) -> None:
    hub.fail("POST", "/commit/", drop="after", times=1)
    done = alice.push("--no_verify", "--json")
    assert done.code == 0 and done.json["state"] == "pushed", done.log
    assert done.json["commit"] == hub.repo(REPO).head and len(titles(hub)) == 1
    hub.fail("POST", "/commit/", status=504, body=b"<html>", drop="after", times=1)
    alice.save(tiny_checkpoint(1.4))
    assert alice.push("--no_verify").code == 0
    assert len(titles(hub)) == 2 and len(hub.calls("POST", "/commit/")) == 2


def test_a_commit_in_between_is_followed_and_not_lost(alice: Publisher, hub: HubServer, folder: Path) -> None:
    repository = hub.add_repo(REPO, {"README.md": b"# Mine\n"})
    words = {"README.md": b"# Mine, and newer\n", "LICENSE": b"free"}
    hub.fail("POST", "/commit/", call=lambda: repository.push(words), times=1)
    done = alice.push("--no_verify")
    assert done.code == 0 and "trying again" in done.log
    assert b"# Mine, and newer" in repository.files()["README.md"] and b"charseq2seq" in repository.files()["README.md"]
    assert [one.status for one in hub.calls("POST", "/commit/")] == [412, 200]


def test_of_two_pushes_at_once_one_wins_and_the_other_follows(hub: HubServer, tmp_path: Path) -> None:
    models = [tiny_checkpoint(loss, seed=seed) for seed, loss in enumerate((1.5, 1.4))]
    users = [Publisher(hub, tmp_path / str(number), model) for number, model in enumerate(models)]
    both_are_ready = threading.Barrier(2)
    hub.fail("POST", "/commit/", call=both_are_ready.wait, times=2)
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda user: user.push("--output_dir", "out", "--no_verify"), users))
    assert [one.code for one in done] == [0, 0], done
    assert sum("somebody else is pushing" in one.log for one in done) == 1, "the loser says so"
    assert sorted(str(one.status) for one in hub.calls("POST", "/commit/")) == ["200", "200", "412"]
    repository = hub.repo(REPO)
    expected = [{p.name: p.read_bytes() for p in (user.home / "out").iterdir()} for user in users]
    for commit in repository.commits[:-1]:
        files = repository.files(commit.id)
        assert any(all(files[name] == one[name] for name in ALL_FILES) for one in expected), commit.title
    assert len(titles(hub)) == 2


def kill_at_request(hub: HubServer, user: Publisher, number: int) -> None:
    """Push, and be killed as a request arrives: at odd numbers before that takes effect, at even ones about then."""
    started: Future[subprocess.Popen[str]] = Future()
    count = itertools.count(1)

    def kill() -> None:
        if next(count) == number:
            started.result().kill()
            if number % 2:
                started.result().wait()

    hub.fail(call=kill)
    started.set_result(user.start("--no_verify"))
    started.result().communicate()
    hub.mend()


@pytest.mark.slow
def test_a_push_killed_at_any_request_leaves_the_old_files_or_the_new_ones(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    users = [Publisher(hub, tmp_path / "user"), Publisher(hub, tmp_path / "another", tiny_checkpoint(1.4, seed=1))]
    build_folder(tiny_checkpoint(1.4, seed=1), tmp_path / "other", REPO)
    complete = [{path.name: path.read_bytes() for path in one.iterdir()} for one in (folder, tmp_path / "other")]
    for number in range(1, 22):
        kill_at_request(hub, users[number // 2 % 2], number)
        there = hub.repo(REPO).files() if hub.repos else {}
        files = {name: content for name, content in there.items() if name in ALL_FILES}
        assert files in ({}, *complete), f"killed at request {number}"
    assert 1 < len(titles(hub)) < 20, "some were killed before their commit, some after"
    assert users[1].push("--no_verify").code == 0
    assert {name: hub.repo(REPO).files()[name] for name in ALL_FILES} == complete[1]


@pytest.mark.parametrize("way", ["lfs", "no xet on the hub", pytest.param("dead cas", marks=pytest.mark.slow), "tls"])
def test_every_way_of_sending_ends_with_the_same_repository(way: str, folder: Path, tmp_path: Path) -> None:
    options: dict[str, dict[str, Any]] = {"no xet on the hub": {"xet": False}, "tls": {"tls": True}}
    with hub_with_people(**options.get(way, {})) as hub:
        if way == "dead cas":
            hub.unplug_cas()
        verify = [] if way == "lfs" else ["--no_verify"]
        done = Publisher(hub, tmp_path / "user").push(*verify, **(LFS_ONLY if way == "lfs" else {}))
        assert done.code == 0, done.log
        files = hub.repo(REPO).files()
        assert {name: files[name] for name in ALL_FILES} == {p.name: p.read_bytes() for p in folder.iterdir()}
        puts = hub.calls("PUT", "/lfs/")
        large = [name for name in files if name.endswith((".bin", ".safetensors", ".png"))]
        assert len(puts) == (0 if way == "tls" else len(large))
        assert ("sending by LFS instead" in done.log) == (way in ("no xet on the hub", "dead cas"))
        assert {one.token for one in puts} <= {None}
