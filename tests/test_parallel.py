"""Several processes that train one model, started by torchrun itself, talking over loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from charseq2seq.checkpoint import load_checkpoint
from charseq2seq.errors import ExitCode
from charseq2seq.generation import Sampling, TextGenerator
from tests.hub.client import WRITE, hub_with_people
from tests.train_client import ROOT, TINY, Done, Trainee, contents

TRAIN = ["--mode", "train", "--data_path", "text.txt", *TINY, "--device", "cpu"]
EVERY_STEP = ["--max_steps", "50", "--eval_interval", "1", "--precision", "fp32"]
LONG = ["--max_steps", "100000", "--eval_interval", "20", "--log_interval", "1"]

TWO = ["--standalone", "--nproc_per_node", "2"]

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")


def torchrun(user: Trainee, launcher: list[str], *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a group of processes in a user's folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launcher, str(ROOT / "train_transformer.py"), *arguments],
        env=user.environment(GLOO_SOCKET_IFNAME="lo") | environment,
        cwd=user.home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> Done:
    """Wait for a group; torchrun tells of failures with tracebacks of its own, so those are no defect of ours."""
    out, log = process.communicate()
    return Done(process.returncode, out, log)


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Read the log until it has a text; returns what was read."""
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            return seen
    raise AssertionError(seen)


def curve(user: Trainee) -> list[float]:
    """The validation losses of the last run here."""
    return [point["nats_per_char"] for point in contents(user.resume)["history"]]


@pytest.fixture
def user(tmp_path: Path) -> Trainee:
    """A user with a text."""
    return Trainee(tmp_path / "user")


def test_two_processes_do_what_one_does(user: Trainee, tmp_path: Path) -> None:
    done = ended(torchrun(user, TWO, *TRAIN, *EVERY_STEP))
    assert done.code == 0 and "batches: shared by 2 processes, in 1 pieces each" in done.log, done.log
    assert done.log.count("step 50: validation") == 1, "one speaks"
    assert "FutureWarning" not in done.log
    assert done.out.count('"outcome"') == 1 and done.report["outcome"] == "finished"
    alone = Trainee(tmp_path / "alone")
    assert alone.run(*TRAIN, *EVERY_STEP).code == 0
    assert len(curve(user)) == 50 and curve(user) == pytest.approx(curve(alone), abs=2e-4)
    ours, theirs = load_checkpoint(user.model), load_checkpoint(alone.model)
    assert ours.metrics["nats_per_char"] == pytest.approx(theirs.metrics["nats_per_char"], abs=2e-4)
    assert len(TextGenerator(ours.build_model(), ours.vocabulary()).generate("ALL:", 20, Sampling())) == 20


def test_three_processes_share_what_three_does_not_divide(user: Trainee, tmp_path: Path) -> None:
    """Eight square matrices and four wide ones for Muon, and batches of four windows."""
    arguments = ["--max_steps", "12", "--eval_interval", "1", "--precision", "fp32"]
    done = ended(torchrun(user, ["--standalone", "--nproc_per_node", "3"], *TRAIN, *arguments))
    alone = Trainee(tmp_path / "alone")
    assert done.code == 0 and alone.run(*TRAIN, *arguments).code == 0, done.log
    assert curve(user) == pytest.approx(curve(alone), abs=2e-4)


@pytest.mark.parametrize("pieces", ["2", "3", "4"])
def test_a_batch_in_pieces_is_the_batch(pieces: str, user: Trainee, tmp_path: Path) -> None:
    arguments = ["--max_steps", "8", "--eval_interval", "1", "--precision", "fp32"]
    assert user.run(*TRAIN, *arguments, "--accumulation_steps", pieces, "--gradient_checkpointing").code == 0
    alone = Trainee(tmp_path / "alone")
    assert alone.run(*TRAIN, *arguments).code == 0
    assert curve(user) == pytest.approx(curve(alone), abs=1e-5)


