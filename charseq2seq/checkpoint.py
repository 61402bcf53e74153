"""`transformer_model.pth`: the one product of training and the one input of everything else.

It holds tensors and plain Python types only, so that `torch.load(..., weights_only=True)` reads it and no code in
a file can run. `load_checkpoint` trusts nothing: a damaged, foreign, newer or hostile file gives one sentence.
What resuming needs beyond it lies in a second file, `resume_path(model_path)`, written and read the same way.
"""

from __future__ import annotations

import pickle
import platform
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq import __version__
from charseq2seq.atomic_files import atomic_write
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.vocabulary import CharVocabulary

if TYPE_CHECKING:
    from encoder_decoder_transformer import Transformer

FORMAT_VERSION = 1

_MODEL = "charseq2seq model"
_RESUME = "charseq2seq resume state"


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and everything that is known about it.

    Attributes:
        model_state_dict: float32 weights on the CPU, of the best validation loss.
        config: the keyword arguments of `Transformer`.
        vocab: token -> index, as in vocab.json.
        training_args: what the run was told and what it chose; never a token or a path of the machine.
        metrics: `nats_per_char` and the protocol it was measured by, step, steps, seconds, and `history`, a list
            of {"step", "seconds", "train_nats_per_char", "nats_per_char"}.
        corpus: name, sha256, characters, distinct_characters, train_characters, validation_characters.
        environment: versions of Python and the libraries, and the kind of hardware.
    """

    model_state_dict: Mapping[str, Any]
    config: Mapping[str, Any]
    vocab: Mapping[str, int]
    training_args: Mapping[str, Any]
    metrics: Mapping[str, Any]
    corpus: Mapping[str, Any]
    environment: Mapping[str, Any]

    def vocabulary(self) -> CharVocabulary:
        """The vocabulary the model was trained with."""
        return CharVocabulary.from_index_of_token(self.vocab)

    def build_model(self) -> Transformer:
        """The model with its weights, on the CPU, in evaluation mode.

        Raises:
            ValueError, TypeError, RuntimeError: config and weights do not fit the model's code.
        """
        from encoder_decoder_transformer import Transformer

        model = Transformer(**self.config)
        model.load_state_dict(self.model_state_dict)
        return model.eval()


def resume_path(model_path: Path) -> Path:
    """Where the resume state of a model lies: transformer_model.pth -> transformer_model.resume.pth."""
    return model_path.with_suffix(".resume" + (model_path.suffix or ".pth"))


def library_versions() -> dict[str, str]:
    """Versions that decide what a run computes."""
    import numpy as np
    import torch

    return {
        "suite": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a plain str: its own type would not load safely
        "numpy": np.__version__,
    }


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the model file, whole or not at all.

    Raises:
        SuiteError: it cannot be written; an earlier file is untouched.
    """
    content = asdict(checkpoint)
    content["model_state_dict"] = {
        # A clone, because a view would drag its whole storage into the file.
        name: tensor.detach().to("cpu").clone()
        for name, tensor in checkpoint.model_state_dict.items()
    }
    _save(path, _MODEL, content)


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and check the model file.

    Raises:
        SuiteError: missing, unreadable, damaged, not of this suite, of a newer format, or its parts do not fit.
    """
    import torch

    content = _load(path, _MODEL)
    names = {field.name for field in fields(Checkpoint)}
    missing = sorted(name for name in names if not isinstance(content.get(name), dict))
    if missing:
        raise _unusable(path, f"it lacks {', '.join(missing)}")
    checkpoint = Checkpoint(**{name: content[name] for name in names})
    for name, tensor in checkpoint.model_state_dict.items():
        if not isinstance(tensor, torch.Tensor) or not torch.isfinite(tensor).all():
            raise _unusable(path, f"its weight {name} is not a tensor of finite numbers")
    if checkpoint.config.get("vocab_size") != len(checkpoint.vocabulary()):
        raise _unusable(path, "its vocabulary and its model differ in size")
    _check_weights_fit(path, checkpoint)
    return checkpoint


def _check_weights_fit(path: Path, checkpoint: Checkpoint) -> None:
    """Build the model without memory for weights and compare names and shapes."""
    import torch

    from encoder_decoder_transformer import Transformer

    held = sum(tensor.numel() for tensor in checkpoint.model_state_dict.values())
    sizes = [size for size in checkpoint.config.values() if isinstance(size, int)]
    if max(sizes, default=0) > max(held, 1_000_000):  # before a hostile config can ask for a huge model
        raise _unusable(path, "its config does not fit its weights")
    try:
        with torch.device("meta"):
            expected = Transformer(**checkpoint.config).state_dict()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _unusable(path, f"its config does not fit this version of the model ({error})") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.model_state_dict.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
        raise _unusable(path, "its weights do not fit its config")


def save_resume_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what resuming needs; tensors and plain types only."""
    _save(path, _RESUME, dict(state))


def load_resume_state(path: Path) -> dict[str, Any]:
    """Read what `save_resume_state` wrote.

    Raises:
        SuiteError: as `load_checkpoint`.
    """
    return _load(path, _RESUME)


def _save(path: Path, kind: str, content: dict[str, Any]) -> None:
    import torch

    with atomic_write(path) as file:
        torch.save({"format": kind, "format_version": FORMAT_VERSION} | content, file)


def _load(path: Path, kind: str) -> dict[str, Any]:
    import torch

    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "it holds more than tensors and plain values, and code in a file is never run"
        raise _unusable(path, reason) from error
    # A file made to break the reader may raise anything; all of it means the same to the user.
    except Exception as error:
        raise _unusable(path, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise _unusable(path, f"it is not a {kind} file")
    version = content.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise _unusable(path, f"its format version is {version!r}, this suite reads up to {FORMAT_VERSION}; update it")
    return content


def _check_archive(path: Path) -> None:
    """Refuse what is not a complete zip archive with right checksums, before anything is unpickled."""
    try:
        if path.is_dir():
            raise SuiteError(f"{path} is a folder; name the model file in it.", ExitCode.NO_INPUT)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except FileNotFoundError as error:
        raise SuiteError(
            f"{path} does not exist; train a model first (python train_transformer.py --mode train) or name "
            "another file with --model_path.",
            ExitCode.NO_INPUT,
        ) from error
    except PermissionError as error:
        raise SuiteError(f"{path} may not be read by this user; change its permissions.", ExitCode.NO_INPUT) from error
    except Exception as error:
        raise _unusable(path, "it is no complete checkpoint archive (cut short or damaged?)") from error
    if damaged is not None:
        raise _unusable(path, f"its part {damaged} is damaged")


def _unusable(path: Path, reason: str) -> SuiteError:
    return SuiteError(f"{path} cannot be used: {reason}; restore a good copy or train again.", ExitCode.BAD_DATA)
