"""The one protocol by which loss is measured.

Every character is scored exactly once, in windows of `target_length`, each given the `source_length` characters
before it: a character has between `source_length` and `source_length + target_length` characters of context (fewer
only at the beginning of a text). The last window may be short. Nothing is sampled, nothing dropped out.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from charseq2seq.checkpoint import Checkpoint
from charseq2seq.console import log
from charseq2seq.corpus import Ids, encode, read_text
from charseq2seq.device import torch_dtype
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.training.processes import ALONE, Group
from charseq2seq.vocabulary import describe_character
from charseq2seq.windows import gather, ids_on_device, tile

if TYPE_CHECKING:
    from torch import Tensor

    from encoder_decoder_transformer import Transformer

_LARGEST_TENSOR = 1 << 27  # numbers, on a GPU: evaluating must not need more memory than training


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a text."""

    nats_per_char: float  # mean negative log likelihood, natural logarithm
    characters: int  # that were scored
    max_context: int  # most characters that any of them was given
    protocol: str  # in one sentence

    def facts(self) -> dict[str, Any]:
        """The figures as a checkpoint and `--mode evaluate` give them."""
        return {
            **vars(self),
            "bits_per_char": self.nats_per_char / math.log(2),
            "perplexity": math.exp(min(self.nats_per_char, 690.0)),  # checkpoints hold figures up to 1e300
        }


def batch_size(model: Transformer) -> int:
    """Windows that are scored at once."""
    if model.device.type != "cuda":
        return 32
    widest = max(model.head.out_features, *(len(weight) for weight in model.decoder.parameters()))
    return max(1, min(256, _LARGEST_TENSOR // (widest * (model.source_length + model.target_length))))


def evaluate(
    model: Transformer, ids: Ids | Tensor, first: int = 0, last: int | None = None, group: Group = ALONE
) -> Evaluation:
    """Score the characters `first` to `last` (exclusive; None: the end) of a text.

    Args:
        model: in the precision it was trained in; its training mode is kept.
        ids: the text, (characters,), or what `ids_on_device` makes of it; what stands before `first` serves as
            context, unscored.
        group: the processes that share the work; each has the model and the text, and all get the same result.
    """
    import torch
    import torch.nn.functional as F

    last, size = len(ids) if last is None else last, batch_size(model)
    ids = ids if isinstance(ids, torch.Tensor) else ids_on_device(ids, model.device)
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64 if ids.device.type != "mps" else torch.float32, device=ids.device)
    with torch.inference_mode():
        batches = tile(first, last, model.source_length, model.target_length, size)
        for starts, source_length, target_length in itertools.islice(batches, group.rank, None, group.size):
            source, target = gather(ids, starts.to(ids.device), source_length, target_length)
            logits = model(source, target)
            total += F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
    model.train(was_training)
    return Evaluation(
        nats_per_char=group.sum(float(total))[0] / (last - first),
        characters=last - first,
        max_context=model.source_length + model.target_length,
        protocol=f"every character once, windows of {model.target_length} given the {model.source_length} characters "
        "before them, no sampling, no dropout",
    )


def evaluate_file(
    checkpoint: Checkpoint,
    path: Path,
    device: str,
    precision: str,
    unknown: Literal["error", "skip"],
    encoding: str | None = None,
) -> dict[str, Any]:
    """Score a text file: the validation split of the text that the model was trained on, all of any other.

    Args:
        checkpoint: the model.
        path: a text.
        device, precision, encoding: see `Settings`.
        unknown: "skip" leaves characters out that the vocabulary lacks, and counts them.

    Returns:
        `Evaluation.facts()`, with the text's name and sha256, the split, and the number of skipped characters.

    Raises:
        SuiteError: the text cannot be read or has nothing to score, or has unknown characters under "error".
    """
    text, vocabulary = read_text(path, encoding), checkpoint.vocabulary()
    missing = vocabulary.unknown_characters(text.alphabet)
    if missing and unknown == "skip":
        log(
            f"note: {text.name} has characters that the model never saw; they are left out: "
            + ", ".join(describe_character(character) for character in missing)
        )
    if unknown == "error":
        vocabulary.encode(text.alphabet)  # lists them
    ids = encode(text, vocabulary)
    own = text.sha256 == checkpoint.corpus.get("sha256")
    first = int(checkpoint.corpus["train_characters"]) if own else 0
    if not first < len(ids):
        raise SuiteError(f"{path} has no character that this model knows; give another text.", ExitCode.BAD_DATA)
    model = checkpoint.build_model().set_precision(torch_dtype(precision)).to(device)
    return {
        **evaluate(model, ids, first).facts(),
        "text": text.name,
        "sha256": text.sha256,
        "split": "validation" if own else "all",
        "skipped_characters": text.characters - len(ids),
    }
