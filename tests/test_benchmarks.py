"""Every benchmark for a CPU runs, with small sizes, and its protocols are what it says they are."""

from __future__ import annotations

import importlib.util
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.campaigns.same_before_and_after import losses, without_times
from benchmarks.machine import Contender, best_peer, compete, interleaved
from benchmarks.peers import NanoGPT, NanoGPTRecipe, Shape, count_parameters, train_nanogpt
from benchmarks.texts import ngram_bits
from benchmarks.time_to_loss import block_windows, parse_arguments, random_block_loss
from benchmarks.train_throughput import our_step, products_of
from charseq2seq.training.evaluation import evaluate
from encoder_decoder_transformer import Transformer
from tests.train_client import ROOT, TINY, TINY_SIZES, Trainee, tiny_text

# More layers in the decoder than in the encoder, as at the reference shape: not every peer takes that for granted.
SHAPE = Shape(**TINY_SIZES | {"num_decoder_layers": 2})
TINY_SHAPE = [*TINY, "--num_decoder_layers", "2"]


def benchmark(script: str, *arguments: str, home: Path) -> str:
    """What a benchmark prints; peers that are not installed are named on stderr."""
    command, environment = [sys.executable, f"{ROOT}/benchmarks/{script}", *arguments], Trainee(home).environment()
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Machine: " in done.stdout and "| --- |" in done.stdout
    if "throughput" in script:
        for distribution, name in {"transformers": "T5", "x-transformers": "XTransformer"}.items():
            there = importlib.util.find_spec(distribution.replace("-", "_")) is not None
            assert (name in done.stdout) == there
            assert (f"{distribution} is not installed" in done.stderr) != there
    return done.stdout


