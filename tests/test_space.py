"""The page beside a model: the Space that `--with_space` publishes."""

from __future__ import annotations

from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode
from encoder_decoder_transformer import Transformer
from tests.browser import IDLE, chromium, served
from tests.hub.server import ONE_REPO, HubServer
from tests.push_client import ALL_FILES, REPO, Publisher, tiny_checkpoint

SPACE = f"spaces/{REPO}-demo"
LINK = f"https://huggingface.co/{SPACE}"
PUSH = ["--with_space", "--no_verify"]
FROM_THE_MODEL = {"model.safetensors", "config.json", "vocab.json"}


def files_of(hub: HubServer, repo_id: str) -> dict[str, bytes]:
    """The files at the head of main, except the Hub's own."""
    return {name: content for name, content in hub.repo(repo_id).files().items() if name != ".gitattributes"}


def test_a_page_with_the_very_model_is_published_and_both_link_to_each_other(alice: Publisher, hub: HubServer) -> None:
    done = alice.push(*PUSH, "--json")
    assert done.code == 0 and done.json["space"] == f"{hub.endpoint}/{SPACE}", done.log
    assert "space: new, to be made public" in done.log and "repository: new, to be made public" in done.log
    model, space = files_of(hub, REPO), files_of(hub, SPACE)
    assert set(model) == ALL_FILES and set(space) >= {*FROM_THE_MODEL, "index.html", "demo.js", "README.md"}
    assert all(space[name] == model[name] for name in FROM_THE_MODEL)
    page, card = space["index.html"].decode(), space["README.md"].decode()
    assert "Welcome" not in page and f'href="https://huggingface.co/{REPO}"' in page
    assert "sdk: static\n" in card and f"\nmodels:\n- {REPO}\n" in card
    assert f"]({LINK})" in model["README.md"].decode()
    assert [len(hub.repo(name).commits) for name in (REPO, SPACE)] == [2, 2], "one commit of ours each"
    assert "up to date" in alice.push(*PUSH).log and len(hub.repo(SPACE).commits) == 2


def test_a_later_push_updates_both_and_keeps_what_people_wrote(alice: Publisher, hub: HubServer) -> None:
    assert alice.push("--no_verify", "--private").code == alice.push(*PUSH).code == 0 and hub.repo(SPACE).private
    card = files_of(hub, SPACE)["README.md"].replace(b'title: "shakespeare-transformer"', b"title: My stage # at last")
    hub.repo(SPACE).push({"README.md": card + b"\nWith thanks to my cat.\n"})
    alice.save(tiny_checkpoint(1.4, seed=1))
    assert alice.push(*PUSH).code == 0
    space = files_of(hub, SPACE)
    assert space["model.safetensors"] == files_of(hub, REPO)["model.safetensors"]
    card = space["README.md"]
    assert b"title: My stage # at last\n" in card and card.endswith(b"With thanks to my cat.\n")
    alice.save(tiny_checkpoint(1.3))
    assert alice.push("--no_verify").code == 0
    assert LINK.encode() in files_of(hub, REPO)["README.md"], "the Space is still there"
    del hub._state.repositories[SPACE]
    assert alice.push("--no_verify").code == 0
    assert LINK.encode() not in files_of(hub, REPO)["README.md"]


def test_what_cannot_be_pushed_to_the_space_is_told_before_anything_is_made(alice: Publisher, hub: HubServer) -> None:
    done = alice.push(*PUSH, "--create_pr")
    assert done.code == ExitCode.USAGE and "--with_space shows what is on main" in done.log
    done = alice.push(*PUSH, "--username", "alice", "--repo_name", "m", token=ONE_REPO)
    assert done.code == ExitCode.NO_PERMISSION and "no right to write here" in done.log, done.log
    hub.add_repo(SPACE, {"app.py": b"mine"})
    done = alice.push(*PUSH)
    assert done.code == ExitCode.CONFLICT and "did not make (app.py" in done.log
    assert hub.repos == [SPACE] and not hub.calls("POST", "/commit/|/repos/create")


def test_a_page_that_cannot_be_sent_leaves_the_model_as_it_was(alice: Publisher, hub: HubServer) -> None:
    hub.fail("POST", "/api/spaces/.*/commit/", status=413)
    done = alice.push(*PUSH)
    assert done.code == ExitCode.TOO_LARGE and hub.repos == [SPACE], done.log
    hub.mend()
    planned = alice.push("--dry_run", "--with_space")
    assert planned.code == 0 and "space: " in planned.log and hub.repos == [SPACE]
    names = {line.split()[-1] for line in planned.out.splitlines()}
    assert names > {*ALL_FILES, f"{REPO}-demo/index.html"} and f"{REPO}-demo/config.json" in names


@pytest.mark.slow  # a browser
def test_the_page_that_was_pushed_writes_in_a_browser(alice: Publisher, hub: HubServer, tmp_path: Path) -> None:
    assert alice.push(*PUSH).code == 0
    (site := tmp_path / "site").mkdir()
    for name, content in files_of(hub, SPACE).items():
        (site / name).write_bytes(content)
    with served(site) as address, chromium(tmp_path / "profile") as page:
        page.open(address)
        page.wait(IDLE)
        page.type("prompt", "ROMEO:")
        page.fill(length=100, seed=5)
        page.click("#write")
        expected = Transformer.from_pretrained(site).write("ROMEO:", 100, temperature=0.8, seed=5)
        assert page.written() == f"ROMEO:{expected}" and page.complaints() == []
