"""Prompt -> text, in one way for --mode generate, the sample after training and the model card's example."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.text_encoding import decode
from charseq2seq.vocabulary import CharVocabulary

if TYPE_CHECKING:
    from torch import Tensor

    from encoder_decoder_transformer import Transformer

_LARGEST_PROMPT = 100_000_000  # bytes

# Parameters. A GPU takes milliseconds for a character, however small the model (benchmarks/LOG.md).
_LARGEST_FOR_A_CPU = 4_000_000


@dataclass(frozen=True)
class Sampling:
    """How the next character is sampled."""

    temperature: float = 0.8  # 0 takes the likeliest; 1 samples from the model's own distribution
    top_k: int | None = None  # sample from the k likeliest
    top_p: float | None = None  # sample from the fewest with this total probability
    seed: int = 1337  # the same seed gives the same text on the same machine

    def options(self) -> dict[str, Any]:
        """All but the seed, as keyword arguments of `Transformer.stream`."""
        return {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}


def read_prompt(path: Path, encoding: str | None = None) -> str:
    """A prompt from a file, which may be empty, or from stdin (`-`); a SuiteError if it is no text, or too long."""
    name = "the prompt on stdin" if str(path) == "-" else f"the prompt {path}"
    try:
        # A pipe or a device may have no end.
        with os.fdopen(0, "rb", closefd=False) if str(path) == "-" else path.open("rb") as file:
            content = file.read(_LARGEST_PROMPT + 1)
    except OSError as error:
        problem = f"{name} cannot be read: {error.strerror or error}; check --prompt_file."
        raise SuiteError(problem, ExitCode.NO_INPUT) from error
    if len(content) > _LARGEST_PROMPT:
        problem = f"{name} has more than {_LARGEST_PROMPT:,} bytes; the model reads only its end, give that."
        raise SuiteError(problem, ExitCode.BAD_DATA)
    return "".join(decode([content, b""], name, encoding))


def known_prompt(vocabulary: CharVocabulary, prompt: str, unknown: Literal["error", "skip"]) -> str:
    """The prompt in the vocabulary's normal form; unknown characters are refused ("error") or left out ("skip")."""
    (prompt,) = vocabulary.in_known_form([prompt], "the prompt")
    if unknown == "error":
        vocabulary.encode(prompt)  # refuses and names them
    return prompt.translate(dict.fromkeys(map(ord, vocabulary.unknown_characters(prompt))))


def is_small(model: Transformer) -> bool:
    """Whether a CPU generates a single text faster than a GPU."""
    return sum(weight.numel() for weight in model.parameters()) <= _LARGEST_FOR_A_CPU


class TextGenerator:
    """Prompt -> text.

    On a CPU `NumpyDecoder` generates, elsewhere PyTorch. Both give the same text for a seed, except where rounding
    decides between two characters; on one machine a seed is always the same text.

    Args:
        model: on the device that generates; its weights must not change meanwhile.
        vocabulary: the one that the model was trained with.
    """

    def __init__(self, model: Transformer, vocabulary: CharVocabulary) -> None:
        from charseq2seq.device import suitable_kernels
        from charseq2seq.numpy_decoder import NumpyDecoder

        model.use_kernels(suitable_kernels(model.device.type))
        self.decoder: Any = NumpyDecoder(model) if NumpyDecoder.supports(model) else model
        self.vocabulary = vocabulary

    def stream(self, prompt: str, num_chars: int, sampling: Sampling) -> Iterator[str]:
        """Generate characters after a prompt, which is not repeated, one at a time; memory does not grow with them.

        Args:
            prompt: characters of the vocabulary only, see `known_prompt`; may be empty.
            num_chars: how many to generate.
            sampling: its seed is this text's own, no global random state is used or changed.
        """
        import torch

        generator = torch.Generator().manual_seed(sampling.seed)
        for token in self.decoder.stream(self._source(prompt), num_chars, **sampling.options(), generator=generator):
            yield self.vocabulary.decode([int(token)])

    def samples(self, prompt: str, num_chars: int, sampling: Sampling, number: int) -> Iterator[str]:
        """Several texts after a prompt, those of `stream` with seeds that count up; a GPU generates all at once."""
        import torch

        seeds = range(sampling.seed, sampling.seed + number)
        if self.decoder.device.type == "cpu":
            yield from (self.generate(prompt, num_chars, replace(sampling, seed=seed)) for seed in seeds)
            return
        source = self._source(prompt).expand(number, -1)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        tokens = self.decoder.generate(source, num_chars, **sampling.options(), generator=generators)
        yield from map(self.vocabulary.decode, tokens.tolist())

    def generate(self, prompt: str, num_chars: int, sampling: Sampling) -> str:
        """All of `stream` at once."""
        return "".join(self.stream(prompt, num_chars, sampling))

    def _source(self, prompt: str) -> Tensor:
        import torch

        return torch.from_numpy(self.vocabulary.encode(prompt)).long().to(self.decoder.device)[None]
