"""Checkpoint -> the folder that goes to the Hub.

The same checkpoint gives the same bytes: nothing here knows the time, the machine, the user or a path. What can be
said about a model is said once, in the checkpoint; these files are its translations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import atomic_write, atomic_write_bytes, atomic_write_text
from charseq2seq.publishing.card import generate_samples, render_card
from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.hub import CARD, RECORD
from charseq2seq.publishing.training_curve import draw_training_curve

if TYPE_CHECKING:
    from charseq2seq.checkpoint import Checkpoint

MADE_BY = "charseq2seq"
CURVE = "training_curve.png"

LARGEST_TEXT = 10 << 20  # bytes; the Hub takes more only as LFS
LARGEST_FILE = 500 << 30  # bytes; the Hub takes no more at all
_LARGE_FORMATS = (".bin", ".safetensors")
_LONGEST_NAME = 100  # characters; ours are shorter

_HERE = Path(__file__).parent
_COPIED = {
    "encoder_decoder_transformer.py": _HERE.parents[1] / "encoder_decoder_transformer.py",
    "usage_example.py": _HERE / "published" / "usage_example.py",
    "requirements.txt": _HERE / "published" / "requirements.txt",
}


@dataclass(frozen=True)
class RepositoryFolder:
    """A complete folder.

    Attributes:
        path: where it is.
        record: the content of `training_args.json`; by it the suite recognises a repository of its own.
    """

    path: Path
    record: Mapping[str, Any]

    @property
    def names(self) -> list[str]:
        """The files to be published; others may lie beside them."""
        return list(self.record["files"])


def build_folder(checkpoint: Checkpoint, folder: Path, repo_id: str) -> RepositoryFolder:
    """Write the complete repository folder.

    Args:
        checkpoint: the model to publish.
        folder: where to; made if it is not there.
        repo_id: `owner/name`, for the examples in the card.

    Raises:
        SuiteError: the folder holds something else, or cannot be written.
    """
    from charseq2seq.vocabulary import vocabulary_files

    _claim(folder)
    texts = {
        "config.json": _json(checkpoint.config),
        **vocabulary_files(checkpoint.vocabulary()),
        **{name: path.read_text(encoding="utf-8") for name, path in _COPIED.items()},
    }
    curve = draw_training_curve(checkpoint.metrics)
    if curve is not None:
        atomic_write_bytes(folder / CURVE, curve)
    _write_weights(checkpoint.model_state_dict, folder)
    record = {
        "made_by": MADE_BY,
        "files": sorted([*texts, "pytorch_model.bin", "model.safetensors", CARD, RECORD, *([CURVE] if curve else [])]),
        "training_args": checkpoint.training_args,
        "metrics": checkpoint.metrics,
        "corpus": checkpoint.corpus,
        "environment": checkpoint.environment,
    }
    texts[RECORD] = _json(record)
    texts[CARD] = render_card(checkpoint, repo_id, generate_samples(checkpoint), CURVE if curve else None)
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return RepositoryFolder(folder, record)


def parse_record(text: str) -> dict[str, Any] | None:
    """A `training_args.json` of this suite's making, or None for anything else."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("made_by") != MADE_BY or not isinstance(record.get("metrics"), dict):
        return None
    files = record.get("files")
    return record if isinstance(files, list) and all(_is_file_name(name) for name in files) else None


def refuse_large_files(folder: RepositoryFolder) -> None:
    """Refuse what the Hub would refuse.

    Raises:
        PublishError: a file is too large.
    """
    for name in folder.names:
        size = (folder.path / name).stat().st_size
        limit = LARGEST_FILE if name.endswith(_LARGE_FORMATS) else LARGEST_TEXT
        if size > limit:
            raise PublishError("too_large", f"{name} has {size:,} bytes, {limit:,} are allowed")


def _is_file_name(name: Any) -> bool:
    """Whether it can be a file of the folder: a name with a folder in it could reach outside."""
    return isinstance(name, str) and Path(name).name == name and len(name) <= _LONGEST_NAME


def _claim(folder: Path) -> None:
    """Make the folder, and refuse one that holds anything else than an earlier one of ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = [entry.name for entry in folder.iterdir()]
    except OSError as error:
        reason = error.strerror or str(error)
        raise SuiteError(
            f"cannot make the folder {folder}: {reason}; choose another --output_dir.", ExitCode.CANNOT_CREATE
        ) from error
    if found and not _is_ours(folder):
        raise SuiteError(
            f"{folder} holds other files ({', '.join(sorted(found)[:3])} …); choose an empty --output_dir.",
            ExitCode.CANNOT_CREATE,
        )


def _is_ours(folder: Path) -> bool:
    """Whether a folder was made by this suite: other tools, too, write a file of the record's name."""
    try:
        return parse_record((folder / RECORD).read_text(encoding="utf-8")) is not None
    except (OSError, UnicodeDecodeError):
        return False


def _write_weights(state: Mapping[str, Any], folder: Path) -> None:
    """The same weights in both forms: PyTorch's, which the guide names, and safetensors, which cannot hold code."""
    import torch
    from safetensors.torch import save

    # Cloned, because a view would drag its whole storage along.
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}
    with atomic_write(folder / "pytorch_model.bin") as file:
        torch.save({"model_state_dict": weights}, file)
    atomic_write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))


def _json(content: Any) -> str:
    return json.dumps(_without_nan(content), indent=2) + "\n"


def _without_nan(content: Any) -> Any:
    """The same with null for what JSON has no number for, e.g. a loss that was not yet measured."""
    if isinstance(content, Mapping):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
