"""Prompt -> text, streamed.

Works for a prompt of any length, none included, and writes text of any length in constant memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.vocabulary import CharVocabulary, describe_character

if TYPE_CHECKING:
    from charseq2seq.numpy_decoder import NumpyDecoder
    from encoder_decoder_transformer import Transformer


_LARGEST_PROMPT = 100_000_000  # bytes

# Parameters. A GPU takes milliseconds for a character, however small the model (benchmarks/LOG.md).
_LARGEST_FOR_A_CPU = 15_000_000


@dataclass(frozen=True)
class Sampling:
    """How the next character is chosen.

    Attributes:
        temperature: 0 takes the likeliest; 1 samples from the model as it is.
        top_k, top_p: choose among the k likeliest, or among the fewest with this total probability; None for all.
        seed: the same seed gives the same text on the same machine.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1337


def read_prompt(path: Path) -> str:
    """A prompt from a UTF-8 file; CRLF becomes LF, the file may be empty.

    Raises:
        SuiteError: it cannot be read, is not UTF-8, or is endless.
    """
    try:
        with path.open("rb") as file:  # a pipe will do, and /dev/zero must end
            content = file.read(_LARGEST_PROMPT + 1)
        if len(content) > _LARGEST_PROMPT:
            raise SuiteError(
                f"the prompt {path} has more than {_LARGEST_PROMPT:,} bytes; the model reads only its end, give that.",
                ExitCode.BAD_DATA,
            )
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise SuiteError(
            f"the prompt {path} is not UTF-8 (byte offset {error.start:,}); convert it.", ExitCode.BAD_DATA
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise SuiteError(
            f"the prompt {path} cannot be read: {reason}; check --prompt_file.", ExitCode.NO_INPUT
        ) from error


def known_prompt(vocabulary: CharVocabulary, prompt: str, unknown: Literal["error", "skip"]) -> str:
    """The prompt, without the characters that the vocabulary lacks.

    Raises:
        SuiteError: there are such characters and `unknown` is "error"; all are listed with their code points.
    """
    missing = vocabulary.unknown_characters(prompt)
    if missing and unknown == "error":
        listed = ", ".join(describe_character(character) for character in missing)
        raise SuiteError(
            f"the prompt has {len(missing)} character{'s' * (len(missing) > 1)} that the model never saw: {listed}; "
            "leave them out or add --unknown skip.",
            ExitCode.BAD_DATA,
        )
    return prompt.translate(dict.fromkeys(map(ord, missing)))


def is_small(model: Transformer) -> bool:
    """Whether a CPU writes a single text faster than a GPU."""
    return sum(weight.numel() for weight in model.parameters()) <= _LARGEST_FOR_A_CPU


def fastest_writer(model: Transformer) -> Transformer | NumpyDecoder:
    """What writes a single text fastest: on a CPU not PyTorch, see `NumpyDecoder`."""
    from charseq2seq.numpy_decoder import NumpyDecoder

    return NumpyDecoder(model) if model.device.type == "cpu" else model


def stream_text(
    model: Transformer | NumpyDecoder, vocabulary: CharVocabulary, prompt: str, num_chars: int, sampling: Sampling
) -> Iterator[str]:
    """Write `num_chars` characters after a prompt of known characters, one at a time.

    Args:
        model: or its `fastest_writer`, whose texts are the same but for rare ties in rounding.

    The model's device is used; the seed is the stream's own, no global random state is touched.
    """
    import torch

    device = model.device
    generator = torch.Generator(device=device).manual_seed(sampling.seed)
    source = torch.from_numpy(vocabulary.encode(prompt)).long().to(device)[None]
    tokens = model.stream(
        source,
        num_chars,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        generator=generator,
    )
    texts = [vocabulary.decode([index]) for index in range(len(vocabulary))]
    for token in tokens:
        yield texts[int(token)]


def generate_text(
    model: Transformer | NumpyDecoder, vocabulary: CharVocabulary, prompt: str, num_chars: int, sampling: Sampling
) -> str:
    """All of `stream_text` (which see) at once, without the prompt."""
    return "".join(stream_text(model, vocabulary, prompt, num_chars, sampling))
