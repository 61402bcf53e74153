"""The one protocol by which loss is measured.

Every character is scored exactly once, in windows of `target_length`, each given the `source_length` characters
before it: a character has between `source_length` and `source_length + target_length` characters of context (fewer
only at the beginning of a text). The last window may be short. Nothing is sampled, nothing dropped out.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charseq2seq.checkpoint import Checkpoint
from charseq2seq.console import log
from charseq2seq.corpus import Ids, Text, read_text
from charseq2seq.device import torch_dtype
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.training.processes import ALONE, Group
from charseq2seq.vocabulary import describe_unknown
from charseq2seq.windows import gather, ids_on_device, tile
from encoder_decoder_transformer import Transformer

LONGEST_BEGINNING = 1_000  # characters: a text with the same ones is the training text, continued or changed
_BATCH = 32  # windows that are scored at once: evaluating must not need more memory than training


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


def summed_loss(model: nn.Module, ids: Tensor, starts: Tensor, source_length: int, target_length: int) -> Tensor:
    """The negative log likelihoods of the targets that begin at `starts`, added up, in nats."""
    source, target = gather(ids, starts.to(ids.device), source_length, target_length)
    return F.cross_entropy(model(source, target).flatten(0, 1), target.flatten(), reduction="sum")


def evaluate(
    model: Transformer, ids: Ids | Tensor, first: int = 0, last: int | None = None, group: Group = ALONE
) -> Evaluation:
    """Score the characters `first` to `last` (exclusive; None: the end) of a text.

    Args:
        model: in the precision it was trained in; its training mode is kept.
        ids: the text, (characters,), or what `ids_on_device` makes of it; what stands before `first` is context.
        group: the processes that share the work; each has the model and the text, and all get the same result.
    """
    last = len(ids) if last is None else last
    ids = ids if isinstance(ids, torch.Tensor) else ids_on_device(ids, model.device)
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64 if ids.device.type != "mps" else torch.float32, device=ids.device)
    with torch.inference_mode():
        batches = tile(first, last, model.source_length, model.target_length, _BATCH)
        for batch in itertools.islice(batches, group.rank, None, group.size):
            total += summed_loss(model, ids, *batch)
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

    A text that begins with the training text is scored from the end of its training part on. Characters that the
    vocabulary lacks are refused (`unknown` "error"), or left out and counted ("skip") unless most of them are unknown.

    Returns:
        `Evaluation.facts()`, with the text's name and sha256, the split, and the number of skipped characters.
    """
    text, vocabulary = read_text(path, encoding), checkpoint.vocabulary()
    pieces = vocabulary.in_known_form(text.pieces, text.name)
    if pieces is not text.pieces:
        text = replace(text, pieces=pieces, alphabet="".join(sorted(set().union(*pieces))))
    if unknown == "error":
        vocabulary.encode(text.alphabet)  # lists the characters that it lacks
    elif missing := vocabulary.unknown_characters(text.alphabet):
        log(f"note: {text.name} has {describe_unknown(missing)}; they are left out.")
    ids = vocabulary.encode_pieces(text.pieces)
    skipped = text.characters - len(ids)
    if skipped >= len(ids):
        raise SuiteError(
            f"the model never saw the characters of most of {path} ({skipped:,} of {text.characters:,}), so a loss on "
            f"the others is no measure; give a text like the one it was trained on, {checkpoint.corpus['name']}.",
            ExitCode.BAD_DATA,
        )
    first, split = _unseen_part(text, len(ids), checkpoint.corpus)
    model = checkpoint.build_model().set_precision(torch_dtype(precision)).to(device)
    return {
        **evaluate(model, ids, first).facts(),
        "text": text.name,
        "sha256": text.sha256,
        "split": split,
        "skipped_characters": skipped,
    }


def _unseen_part(text: Text, characters: int, trained_on: Mapping[str, Any]) -> tuple[int, str]:
    """Where the part of a text begins that the model was not trained on, and the name of this split."""
    trained = trained_on["train_characters"]
    if text.sha256 == trained_on["sha256"]:
        return trained, "validation"
    if sha256_of_beginning(text.pieces, trained) != trained_on.get("beginning_sha256"):
        return 0, "all"
    begins = f"note: {text.name} begins as the text that the model was trained on"
    if characters <= trained:
        log(f"{begins}, and is no longer than its training part: this loss says nothing about other texts.")
        return 0, "training"
    log(f"{begins}; only what comes after the {trained:,} characters of its training part is scored.")
    return trained, "after the training part"


def sha256_of_beginning(pieces: Iterable[str], train_characters: int) -> str:
    """The sha256 of a text's first thousand characters in UTF-8, or of its training part if that is shorter."""
    count = min(LONGEST_BEGINNING, train_characters)
    beginning = "".join(itertools.islice(itertools.chain.from_iterable(pieces), count))
    return hashlib.sha256(beginning.encode()).hexdigest()


def find_own_text(trained_on: Mapping[str, Any], folder: Path) -> Path:
    """The text that a model was trained on: the default text, or a file of its name here or beside the model.

    A SuiteError says that it is in neither place, or that the default text cannot be made.
    """
    from data import SHA256
    from data.prepare import prepare

    name, sha256 = trained_on["name"], trained_on["sha256"]
    if sha256 == SHA256["shakespeare"]:
        return prepare()
    for path in (Path(name), folder / name):
        with contextlib.suppress(SuiteError):  # another file of that name
            if path.name == name and path.exists() and read_text(path).sha256 == sha256:
                return path
    raise SuiteError(
        f"the model was trained on {name} (sha256 {sha256[:12]}...), which is neither here nor beside it; name it with "
        "--data_path, or another text.",
        ExitCode.NO_INPUT,
    )
