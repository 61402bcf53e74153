"""The guide's way 1: `train_transformer.py --push_to_hf` against a Hub on loopback."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode
from tests.hub.server import READ, WRITE, HubServer
from tests.push_client import ALL_FILES, start_and_signal
from tests.train_client import TINY, Done, Trainee, finish

REPO = "alice/my-shakespeare-transformer"
# Letter for letter the guide's command, with a real user and token in place of its placeholders.
WAY_1 = ["--mode", "train", "--push_to_hf", "--hf_repo_name", "my-shakespeare-transformer", "--hf_username", "alice"]
QUICK = ["--data_path", "text.txt", *TINY, "--max_steps", "4"]


def way_1(hub: HubServer, trainee: Trainee, *arguments: str, token: str | None = None) -> Done:
    """Train and push, with this token in the environment."""
    return finish(start(hub, trainee, *arguments, token=token))


def start(hub: HubServer, trainee: Trainee, *arguments: str, token: str | None) -> subprocess.Popen[str]:
    """Begin to train and push."""
    return trainee.start(*WAY_1, *QUICK, *arguments, **hub.environment(trainee.home, token))


def test_one_command_trains_and_pushes(hub: HubServer, tmp_path: Path) -> None:
    trainee = Trainee(tmp_path / "user")
    done = way_1(hub, trainee, "--hf_token", WRITE)
    assert done.code == 0, done.log
    url = f"{hub.endpoint}/{REPO}"
    assert done.out.splitlines()[-2] == url
    assert done.report["outcome"] == "pushed" and done.report["url"] == url
    assert set(hub.repo(REPO).files()) - {".gitattributes"} == ALL_FILES
    assert hub.repo(REPO).files()["pytorch_model.bin"], "the weights are there"
    assert done.log.index("token: from the command line") < done.log.index("text: text.txt"), "checked before training"
    assert "HF_TOKEN" in done.log, "whoever puts a token on the command line is told of the better way"
    for content in (done.out, done.log, trainee.model.read_bytes().decode("latin-1")):
        assert WRITE not in content


def test_what_cannot_be_pushed_is_refused_before_training(hub: HubServer, tmp_path: Path) -> None:
    trainee = Trainee(tmp_path / "user")
    done = way_1(hub, trainee, token=READ)
    assert done.code == 77 and "❌ Push failed: no right to write here" in done.log, done.log
    assert done.report["outcome"] == "failed" and "no right to write" in done.report["message"]
    assert "text: " not in done.log and not trainee.model.exists()
    hub.add_repo(REPO, {"data.csv": b"mine"})
    done = way_1(hub, trainee, token=WRITE)
    assert done.code == 78 and "❌ Repository already exists" in done.log and not trainee.model.exists()


def test_a_push_that_fails_after_training_keeps_the_model(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("POST", "/commit/", status=413)
    trainee = Trainee(tmp_path / "user")
    done = way_1(hub, trainee, "--hf_private", token=WRITE)
    assert done.code == 79 and "the model is safe in transformer_model.pth" in done.log, done.log
    assert done.report["outcome"] == "finished, not pushed" and done.report["nats_per_char"] > 0
    assert trainee.model.exists() and hub.repo(REPO).private


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "whoami"), pytest.param("POST", "/commit/", marks=pytest.mark.slow)]
)
def test_a_signal_outside_training_ends_with_json_too(method: str, path: str, hub: HubServer, tmp_path: Path) -> None:
    trainee, code = Trainee(tmp_path / "user"), ExitCode.TERMINATED
    done = finish(start_and_signal(hub, method, path, signal.SIGTERM, lambda: start(hub, trainee, token=WRITE)))
    assert (done.code, done.report["exit_code"], done.report["outcome"]) == (code, code, "stopped"), done.log
    assert trainee.model.exists() == (method == "POST") and not list(trainee.home.glob("*.tmp"))
