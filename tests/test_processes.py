"""Several processes that train one model, started by torchrun itself, talking over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.training.processes import ALONE, Group, is_rank_0, process_group, started_by_torchrun
from tests.hub.server import WRITE, hub_with_people
from tests.train_client import TINY, Done, Trainee, contents, read_until, torchrun
from tests.warm_client import WarmClient

TRAIN = ["--mode", "train", "--data_path", "text.txt", *TINY, "--device", "cpu"]
EVERY_STEP = ["--max_steps", "20", "--eval_interval", "1", "--precision", "fp32"]
LONG = ["--max_steps", "100000", "--eval_interval", "20", "--log_interval", "1"]

TWO = ["--standalone", "--nproc_per_node", "2"]

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")


def ended(process: subprocess.Popen[str]) -> Done:
    """Wait for a group; torchrun reports failures with tracebacks of its own, so those are no defect of ours."""
    out, log = process.communicate()
    return Done(process.returncode, out, log)


def curve(user: Trainee) -> list[float]:
    """The validation losses of the last run here."""
    return [point["nats_per_char"] for point in contents(user.resume)["history"]]


# --- one process


def test_a_process_that_torchrun_did_not_start_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not started_by_torchrun() and is_rank_0()
    with process_group("cpu") as group:
        assert group == ALONE == Group(rank=0, size=1)
        assert group.sum(1.5, 2.5) == [1.5, 2.5]
        assert group.from_rank_0(lambda: "made here") == "made here"
        assert group.synchronize(signal.SIGINT, 3.0, 4.0) == (signal.SIGINT, [3.0, 4.0])
        with pytest.raises(SuiteError, match="refused"):
            group.from_rank_0(lambda: (_ for _ in ()).throw(SuiteError("refused", ExitCode.USAGE)))
    monkeypatch.setattr(Group, "sum", lambda group, *numbers: list(numbers))  # as if the others said nothing
    assert Group(rank=1, size=2).synchronize(signal.SIGINT, 3.0) == (signal.SIGINT, [0.0]), "rank 0's figures count"


def test_a_batch_in_parts_is_the_batch(client: WarmClient, tmp_path: Path) -> None:
    arguments = ["--max_steps", "8", "--eval_interval", "1", "--precision", "fp32", "--device", "cpu"]
    in_parts, whole = Trainee(tmp_path / "in_parts"), Trainee(tmp_path / "whole")
    saving = ["--accumulation_steps", "3", "--gradient_checkpointing"]
    assert client.train(in_parts, *arguments, *saving).code == client.train(whole, *arguments).code == 0
    assert len(curve(whole)) == 8 and curve(in_parts) == pytest.approx(curve(whole), abs=1e-5)


def test_a_batch_too_small_for_all_is_refused(client: WarmClient, user: Trainee) -> None:
    done = client.train(user, "--max_steps", "2", "--accumulation_steps", "5")
    assert done.code == ExitCode.USAGE and not user.model.exists()
    assert "--batch_size 4 cannot be divided into 5 parts (1 processes" in done.log


# --- groups


@pytest.mark.slow
def test_three_processes_compute_what_one_does(client: WarmClient, user: Trainee, tmp_path: Path) -> None:
    """Of batches of four windows they get 2, 1 and 1."""
    done = ended(torchrun(user, ["--standalone", "--nproc_per_node", "3"], *TRAIN, *EVERY_STEP))
    assert done.code == 0 and "batches: divided among 3 processes, 1 parts each" in done.log, done.log
    assert done.log.count("step 20: validation") == 1, "rank 0 alone logs"
    assert "FutureWarning" not in done.log
    assert done.out.count('"outcome"') == 1 and done.report["outcome"] == "finished"
    alone = Trainee(tmp_path / "alone")
    assert client.train(alone, *EVERY_STEP, "--device", "cpu").code == 0
    assert len(curve(user)) == 20 and curve(user) == pytest.approx(curve(alone), abs=2e-4)
    ours, theirs = (contents(trainee.model)["metrics"]["nats_per_char"] for trainee in (user, alone))
    assert ours == pytest.approx(theirs, abs=2e-4)


def workers_of(launcher: int) -> list[int]:
    """The processes that a torchrun has started, in order of rank."""
    ranks = {}
    for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
        entries = Path(f"/proc/{child}/environ").read_text().split("\0")
        environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        if "RANK" in environment:
            ranks[int(environment["RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_of_which_one_was_killed_starts_again_and_goes_on(rank: int, user: Trainee) -> None:
    steps = ["--eval_interval", "20", "--log_interval", "1", "--max_steps", "400"]
    process = torchrun(user, ["--max_restarts", "1", *TWO], *TRAIN, *steps)
    read_until(process, " step 60 (")
    os.kill(workers_of(process.pid)[rank], signal.SIGKILL)
    done = ended(process)
    assert done.code == 0 and "resume: continuing the unfinished run at step " in done.log, done.log
    assert contents(user.resume)["step"] == 400 and user.model.exists()


@pytest.mark.slow
@needs_proc
def test_a_group_stops_at_a_signal_and_goes_on_with_another_number_of_processes(user: Trainee) -> None:
    process = torchrun(user, TWO, *TRAIN, *LONG)
    read_until(process, " step 30 (")
    os.kill(workers_of(process.pid)[1], signal.SIGTERM)  # whichever gets it, all of them stop
    done = ended(process)
    assert "stopped: everything is saved" in done.log and '"outcome": "stopped"' in done.out, done.log
    stopped_at = contents(user.resume)["step"]
    process = user.start(*TRAIN, *LONG)
    log = read_until(process, "resume: continuing")
    process.kill()
    process.communicate()
    assert f"continuing the unfinished run at step {stopped_at}" in log


@pytest.mark.slow
def test_two_machines_train_one_model(user: Trainee) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_id", "plays"]
    launcher += ["--rdzv_endpoint", f"127.0.0.1:{port}", "--local_addr", "127.0.0.1"]
    agents = [torchrun(user, launcher, *TRAIN, "--max_steps", "6", "--eval_interval", "3") for _ in range(2)]
    both = [ended(agent) for agent in agents]
    assert [done.code for done in both] == [0, 0], both
    assert sum('"outcome": "finished"' in done.out for done in both) == 1
    assert "divided among 2 processes" in both[0].log + both[1].log


@pytest.mark.slow
def test_a_group_pushes_once(user: Trainee) -> None:
    with hub_with_people() as hub:
        pushing = ["--max_steps", "4", "--push_to_hf"]
        done = ended(torchrun(user, TWO, *TRAIN, *pushing, **hub.environment(user.home, WRITE)))
        assert done.code == 0 and done.report["outcome"] == "pushed", done.log
        assert len(hub.calls("POST", "/commit/")) == 1


@pytest.mark.slow
def test_a_run_that_diverges_does_so_in_all_processes_and_is_tried_again(user: Trainee) -> None:
    diverging = ["--max_steps", "8", "--eval_interval", "4", "--learning_rate", "1e30", "--precision", "fp32"]
    done = ended(torchrun(user, TWO, *TRAIN, *diverging))
    assert "Going on from step 0 with 0.5 of the learning rate" in done.log, done.log
    assert "It was the second try" in done.report["message"] and done.report["exit_code"] == ExitCode.DIVERGED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("refused", "code", "says"),
    [("--resume absent.pth", 66, "absent.pth does not exist"), ("--push_to_hf", 77, "no token was given")],
)
def test_what_rank_0_refuses_ends_all_processes(refused: str, code: int, says: str, user: Trainee) -> None:
    """Not when torchrun, half a minute later, kills those that wait."""
    done = ended(torchrun(user, TWO, *TRAIN, "--max_steps", "2", *refused.split()))
    assert done.report["exit_code"] == code and says in done.log and "forcefully" not in done.log, done.log
    assert not user.model.exists()
