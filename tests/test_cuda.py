"""On an NVIDIA GPU the suite trains, stops, goes on, evaluates and writes as on a CPU; elsewhere this is skipped."""

from __future__ import annotations

import copy
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from charseq2seq.checkpoint import load_checkpoint, load_resume_state
from charseq2seq.device import choose_precision, suitable_kernels
from charseq2seq.errors import ExitCode
from charseq2seq.generation import Sampling, TextGenerator
from charseq2seq.training.cuda_graph import GraphedStep
from charseq2seq.training.optimization import set_learning_rates
from charseq2seq.training.processes import process_group
from charseq2seq.training.resume import new_state
from charseq2seq.training.trainer import Trainer
from encoder_decoder_transformer import Transformer, feed_forward, normalize_and_rotate, rotary_table
from tests.train_client import TINY, Done, Trainee, tiny_trainer, torchrun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")

# A low learning rate: a high one turns a GPU's rounding, which differs from run to run, into a difference.
LOW = ["--device", "cuda", "--max_steps", "60", "--learning_rate", "0.002", "--log_interval", "1000"]
STEPS = ["--max_steps", "150", "--eval_interval", "50", "--learning_rate", "0.05"]


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


def small_model(num_kv_heads: int = 1) -> Transformer:
    """A model with weights that are all at work."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 64, "num_heads": 4, "num_kv_heads": num_kv_heads, "num_decoder_layers": 2}
    model = Transformer(24, **sizes, d_ff=96, source_length=12, target_length=20)
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
        "--precision fp16 --gradient_checkpointing --accumulation_steps 2",
        "--precision bf16 --num_kv_heads 2",
    ],
)
def test_it_learns_as_on_the_cpu(options: str, user: Trainee, by_cpu: Mapping[str, Any]) -> None:
    done = user.train(*STEPS, "--device", "cuda", *options.split())
    assert loss(done) == pytest.approx(by_cpu["nats_per_char"], abs=0.1)
    train_loss = load_checkpoint(user.model).metrics["train_nats_per_char"]
    assert train_loss == pytest.approx(by_cpu["train_nats_per_char"], abs=0.1)


def test_a_loss_that_is_no_number_is_seen(user: Trainee) -> None:
    done = user.train("--max_steps", "60", "--log_interval", "5", "--learning_rate", "1e36")
    assert done.code == ExitCode.DIVERGED and "the learning rate" in done.log, done.log


def test_a_batch_too_large_for_the_gpu_is_refused_in_one_sentence(user: Trainee) -> None:
    done = user.train("--batch_size", "1048576", "--d_model", "1024", "--max_steps", "1")
    assert done.code == ExitCode.OUT_OF_MEMORY and "choose a smaller --batch_size" in done.log, done.log


def test_more_processes_than_gpus_are_refused(user: Trainee) -> None:
    too_many = ["--standalone", "--nproc_per_node", str(torch.cuda.device_count() + 1)]
    process = torchrun(user, too_many, "--mode", "train", "--data_path", "text.txt", *TINY, "--max_steps", "1")
    _, log = process.communicate()  # torchrun tells of failures with tracebacks of its own
    assert process.returncode != 0 and "--device cpu" in log
    assert f"process {torch.cuda.device_count()} would need a GPU of its own" in log, log


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("source_length", [12, 5, 0])
def test_logits_and_gradients_are_those_of_the_cpu(source_length: int, num_kv_heads: int) -> None:
    model = small_model(num_kv_heads)
    on_gpu = copy.deepcopy(model).cuda()
    on_gpu.use_kernels(suitable_kernels("cuda"))
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


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("source_length", [12, 5, 0])
def test_the_gpu_generates_what_the_cpu_generates(source_length: int, num_kv_heads: int) -> None:
    """The likeliest tokens, up to where two are so close that rounding decides, as one text and as several."""
    model, source = small_model(num_kv_heads), ids(8, source_length)
    on_cpu = model.generate(source, 20, temperature=0.0)
    logits = model(source, on_cpu).detach()
    logits[..., model.start_id] = -torch.inf
    best = logits.topk(2, dim=-1).values
    certain = (best[..., 0] - best[..., 1] > 0.05).cummin(dim=1).values
    assert certain.float().mean() > 0.4, "there is something to compare"
    model.cuda()
    model.use_kernels(suitable_kernels("cuda"))
    together = torch.stack(list(model.stream(source.cuda(), 20, temperature=0.0)), dim=1).cpu()
    alone = torch.cat([model.generate(row[None].cuda(), 20, temperature=0.0).cpu() for row in source])
    for generated in (together, alone):
        assert torch.equal(generated[certain], on_cpu[certain])
    longer = model.generate(source.cuda(), 50, temperature=0.0).cpu()  # two more sources
    assert torch.equal(longer[:, :20], together) and longer.shape == (8, 50)


@pytest.mark.parametrize("flags", ["--precision fp32", "--precision bf16", "--precision bf16 --dropout 0.3"])
def test_captured_steps_are_the_plain_ones(flags: str, user: Trainee) -> None:
    captured, plain = (tiny_trainer(user, *LOW, *flags.split()) for _ in range(2))
    assert isinstance(captured.step, GraphedStep)
    plain.step = plain._compute
    losses = losses_of(captured, 50)
    assert losses == pytest.approx(losses_of(plain, 50), abs=2e-3) and losses[-1] < losses[0]
    assert len(captured.step.graphs) > 2, "several source lengths were replayed"


def losses_of(trainer: Trainer, steps: int) -> list[float]:
    """The losses of the next steps."""
    losses = []
    for _ in range(steps):
        trainer.train_step()
        losses.append(float(trainer.unread_losses[-1]))
    return losses


def test_a_captured_step_drops_other_features_every_time(user: Trainee) -> None:
    trainer = tiny_trainer(user, *LOW, "--dropout", "0.5", "--learning_rate", "1e-30", "--weight_decay", "0")
    torch.nn.init.normal_(trainer.master.head.weight)
    trainer.working.refresh()
    starts, length = trainer.sampler.next_batch()
    losses = []
    for seed in (1, 2, 3, 4, 3):
        torch.manual_seed(seed)
        losses.append(float(trainer.step(starts.pin_memory(), length)))
    assert len({round(loss, 5) for loss in losses[:4]}) == 4, "the same batch and weights"
    assert losses[4] == pytest.approx(losses[2], abs=1e-4), "the seed decides"


@pytest.mark.parametrize("flags", ["--precision fp32", "--precision bf16 --dropout 0.2", "--precision bf16"])
def test_a_captured_run_goes_on_from_its_file_as_if_never_stopped(flags: str, user: Trainee, tmp_path: Path) -> None:
    arguments = [*LOW, *flags.split()]
    straight, first = tiny_trainer(user, *arguments), tiny_trainer(user, *arguments)
    expected = losses_of(straight, 50)
    assert losses_of(first, 25) == pytest.approx(expected[:25], abs=1e-3)
    first.save_resume(finished=False)
    losses_of(first, 3)  # what happens after the save is lost
    state = new_state(first.state.identity, load_resume_state(user.resume))
    assert state.step == 25 and all(weight.device.type == "cpu" for weight in state.weights.values())
    second = Trainer(first.settings, first.corpus, state)
    assert isinstance(second.step, GraphedStep) and not second.step.graphs
    assert losses_of(second, 25) == pytest.approx(expected[25:], abs=1e-3)
    assert second.step.graphs


def test_learning_rates_reach_a_captured_step(user: Trainee) -> None:
    """A rate that was a number at the capture would be that number for ever."""
    trainer = tiny_trainer(user, *LOW)
    starts, length = trainer.sampler.next_batch()
    changes = []
    for progress in (0.1, 0.1, 0.1, 1.0, 0.1):
        set_learning_rates(trainer.optimizers, progress)
        before = [weight.detach().clone() for weight in trainer.master.parameters()]
        trainer.step(starts.pin_memory(), length)
        after = trainer.master.parameters()
        changes.append(sum(float((now - then).abs().sum()) for now, then in zip(after, before, strict=True)))
    assert changes[3] == 0 and min(changes[2], changes[4]) > 0


def test_steps_that_cannot_be_captured_say_why(user: Trainee) -> None:
    done = user.train("--max_steps", "2", "--device", "cuda", "--precision", "bf16", "--gradient_checkpointing")
    assert done.code == 0 and "not captured as a CUDA graph: gradient checkpointing" in done.log, done.log


@pytest.mark.parametrize("head_size", [64, 16, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compute_what_the_model_computes(head_size: int, dtype: torch.dtype) -> None:
    from charseq2seq import gpu_kernels  # needs Triton

    torch.manual_seed(1)
    exact = 1e-5 if dtype == torch.float32 else 3e-2
    table = rotary_table(9, head_size).cuda().to(dtype)
    for length in (9, 1, 0):
        x = torch.randn(3, length, 5, head_size, device="cuda", dtype=dtype, requires_grad=True)
        results = [of(x, table[:, :length]) for of in (normalize_and_rotate, gpu_kernels.normalize_and_rotate)]
        gradient = torch.randn_like(results[0])
        results += [torch.autograd.grad(result, x, gradient)[0] for result in results]
        torch.testing.assert_close(results[1], results[0], atol=exact, rtol=exact)
        torch.testing.assert_close(results[3], results[2], atol=10 * exact, rtol=10 * exact)
    x, up, down = (
        torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True) for shape in [(7, 16), (40, 16), (16, 40)]
    )
    for ours, theirs in zip(
        torch.autograd.grad(gpu_kernels.feed_forward(x, up, down).sum(), (x, up, down)),
        torch.autograd.grad(feed_forward(x, up, down).sum(), (x, up, down)),
        strict=True,
    ):
        assert (ours - theirs).norm() < 100 * exact * theirs.norm()
    ids, vectors = torch.randint(24, (4, 9), device="cuda"), torch.randn(24, 32, device="cuda", dtype=dtype)
    assert torch.equal(gpu_kernels.embedding(ids, vectors), torch.nn.functional.embedding(ids, vectors))


def test_several_samples_at_once_are_those_of_one_after_the_other(user: Trainee) -> None:
    assert user.train(*STEPS, "--num_kv_heads", "2").code == 0
    checkpoint = load_checkpoint(user.model)
    generator = TextGenerator(checkpoint.build_model().cuda(), checkpoint.vocabulary())
    together = list(generator.samples("ALL:", 60, Sampling(seed=5), 3))
    alone = [generator.generate("ALL:", 60, Sampling(seed=seed)) for seed in (5, 6, 7)]
    assert len(set(together)) == 3 and sum(map(str.__eq__, together, alone)) >= 2, "except for a near tie"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nccl_takes_what_a_group_of_gpus_would_send(
    precision: str, user: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, so that nothing is sent; but DistributedDataParallel gives nccl its calls."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with process_group("cuda"):
        trainer = tiny_trainer(user, "--device", "cuda", "--max_steps", "60", "--precision", precision)
        trainer.model = torch.nn.parallel.DistributedDataParallel(trainer.working.model, find_unused_parameters=True)
        trainer.step = trainer._compute
        outcome = trainer.train()
        del trainer
    assert outcome.evaluation is not None and outcome.evaluation.nats_per_char < 2.5
