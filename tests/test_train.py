"""train -> evaluate -> generate at the command line, on a text and a model so small that it takes seconds."""

from __future__ import annotations

import json
import math

import pytest
import threadpoolctl  # type: ignore[import-untyped]
import torch

from charseq2seq.checkpoint import load_checkpoint
from charseq2seq.device import choose_precision, use_threads
from charseq2seq.vocabulary import CharVocabulary
from tests.train_client import TINY_SIZES, Done, Trainee, tiny_text
from tests.warm_client import WarmClient
from train_transformer import main

Learned = tuple[Trainee, Done]


@pytest.fixture(scope="module")
def learned(client: WarmClient, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """A user with a model that has learned something, and how the training ended."""
    trainee = Trainee(tmp_path_factory.mktemp("learned"))
    done = client.train(trainee, "--max_steps", "150", "--log_interval", "50", "--learning_rate", "0.05")
    assert done.code == 0, done.log
    return trainee, done


# --- train


def test_a_run_says_first_what_it_is_going_to_do(learned: Learned) -> None:
    _, done = learned
    text, gpu = tiny_text(), torch.cuda.is_available()
    for expected in (
        f"text: text.txt, {len(text):,} characters, {len(set(text))} distinct",
        "sha256: ",
        "parameters (embedding ",
        "device cuda" if gpu else "device cpu: no GPU found",
        "precision bf16" if gpu else choose_precision("auto", "cpu")[1],
        "threads 1: OMP_NUM_THREADS",
        "run: 150 steps, batches of 4 x 16 characters",
        "files: transformer_model.pth when the run ends, transformer_model.resume.pth to continue it",
    ):
        assert expected in done.log
    assert done.log.index("text: ") < done.log.index("step ")


def test_a_run_ends_with_text_figures_and_what_to_do_next(learned: Learned) -> None:
    _, done = learned
    *sample, last = done.out.splitlines()
    report = json.loads(last)
    assert report["outcome"] == "finished" and report["exit_code"] == 0 and report["steps"] == 150
    assert report["model_path"] == "transformer_model.pth" and report["duration_seconds"] > 0
    prompt = tiny_text().partition("\n")[0]
    assert "\n".join(sample).startswith(prompt) and len("\n".join(sample)) == len(prompt) + 500
    assert "--mode generate" in done.log and "push_to_huggingface.py" in done.log
    assert "chars/s" in done.log and "left" in done.log


def test_the_model_has_learned_something(learned: Learned) -> None:
    _, done = learned
    text = tiny_text()
    validation = text[int(len(text) * 0.9) :]
    unigram = -sum(math.log(text.count(character) / len(text)) for character in validation) / len(validation)
    assert done.report["nats_per_char"] < 0.6 * unigram
    assert done.report["bits_per_char"] == pytest.approx(done.report["nats_per_char"] / math.log(2))


def test_the_model_file_stands_alone_and_tells_of_no_machine(learned: Learned) -> None:
    trainee, done = learned
    checkpoint = load_checkpoint(trainee.model)
    assert checkpoint.metrics["nats_per_char"] == done.report["nats_per_char"]
    assert checkpoint.training_args["data"] == "text.txt" and checkpoint.config["d_model"] == TINY_SIZES["d_model"]
    assert checkpoint.corpus["characters"] == len(tiny_text())
    assert {point["step"] for point in checkpoint.metrics["history"]} >= {75, 150}
    assert str(trainee.home).encode() not in trainee.model.read_bytes()


def test_weight_decay_can_be_asked_for(learned: Learned, client: WarmClient, user: Trainee) -> None:
    assert "weight decay 3, seed" in client.train(user, "--max_steps", "60", "--weight_decay", "3").log
    decayed, learnt = (load_checkpoint(path).model_state_dict for path in (user.model, learned[0].model))
    queries = [name for name in learnt if name.endswith("query.weight")]
    assert sum(float(decayed[n].norm()) for n in queries) < 0.5 * sum(float(learnt[n].norm()) for n in queries)


# --- evaluate and generate


def test_evaluate_computes_as_the_model_was_trained(client: WarmClient, user: Trainee) -> None:
    done = client.train(user, "--max_steps", "20", "--precision", "fp32")
    facts = json.loads(client.run(user.home, "--mode", "evaluate", "--data_path", "text.txt").out)
    assert facts["nats_per_char"] == pytest.approx(done.report["nats_per_char"], abs=1e-9)


def test_evaluate_scores_the_validation_split_or_another_text(learned: Learned, client: WarmClient) -> None:
    trainee, done = learned
    own = client.run(trainee.home, "--mode", "evaluate", "--data_path", "text.txt")
    facts = json.loads(own.out)
    assert own.code == 0 and facts["split"] == "validation"
    assert facts["nats_per_char"] == pytest.approx(done.report["nats_per_char"], abs=1e-6)
    assert facts["characters"] == len(tiny_text()) - int(len(tiny_text()) * 0.9)
    text = "ALL: Speak, Ünder the ships!\n"
    (trainee.home / "other.txt").write_text(text)
    other = client.run(trainee.home, "--mode", "evaluate", "--data_path", "other.txt")
    facts = json.loads(other.out)
    skipped = sum(character not in tiny_text() for character in text)
    assert facts["split"] == "all" and facts["skipped_characters"] == skipped > 0
    assert facts["characters"] == len(text) - skipped
    assert "U+00DC LATIN CAPITAL LETTER U WITH DIAERESIS" in other.log
    refused = client.run(trainee.home, "--mode", "evaluate", "--data_path", "other.txt", "--unknown", "error")
    assert refused.code == 65 and "U+00DC" in refused.log and refused.out == ""


def test_generate_writes_any_length_after_any_prompt(learned: Learned, client: WarmClient) -> None:
    trainee, _ = learned
    known = CharVocabulary(sorted(set(tiny_text())))
    long_prompt = "ALL:\nWe sail, we sail! " * 10
    (trainee.home / "prompt.txt").write_text(long_prompt)
    for arguments, prompt, length in (
        (["--num_chars", "100"], "", 100),
        (["--prompt", "ALL:", "--num_chars", "0"], "ALL:", 0),
        (["--prompt_file", "prompt.txt", "--num_chars", "50", "--top_k", "3", "--top_p", "0.9"], long_prompt, 50),
    ):
        done = client.run(trainee.home, "--mode", "generate", *arguments)
        assert done.code == 0 and done.out.startswith(prompt) and len(done.out) == len(prompt) + length + 1, done.log
        assert not known.unknown_characters(done.out)


def test_the_same_seed_gives_the_same_text(learned: Learned, client: WarmClient) -> None:
    home = learned[0].home
    command = ["--mode", "generate", "--prompt", "ALL:", "--num_chars", "80", "--num_samples", "2"]
    one, same, other = (client.run(home, *command, "--seed", seed).out for seed in ("1", "1", "7"))
    first, _, second = one.partition(f"\n{'-' * 40}\n")
    assert one == same != other and len(first) == 84 and len(second) == 85 and first != second[:-1]
    greedy = [client.run(home, *command, "--seed", seed, "--temperature", "0").out for seed in ("1", "2")]
    assert greedy[0] == greedy[1]


def test_generate_computes_with_one_thread_unless_asked_for_more(learned: Learned) -> None:
    command = ["--mode", "generate", "--model_path", str(learned[0].model), "--num_chars", "5"]
    try:
        for more, expected in ((["--num_threads", "2"], 2), ([], 1)):
            assert main([*command, *more]) == 0
            blas = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
            assert {torch.get_num_threads(), *blas} == {expected}
    finally:
        use_threads(1)