def row(table: str, name: str) -> list[str]:
    """The cells after the name in the only row of that name."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


@pytest.mark.slow
def test_train_throughput(tmp_path: Path) -> None:
    arguments = ["--rounds", "2", "--steps", "1", *TINY_SHAPE]
    printed = benchmark("train_throughput.py", *arguments, home=tmp_path).replace(",", "")
    parameters, fp32, bf16, fastest, of_the_limit, times = row(printed, "**ours**")
    assert int(parameters) == count_parameters(Transformer(**SHAPE.model()))
    assert min(int(fp32), int(bf16), int(fastest)) > 0 and of_the_limit.endswith("%") and float(times) > 0
    assert "nn.Transformer" in printed
    assert all(int(figure) > 0 for figure in row(printed, "products alone")[1:4])


def test_the_products_alone_are_all_that_a_step_has() -> None:
    step = our_step(Transformer(**SHAPE.model()), "bf16")
    source, target = SHAPE.random_batch()
    layers, shapes = 3, 4  # of matrices: square, keys' and values', into and out of the feed-forward block
    weights, attention, newton_schulz = layers * 6 * 3 + 3, layers * 6, shapes * 5 * 3  # the head's are 3 more
    assert len(products_of(step, source, target)) == weights + attention + newton_schulz


@pytest.mark.slow
def test_generate_throughput(tmp_path: Path) -> None:
    arguments = ["--rounds", "1", "--num_tokens", "20", "--streams", "1", "3", *TINY_SHAPE]
    printed = benchmark("generate_throughput.py", *arguments, home=tmp_path)
    one, three = printed.split("Batch of 3:")
    assert "One stream:" in one and row(one, "**ours, --mode generate**")
    assert row(one, "**ours, default model, --mode generate**")[0] != row(one, "**ours, --mode generate**")[0]
    assert "--mode generate" not in three and row(three, "**ours**") and row(three, "**ours, default model**")


@pytest.mark.slow
def test_time_to_loss(tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text(tiny_text(90))
    arguments = ["--data_path", "other.txt", "--minutes", "0.01", "--seeds", "3", "4", "--block", "24", "--blocks", "5"]
    arguments += ["--nanogpt", "--nanogpt_steps", "2", "--", *TINY, "--max_steps", "5"]
    printed = benchmark("time_to_loss.py", *arguments, home=tmp_path)
    assert printed.count("| **ours** |") == 2 and printed.count("| nanoGPT |") == 2
    seed, *_, unseen, blocks = [line for line in printed.splitlines() if "| **ours** |" in line][1].split("|")[2:-1]
    assert int(seed) == 4 and float(unseen) > 0 and float(blocks) > 0
    assert " ± " in row(printed, "**ours**, mean of 2")[-1]
    assert "nanoGPT's." in printed and "other.txt" in printed


@pytest.mark.slow
def test_startup_time(tmp_path: Path) -> None:
    arguments = ["--repeats", "1", "--characters", "500", "--data_path", "text.txt", *TINY_SHAPE]
    printed = benchmark("startup_time.py", *arguments, home=tmp_path)
    for name in ("--help", "a wrong argument", "first training step", "evaluation"):
        median, fastest, _ = row(printed, name)
        assert float(median) >= float(fastest) > 0


@pytest.mark.slow
def test_busy_machine(tmp_path: Path) -> None:
    arguments = ["--rounds", "1", "--steps", "2", "--neighbours", "0", "1", "--data_path", "text.txt"]
    printed = benchmark("busy_machine.py", *arguments, "--arguments", *TINY_SHAPE, home=tmp_path)
    quiet, busy = row(printed, "ours")
    assert ", 100% (" in quiet and re.match(r"[\d,]+, \d+% \(", busy)


@pytest.mark.slow
def test_push_time(tmp_path: Path) -> None:
    printed = benchmark("push_time.py", "--repeats", "1", home=tmp_path)
    bare, unproved, proved = (
        float(row(printed, name)[0]) for name in ("bare client", "without proofs", "with proofs and verification")
    )
    assert 0 < bare < unproved < proved


def test_measures_take_turns_and_the_first_round_is_dropped() -> None:
    clock = itertools.count()
    figures = interleaved({"a": lambda: float(next(clock)), "b": lambda: float(next(clock))}, 2)
    assert figures == {"a": [2.0, 4.0], "b": [3.0, 5.0]}


def test_a_system_counts_in_its_best_precision_and_way() -> None:
    slow = Contender("slow", 1, True, {"fp32": (lambda: 4.0,), "bf16": (lambda: 5.0, lambda: 2.0)})
    slower = Contender("slower", 1, True, {"fp32": (lambda: 3.0,)})
    fast = Contender("fast", 1, False, {"fp32": (lambda: 1.0,)})
    results, more = compete([slow, slower, fast], 100, 3, {"peak": lambda: 7.0})
    assert results[0].medians == {"fp32": 25.0, "bf16": 50.0} and results[0].best == results[0].fastest == 50.0
    assert best_peer(results).contender is slow and more == {"peak": [7.0] * 3}


@pytest.mark.parametrize(("block", "source", "target"), [(256, 64, 192), (256, 8, 16), (24, 64, 192), (20, 16, 5)])
def test_block_windows_score_every_character_once(block: int, source: int, target: int) -> None:
    scored: list[int] = []
    for start, split, first, end in block_windows(block, source, target):
        assert 0 <= start < split <= first < end <= block + 1
        assert split - start <= source and end - split <= target
        assert start == 0 or split - start == source
        scored += range(first, end)
        if source + target >= block:  # all that stands before it in the block, or as much as the model can take
            assert all(i - start >= min(i, source + target - 1) for i in range(first, end))
    assert scored == list(range(1, block + 1))


def small_nanogpt() -> tuple[NanoGPT, NanoGPTRecipe]:
    """A model of the recipe's kind, for blocks of 8."""
    torch.manual_seed(0)
    recipe = NanoGPTRecipe(num_layers=2, num_heads=2, d_model=16, block=8, batch_size=3, iterations=4, warmup=2)
    model = NanoGPT(20, recipe)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    return model, recipe


def test_random_blocks_are_nanogpt_s_own_protocol() -> None:
    model, recipe = small_nanogpt()
    ids = np.random.default_rng(0).integers(1, 20, recipe.block + 1, dtype=np.int32)  # only one block can be drawn
    text = torch.from_numpy(ids).long()
    with torch.no_grad():
        expected = F.cross_entropy(model.logits(text[None, :-1])[0], text[1:])
    loss = random_block_loss(cast("Transformer", model), ids, recipe.block, 2)
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_the_suite_s_protocol_scores_nanogpt_with_half_a_block_to_one_block_of_context() -> None:
    model, recipe = small_nanogpt()
    ids = np.random.default_rng(0).integers(1, 20, 30, dtype=np.int32)
    text, half = torch.from_numpy(ids).long(), recipe.block // 2
    losses = []
    for i in range(10, 30):
        start = i - (i - 10) % half - half - 1
        with torch.no_grad():
            losses.append(F.cross_entropy(model.logits(text[None, start:i])[0, -1], text[i]))
    expected = float(torch.stack(losses).mean())
    assert evaluate(cast("Transformer", model), ids, 10).nats_per_char == pytest.approx(expected, rel=1e-5)