def test_two_processes_learn_in_bf16_with_dropout_and_pieces(user: Trainee) -> None:
    arguments = ["--max_steps", "6", "--eval_interval", "1", "--precision", "bf16", "--accumulation_steps", "2"]
    done = ended(torchrun(user, TWO, *TRAIN, *arguments, "--dropout", "0.1"))
    assert done.code == 0 and curve(user)[-1] < curve(user)[0], done.log


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_in_parts_learns_what_a_whole_one_does(precision: str, user: Trainee, tmp_path: Path) -> None:
    arguments = ["--max_steps", "12", "--eval_interval", "1", "--precision", precision]
    done = ended(torchrun(user, TWO, *TRAIN, *arguments, "--parallel", "fsdp", "--accumulation_steps", "2"))
    assert done.code == 0, done.log
    alone = Trainee(tmp_path / "alone")
    assert alone.run(*TRAIN, *arguments).code == 0
    assert curve(user) == pytest.approx(curve(alone), abs=2e-4 if precision == "fp32" else 5e-2)
    ours, theirs = contents(user.resume), contents(alone.resume)
    assert ours["weights"].keys() == theirs["weights"].keys()
    for name, weight in theirs["weights"].items():
        assert ours["weights"][name].shape == weight.shape and ours["best_weights"][name].dtype == weight.dtype
    longer = [*arguments, "--max_steps", "16", "--resume", user.resume.name]
    whole = user.run(*TRAIN, *longer)
    assert whole.code == 0 and "continuing the finished run at step 12" in whole.log, whole.log
    longer = [*arguments, "--max_steps", "20", "--resume", user.resume.name]
    again = ended(torchrun(user, TWO, *TRAIN, *longer, "--parallel", "fsdp"))
    assert again.code == 0 and "continuing the finished run at step 16" in again.log, again.log
    checkpoint = load_checkpoint(user.model)
    assert len(TextGenerator(checkpoint.build_model(), checkpoint.vocabulary()).generate("ALL:", 20, Sampling())) == 20


def test_parts_need_several_processes(user: Trainee) -> None:
    done = user.run(*TRAIN, "--max_steps", "2", "--parallel", "fsdp")
    assert done.code == ExitCode.USAGE and "start it by torchrun" in done.log


def test_a_batch_too_small_for_all_is_refused(user: Trainee) -> None:
    done = user.run(*TRAIN, "--max_steps", "2", "--accumulation_steps", "5")
    assert done.code == ExitCode.USAGE and not user.model.exists()
    assert "--batch_size 4 cannot be shared out into 5 pieces (1 processes" in done.log


def workers_of(launcher: int) -> list[int]:
    """The processes that a torchrun has started, in order of rank."""
    ranks = {}
    for child in map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()):
        entries = Path(f"/proc/{child}/environ").read_text().split("\0")
        environment = dict(entry.split("=", 1) for entry in entries if "=" in entry)
        if "RANK" in environment:
            ranks[int(environment["RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_group_of_which_one_was_killed_starts_again_and_goes_on(rank: int, user: Trainee) -> None:
    steps = ["--eval_interval", "20", "--log_interval", "1", "--max_steps", "400"]
    process = torchrun(user, ["--max_restarts", "1", *TWO], *TRAIN, *steps)
    wait_for(process, " step 60 (")
    os.kill(workers_of(process.pid)[rank], signal.SIGKILL)
    done = ended(process)
    assert done.code == 0 and "resume: continuing the unfinished run at step " in done.log, done.log
    assert contents(user.resume)["step"] == 400 and user.model.exists()


@needs_proc
def test_a_group_stops_at_a_signal_and_goes_on_with_another_number_of_processes(user: Trainee) -> None:
    process = torchrun(user, TWO, *TRAIN, *LONG)
    wait_for(process, " step 30 (")
    os.kill(workers_of(process.pid)[1], signal.SIGTERM)  # whichever gets it, all of them stop
    done = ended(process)
    assert "stopped: everything is saved" in done.log and '"outcome": "stopped"' in done.out, done.log
    stopped_at = contents(user.resume)["step"]
    process = user.start(*TRAIN, *LONG)
    log = wait_for(process, "resume: continuing")
    process.kill()
    process.communicate()
    assert f"continuing the unfinished run at step {stopped_at}" in log


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
    assert "shared by 2 processes" in both[0].log + both[1].log


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_group_pushes_once(parallel: str, user: Trainee) -> None:
    with hub_with_people() as hub:
        arguments = ["--max_steps", "4", "--push_to_hf", "--parallel", parallel]
        done = ended(torchrun(user, TWO, *TRAIN, *arguments, **hub.environment(user.home, WRITE)))
        assert done.code == 0 and done.report["outcome"] == "pushed", done.log
        assert len(hub.calls("POST", "/commit/")) == 1


def test_who_waits_for_a_leader_that_refuses_ends_with_it(user: Trainee) -> None:
    """Not when torchrun, half a minute later, kills it."""
    done = ended(torchrun(user, TWO, *TRAIN, "--max_steps", "4", "--push_to_hf"))
    assert done.code == 1 and "no token was given" in done.log and "forcefully" not in done.log, done.log


HAMMER = """
import torch
from charseq2seq.training.parallel import process_group

out, mine = torch.empty(8), torch.ones(8)
with process_group("cpu"):
    gloo = torch.distributed.group.WORLD._get_backend(out.device)
    for _ in range(3000):
        for work in [gloo.allgather_coalesced([[out]], [mine]) for _ in range(64)]:
            work.wait()
"""


def test_many_exchanges_at_once_do_not_corrupt_the_heap(user: Trainee) -> None:
    """What two worker threads of gloo did, in four of five runs of this."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = user.environment(**alone)
    done = subprocess.run([sys.executable, "-c", HAMMER], env=environment, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
