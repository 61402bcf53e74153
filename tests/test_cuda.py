"""On an NVIDIA GPU the suite trains, stops, goes on, evaluates and writes as on a CPU; elsewhere this is skipped."""

from __future__ import annotations

import copy
import signal
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from charseq2seq.checkpoint import load_checkpoint
from charseq2seq.corpus import load_corpus
from charseq2seq.device import choose_precision
from charseq2seq.errors import ExitCode
from charseq2seq.options import Settings, read_settings, resolve_settings
from charseq2seq.training.loop import Trainer
from charseq2seq.training.muon import BatchedMuon
from charseq2seq.training.parallel import process_group
from charseq2seq.training.run import suited_to
from encoder_decoder_transformer import Transformer
from tests.test_parallel import ended, torchrun
from tests.train_client import TINY, Done, Trainee, contents, finish

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")

STEPS = ["--max_steps", "150", "--eval_interval", "50", "--learning_rate", "0.05"]


@pytest.fixture
def user(tmp_path: Path) -> Trainee:
    """A user with a text."""
    return Trainee(tmp_path / "user")


@pytest.fixture(scope="module")
def by_cpu(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What a CPU reaches: the model file's metrics."""
    trainee = Trainee(tmp_path_factory.mktemp("cpu"))
    assert trainee.train(*STEPS, "--device", "cpu", "--precision", "fp32").code == 0
    return load_checkpoint(trainee.model).metrics


def loss(done: Done) -> float:
    """What a finished run reports."""
    assert done.code == 0, done.log
    return float(done.report["nats_per_char"])


def small_model() -> Transformer:
    """A model with weights that are all at work."""
    torch.manual_seed(0)
    model = Transformer(24, d_model=64, num_heads=2, num_decoder_layers=2, d_ff=96, source_length=12, target_length=20)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    return model


def ids(*shape: int) -> Tensor:
    """Token ids of `small_model`, the same every time."""
    return torch.randint(1, 24, shape, generator=torch.Generator().manual_seed(1))


def test_the_gpu_is_chosen_and_what_it_learnt_is_of_use_without_it(user: Trainee, by_cpu: Mapping[str, Any]) -> None:
    done = user.train(*STEPS)
    assert loss(done) == pytest.approx(by_cpu["nats_per_char"], abs=0.1)
    assert "device cuda: found, and faster than the CPU" in done.log
    assert choose_precision("auto", "cuda")[1] in done.log
    checkpoint = load_checkpoint(user.model)
    assert checkpoint.environment["hardware"] == torch.cuda.get_device_name()
    assert all(weight.device.type == "cpu" for weight in checkpoint.model_state_dict.values())
    for device in ("cuda", "cpu"):
        evaluated = user.run("--mode", "evaluate", "--data_path", "text.txt", "--device", device)
        assert loss(evaluated) == pytest.approx(loss(done), abs=0.02)
        written = user.run("--mode", "generate", "--prompt", "ALL:", "--num_chars", "100", "--device", device)
        assert written.code == 0 and len(written.out) == len("ALL:") + 100 + 1, written.log


@pytest.mark.parametrize(
    "options",
    [
        "--precision fp32",
        "--precision bf16 --gradient_checkpointing --accumulation_steps 2",
        "--precision fp16",
        "--precision fp16 --gradient_checkpointing --accumulation_steps 2",
        "--precision bf16 --compile",
    ],
)
def test_it_learns_as_on_the_cpu(options: str, user: Trainee, by_cpu: Mapping[str, Any]) -> None:
    done = user.train(*STEPS, "--device", "cuda", *options.split())
    assert loss(done) == pytest.approx(by_cpu["nats_per_char"], abs=0.1)
    train_loss = load_checkpoint(user.model).metrics["train_nats_per_char"]
    assert train_loss == pytest.approx(by_cpu["train_nats_per_char"], abs=0.1)


def test_a_stopped_run_goes_on_where_it_stood(user: Trainee, tmp_path: Path) -> None:
    arguments = ["--mode", "train", "--data_path", "text.txt", *TINY, "--max_steps", "300", "--eval_interval", "10"]
    straight = Trainee(tmp_path / "straight")
    assert straight.run(*arguments).code == 0
    process = user.start(*arguments, "--log_interval", "1")
    assert process.stderr is not None
    next(line for line in process.stderr if "step 20: validation" in line)
    process.send_signal(signal.SIGTERM)
    assert finish(process).code == ExitCode.TERMINATED
    done = user.run(*arguments, "--log_interval", "1")
    assert done.code == 0 and "resume: continuing the unfinished run at step" in done.log, done.log
    ours, theirs = (
        [point["nats_per_char"] for point in contents(trainee.resume)["history"]] for trainee in (user, straight)
    )
    assert ours == pytest.approx(theirs, abs=0.05)  # a GPU adds in another order every time


def test_a_loss_that_is_no_number_is_seen(user: Trainee) -> None:
    done = user.train("--max_steps", "60", "--log_interval", "5", "--learning_rate", "1e36")
    assert done.code == ExitCode.DIVERGED and "the learning rate" in done.log, done.log


def test_a_batch_too_large_for_the_gpu_is_refused_in_one_sentence(user: Trainee) -> None:
    done = user.train("--batch_size", "1048576", "--d_model", "1024", "--max_steps", "1")
    assert done.code == ExitCode.OUT_OF_MEMORY and "choose a smaller --batch_size" in done.log, done.log


def test_more_processes_than_gpus_are_refused(user: Trainee) -> None:
    too_many = ["--standalone", "--nproc_per_node", str(torch.cuda.device_count() + 1)]
    done = ended(torchrun(user, too_many, "--mode", "train", "--data_path", "text.txt", *TINY, "--max_steps", "1"))
    assert done.code != 0 and "--device cpu" in done.log
    assert f"process {torch.cuda.device_count()} would need a GPU of its own" in done.log, done.log


@pytest.mark.parametrize("source_length", [12, 5, 0])
def test_logits_and_gradients_are_those_of_the_cpu(source_length: int) -> None:
    model = small_model()
    on_gpu = copy.deepcopy(model).cuda()
    source, target = ids(3, source_length), ids(3, 20)
    logits = model(source, target)
    ours = on_gpu(source.cuda(), target.cuda())
    torch.testing.assert_close(ours.cpu(), logits, atol=1e-2, rtol=1e-2)
    for result in (logits, ours):
        result.square().mean().backward()
    for (name, weight), other in zip(model.named_parameters(), on_gpu.parameters(), strict=True):
        if weight.grad is not None:
            assert other.grad is not None, name
            far = (other.grad.cpu() - weight.grad).norm() / weight.grad.norm()
            assert far < 1e-2, (name, far)


def test_the_gpu_writes_what_the_cpu_writes() -> None:
    model = small_model()
    on_cpu = model.generate(ids(4, 9), 50, temperature=0.0)
    on_gpu = model.cuda().generate(ids(4, 9).cuda(), 50, temperature=0.0)
    agreeing = (on_gpu.cpu() == on_cpu).float().mean()
    assert agreeing > 0.8, "but for a near tie, after which a row goes its own way"


def test_matrices_move_on_a_gpu_as_on_a_cpu() -> None:
    torch.manual_seed(3)
    starts, gradients = ([torch.randn(*shape) for shape in [(32, 32), (96, 32), (8, 32)]] for _ in range(2))
    moved = []
    for device in ("cpu", "cuda"):
        weights = [torch.nn.Parameter(start.to(device, copy=True)) for start in starts]
        muon = BatchedMuon(weights, lr=0.1)
        for _ in range(3):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.to(device, copy=True)
            muon.step()
        moved.append([weight.detach().cpu() - start for weight, start in zip(weights, starts, strict=True)])
    for ours, theirs in zip(*moved, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def as_only_process(user: Trainee, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Settings:
    """Settings of a run on the GPU, in a process that torchrun might have started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    args = read_settings([*TINY, "--device", "cuda", "--max_steps", "60", "--model_path", str(user.model)])
    return replace(resolve_settings(args, user.text), **changes)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nccl_takes_what_a_group_of_gpus_would_send(
    parallel: str, precision: str, user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, so that nothing is sent; but FSDP, DistributedDataParallel and all-gather give nccl their calls."""
    settings = as_only_process(user, monkeypatch, parallel=parallel, precision=precision)
    corpus = load_corpus(settings.data_path, 24)
    with process_group("cuda"):
        trainer = Trainer(suited_to(corpus, settings), corpus)
        if parallel == "ddp":
            trainer.forward = trainer.distributed = torch.nn.parallel.DistributedDataParallel(
                trainer.working.model, find_unused_parameters=True
            )
        outcome = trainer.train()
        joined = torch.empty(2, 3, device="cuda")
        torch.distributed.all_gather_single(joined, torch.ones(2, 3, device="cuda"))
        assert joined.eq(1).all()
        del trainer
    assert outcome.evaluation is not None and outcome.evaluation.nats_per_char < 2.5
