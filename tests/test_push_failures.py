"""Everything that can go wrong with a push, provoked by a Hub on loopback and seen at the command line.

Each row must give its message, its remedy and its exit code, the same as JSON, no traceback, no token, and must leave
nothing half-published. `Publisher.push` checks for tracebacks and tokens.
"""

from __future__ import annotations

import dataclasses
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode
from charseq2seq.publishing.failures import FAILURES
from tests.hub.client import WRITE, hub_with_people
from tests.hub.server import HubServer
from tests.push_client import Publisher, tiny_checkpoint
from tests.push_failures import (
    BEFORE_ANYTHING_SLOW,
    DENIED,
    DOWN,
    TRIED_AGAIN_IN_VAIN,
    UNREACHABLE,
    WITH_FILES_IN_HAND,
    Row,
)


def see(hub: HubServer, home: Path, row: Row, broken: Path | None = None) -> None:
    """Let the row happen and check what the user sees."""
    noted = dataclasses.replace(tiny_checkpoint(), environment={"note": row.note})
    user = Publisher(hub, home, noted if row.note else None)
    row.arrange(hub)
    heads = {name: hub.repo(name).head for name in hub.repos}
    filled = {name: value.format(dead_url=hub.dead_url) for name, value in row.environment.items()}
    arguments = [argument.format(broken=broken) for argument in row.arguments]
    done = user.push(*arguments, "--json", token=row.token, **filled)
    assert done.code == row.code, done.log
    assert f"❌ {row.headline}" in done.log and row.remedy in done.log, done.log
    facts = done.json
    assert (facts["ok"], facts["error"], facts["exit_code"]) == (False, row.kind, row.code)
    assert facts["message"].startswith(row.headline) and row.remedy in facts["remedy"]
    if row.code != ExitCode.UNCONFIRMED:
        for name in hub.repos:
            assert hub.repo(name).head == heads.get(name, hub.repo(name).commits[-1].id), "nothing is half-published"


@pytest.mark.parametrize("case", BEFORE_ANYTHING_SLOW)
def test_what_cannot_work_is_refused_before_anything_slow(case: str, hub: HubServer, tmp_path: Path) -> None:
    see(hub, tmp_path / "user", BEFORE_ANYTHING_SLOW[case])
    assert not hub.calls("POST", "/commit/|/repos/create|validate")


@pytest.mark.parametrize("case", WITH_FILES_IN_HAND)
def test_what_goes_wrong_later_is_told_and_publishes_nothing(
    case: str, hub: HubServer, tmp_path: Path, folder: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "torch.py").write_text("raise SystemExit('this is not PyTorch')")
    see(hub, tmp_path / "user", WITH_FILES_IN_HAND[case], broken)


@pytest.mark.slow
def test_what_is_tried_again_in_vain_is_told_in_the_end(tmp_path: Path) -> None:
    def play(number: int, row: Row) -> None:
        with hub_with_people() as hub:
            see(hub, tmp_path / str(number), row)

    with ThreadPoolExecutor(4) as pool:  # they mostly wait
        for played in [pool.submit(play, number, row) for number, row in enumerate(TRIED_AGAIN_IN_VAIN.values())]:
            played.result()


def test_every_row_of_the_table_is_provoked() -> None:
    assert {
        row.kind
        for row in [*BEFORE_ANYTHING_SLOW.values(), *WITH_FILES_IN_HAND.values(), *TRIED_AGAIN_IN_VAIN.values()]
    } == set(FAILURES)


def test_an_unknown_certificate_is_told(tmp_path: Path) -> None:
    with hub_with_people(tls=True) as hub:
        unset = {"SSL_CERT_FILE": ""}
        row = Row("unreachable", UNREACHABLE, DOWN, "SSL_CERT_FILE", environment=unset)
        see(hub, tmp_path / "user", row)
        see(hub, tmp_path / "user", BEFORE_ANYTHING_SLOW["bad token"])


def test_over_https_a_repository_hidden_by_a_401_is_still_a_401(tmp_path: Path) -> None:
    with hub_with_people(tls=True) as hub:
        hub.fail("GET", "/api/models/", status=401, message="Invalid username or password.")
        done = Publisher(hub, tmp_path / "user").push("--check")
    assert done.code == DENIED and "❌ Push failed: HTTP 401 Unauthorized" in done.log


def test_a_secret_in_the_folder_is_never_sent(hub: HubServer, tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(tiny_checkpoint(), environment={"note": f"run with {WRITE}"})
    done = Publisher(hub, tmp_path / "user", checkpoint).push()
    assert done.code == ExitCode.BAD_DATA and "❌ Push failed: the folder holds a secret" in done.log
    assert "the token in use, in README.md" in done.log
    assert not hub.calls("POST", "") and hub.repos == []


def test_a_model_that_is_not_there_or_not_one_is_refused(hub: HubServer, tmp_path: Path) -> None:
    user = Publisher(hub, tmp_path / "user")
    assert user.push("--model_path", "absent.pth").code == ExitCode.NO_INPUT
    (user.home / "transformer_model.pth").write_bytes(b"not a model")
    done = user.push("--json")
    assert done.code == ExitCode.BAD_DATA and done.json["ok"] is False
    assert "transformer_model.pth cannot be used" in done.json["message"]
    assert hub.repos == []
