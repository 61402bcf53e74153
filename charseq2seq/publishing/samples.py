"""Text that a checkpoint really wrote, for its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from charseq2seq.checkpoint import Checkpoint
from charseq2seq.generation import Sampling, TextGenerator

NUM_CHARS = 240
TEMPERATURES = (0.5, 0.9)
SEED = 1337


@dataclass(frozen=True)
class Sample:
    """A piece of text, prompt included, and the temperature it was written at."""

    temperature: float
    prompt: str
    text: str


def is_shakespeare(corpus: Mapping[str, Any]) -> bool:
    """Whether a text is one that `data/prepare.py` makes; translations have licences and languages of their own."""
    return corpus.get("name") in {"shakespeare.txt", "tinyshakespeare.txt"}


def write_samples(checkpoint: Checkpoint) -> list[Sample]:
    """Let the checkpoint write one sample at each temperature, always with the same seed."""
    import torch

    vocabulary = checkpoint.vocabulary()
    generator = TextGenerator(checkpoint.build_model(), vocabulary)
    prompt = "ROMEO:" if is_shakespeare(checkpoint.corpus) else ""
    if vocabulary.unknown_characters(prompt):
        prompt = ""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of sums, and so the text, must not depend on the number of cores
    try:
        return [
            Sample(one, prompt, prompt + generator.generate(prompt, NUM_CHARS, Sampling(one, seed=SEED)))
            for one in TEMPERATURES
        ]
    finally:
        torch.set_num_threads(threads)