def test_nanogpt_s_recipe() -> None:
    recipe = NanoGPTRecipe()
    assert count_parameters(NanoGPT(65, recipe)) - recipe.block * recipe.d_model == pytest.approx(0.80e6, rel=0.01)
    assert recipe.rate(0) < recipe.rate(50) < recipe.rate(100) == pytest.approx(1e-3)
    assert recipe.rate(recipe.iterations) == pytest.approx(1e-4)
    _, small = small_nanogpt()
    ids = np.random.default_rng(0).integers(1, 20, 100, dtype=np.int32)
    first, seconds = train_nanogpt(ids, 20, small, 5)
    again, _ = train_nanogpt(ids, 20, small, 5)
    assert seconds > 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_texts(tmp_path: Path) -> None:
    printed = benchmark("texts.py", "--texts", "prose", "--", *TINY, "--max_steps", "2", home=tmp_path)
    length, alphabet, xz, *_, ngram, default, parameters, _ = row(printed.replace(",", ""), "prose")
    assert (length, int(alphabet) > 30) == ("20000", True)
    assert 0 < float(ngram) < float(xz) < float(default.strip("*")) and int(parameters) > 0


def test_the_ngram_model_is_a_distribution() -> None:
    """What it gives all characters after the same context adds up to one, seen before or not."""
    text, alphabet = tiny_text(20), sorted(set(tiny_text(20)))
    for context in ("We sail", "ssss"):
        before = ngram_bits(text + context, len(text)) * len(context)
        bits = [ngram_bits(text + context + last, len(text)) * (len(context) + 1) - before for last in alphabet]
        assert sum(2**-figure for figure in bits) == pytest.approx(1.0)


def test_arguments_after_two_dashes_are_passed_on() -> None:
    args = parse_arguments(["--seeds", "1", "2", "--", "--d_model", "256"])
    assert args.seeds == [1, 2] and args.arguments == ["--d_model", "256"]
    assert parse_arguments(["--seeds", "1"]).arguments == []


@pytest.mark.slow
def test_scaling(tmp_path: Path) -> None:
    arguments = ["--megabytes", "0.2", "--rounds", "1", "--steps", "2", "--batch_size", "4", "--"]
    printed = benchmark("scaling.py", *arguments, *TINY, home=tmp_path)
    assert float(row(printed, "1 process")[2]) == 1.0 and float(row(printed, "2 processes, same batch")[2]) > 0
    losses = [float(row(printed, name)[3]) for name in ("1 process", "2 processes, same batch")]
    assert losses[0] == pytest.approx(losses[1], abs=0.01), "the same windows, shared or not"
    assert "GB/s (2 processes, gloo, loopback)" in printed and "512 GPUs, 64 nodes" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"], "its texts and models go when it ends"


@pytest.mark.slow
def test_recordings_of_a_checkout_are_compared(tmp_path: Path) -> None:
    script = [sys.executable, f"{ROOT}/benchmarks/campaigns/same_before_and_after.py"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*script, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("record", str(ROOT), "before.json", "--parts", "help").returncode == 0
    same = run("compare", "before.json", "before.json")
    assert same.returncode == 0 and same.stdout.startswith("The same: help.\nNot compared: train.")
    text = (tmp_path / "before.json").read_text()
    assert text.count("--max_steps N ") == 1 and "Traceback" not in text
    (tmp_path / "after.json").write_text(text.replace("--max_steps N ", "--most_steps N "))
    differs = run("compare", "before.json", "after.json")
    assert differs.returncode == 1 and "--- help > train_transformer.py > stdout" in differs.stdout
    assert re.findall(r"^    [-+] +(--\w+)", differs.stdout, re.MULTILINE) == ["--max_steps", "--most_steps"]


def test_a_recording_holds_losses_and_no_times() -> None:
    log = "2026-11-27 step 3 (25%): loss 4.1679 nats/char, 5,486 chars/s, 2s spent\n"
    log += "2026-11-27 step 6: validation 2.7134 nats/char, training 4.0883 (best so far), 3s spent\n"
    assert losses(log) == ["3 4.1679", "6 2.7134 4.0883"]
    facts = {"loss": 1.5, "training_seconds": 3.0, "history": [{"step": 1, "seconds": 2.0}], "characters_per_second": 9}
    assert without_times(facts) == {"loss": 1.5, "history": [{"step": 1}]}
    assert without_times(facts, 10.0)["history"] == [{"step": 1, "seconds": 10.0}]
