"""`transformer_model.pth`: the one product of training and the one input of everything else.

It holds tensors and plain Python types only, so that `torch.load(..., weights_only=True)` reads it and no code in a
file can run. `load_checkpoint` trusts nothing: a damaged, foreign, newer or hostile file is refused in one sentence.
Resuming needs a second file, `resume_path(model_path)`, which is written and read in the same way.
"""

from __future__ import annotations

import inspect
import math
import pickle
import platform
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq import __version__
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import atomic_write
from charseq2seq.vocabulary import CharVocabulary

if TYPE_CHECKING:
    from encoder_decoder_transformer import Transformer

FORMAT_VERSION = 4  # 1 had multi-head attention, 2 no convolution over embeddings, 3 blocks one after the other

_MODEL, _RESUME = "charseq2seq model", "charseq2seq resume state"

# Limits of what is not a weight: values and characters of text together, levels of nesting, size of a number.
_LARGEST_CONTENT, _DEEPEST_NESTING, _LARGEST_FIGURE = 1 << 22, 16, 1e300

# What the rest of the suite computes with: numbers of the corpus and of the metrics.
_COUNTS = ("characters", "distinct_characters", "train_characters", "validation_characters")
_FIGURES = (
    *("nats_per_char", "bits_per_char", "perplexity", "train_nats_per_char", "characters", "max_context"),
    *("step", "steps", "seconds", "characters_per_second"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model and everything known about it."""

    model_state_dict: Mapping[str, Any]  # float32 weights of the best validation loss
    config: Mapping[str, Any]  # the keyword arguments of `Transformer`
    vocab: Mapping[str, int]  # token -> index, as in vocab.json
    training_args: Mapping[str, Any]  # the run's options and defaults as it used them; no token, no path of a machine
    metrics: Mapping[str, Any]  # the loss, how it was measured, and `history`: steps, seconds and losses
    corpus: Mapping[str, Any]  # its name, sha256 and numbers of characters
    environment: Mapping[str, Any]  # versions of Python and the libraries, and the kind of hardware

    def vocabulary(self) -> CharVocabulary:
        return CharVocabulary.from_index_of_token(self.vocab)

    def build_model(self) -> Transformer:
        """The model with its weights, on the CPU, in evaluation mode; no global random state changes."""
        from encoder_decoder_transformer import Transformer

        return Transformer.from_weights(self.config, self.model_state_dict, self.vocab)


def library_versions() -> dict[str, str]:
    """Versions that decide what a run computes."""
    import numpy as np
    import torch

    torch_version = str(torch.__version__)  # its own type would not load safely
    python_version = platform.python_version()
    return {"suite": __version__, "python": python_version, "numpy": np.__version__, "torch": torch_version}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the model file, whole or not at all; see `atomic_write`."""
    # Clones, because a view would bring its whole storage into the file.
    weights = {name: tensor.detach().to("cpu").clone() for name, tensor in checkpoint.model_state_dict.items()}
    parts = {name: dict(part) for name, part in vars(checkpoint).items()}
    _save(path, _MODEL, parts | {"model_state_dict": weights})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read the model file; a SuiteError says that it is missing, damaged, foreign, newer, or does not fit together."""
    content = _load(path, _MODEL)
    names = [field.name for field in fields(Checkpoint)]
    if missing := [name for name in names if not isinstance(content.get(name), dict)]:
        raise _unusable(path, f"it lacks {', '.join(missing)}")
    checkpoint = Checkpoint(**{name: dict(content[name]) for name in names})
    if problem := next(_problems(checkpoint, path.stat().st_size), ""):
        raise _unusable(path, problem)
    return checkpoint


def _problems(checkpoint: Checkpoint, file_size: int) -> Iterator[str]:
    """What is wrong with a checkpoint, as parts of sentences. Only the first is told: it may be why the others come."""
    import torch

    facts = {name: part for name, part in vars(checkpoint).items() if name != "model_state_dict"}
    yield from (f"its {name} are not what JSON can hold" for name, part in facts.items() if not _is_json(part))
    corpus, metrics, weights = checkpoint.corpus, checkpoint.metrics, checkpoint.model_state_dict
    counts = [corpus.get(name) for name in _COUNTS]
    counted = all(type(count) is int and 0 <= count < 2**63 for count in counts)
    if not counted or not all(isinstance(corpus.get(name), str) for name in ("name", "sha256")):
        yield "its corpus lacks a name, a sha256 or the numbers of characters"
    loss = metrics.get("nats_per_char")
    if loss is None or not all(_is_figure(metrics.get(name)) for name in _FIGURES) or not math.isfinite(loss):
        yield "its metrics lack a loss, or are not numbers"
    try:
        if checkpoint.config.get("vocab_size") != len(checkpoint.vocabulary()):
            yield "its vocabulary and its model differ in size"
    except SuiteError as error:
        yield str(error).rstrip(".")
    if problem := history_problem(metrics.get("history", [])):
        yield problem
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tensor.layout) != (torch.float32, torch.strided):
            yield f"its weight {name!r:.80} is not a float32 tensor"
    if sum(tensor.nbytes for tensor in weights.values()) > file_size:  # tensors that share their bytes
        yield "its weights are larger than the file"
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            yield f"its weight {name!r:.80} holds numbers that are not finite"
    yield from _config_problems(checkpoint)


def _config_problems(checkpoint: Checkpoint) -> Iterator[str]:
    """Why the config makes no model, or one that the weights do not fit."""
    from encoder_decoder_transformer import Transformer

    arguments = inspect.signature(Transformer).parameters
    for name, value in checkpoint.config.items():
        if name in arguments and type(value).__name__ != arguments[name].annotation:
            yield f"its config has {value!r:.80} for {name}"
    try:
        checkpoint.build_model()
    # Which error it is depends on the model's code, which may change.
    except Exception as error:
        yield f"its config and weights do not fit this version of the model ({' '.join(str(error).split()):.200})"


def history_problem(history: Any) -> str:
    """What is wrong with a list of losses, in words."""
    points: list[Any] = history if isinstance(history, list) else [None]
    fine = (isinstance(p, dict) and type(p.get("step")) is int and all(map(_is_figure, p.values())) for p in points)
    return "" if all(fine) else "its history is not a list of steps and losses"


def _is_json(value: Any) -> bool:
    """Whether JSON can hold a value; one that contains itself, or the same thing over and over, is too large."""
    budget, stack = _LARGEST_CONTENT, [(value, 0)]
    while stack:
        value, depth = stack.pop()
        budget -= 1 + len(value) if isinstance(value, str) else 1
        if budget < 0 or depth > _DEEPEST_NESTING:
            return False
        if isinstance(value, dict):
            stack += [(name if isinstance(name, str) else b"", depth) for name in value]
            stack += [(part, depth + 1) for part in value.values()]
        elif isinstance(value, list):
            stack += [(part, depth + 1) for part in value]
        elif not (value is None or isinstance(value, (bool, int, float, str))):
            return False
    return True


def _is_figure(value: Any) -> bool:
    """Whether it is None or a number; a loss that was not measured may be NaN."""
    return value is None or (type(value) in (int, float) and not abs(value) > _LARGEST_FIGURE)


def save_resume_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write what resuming needs: tensors and plain types only."""
    _save(path, _RESUME, state)


def load_resume_state(path: Path) -> dict[str, Any]:
    """Read what `save_resume_state` wrote, as safely as a model file; the trainer checks whether its parts fit."""
    content = _load(path, _RESUME)
    if not _is_json(dict.fromkeys(content) | {name: content.get(name) for name in ("identity", "finished")}):
        raise _unusable(path, "the options of its run are not what JSON can hold")
    return content


def _save(path: Path, kind: str, content: Mapping[str, Any]) -> None:
    import torch

    with atomic_write(path) as file:
        torch.save({"format": kind, "format_version": FORMAT_VERSION, **content}, file)


def _load(path: Path, kind: str) -> dict[str, Any]:
    import torch

    try:
        if path.exists() and not path.is_file():
            raise SuiteError(f"{path} is a folder, pipe or device; name a model file.", ExitCode.NO_INPUT)
        path.open("rb").close()
    except OSError as error:
        advice = "check the path and its permissions."
        if isinstance(error, FileNotFoundError):
            advice = "train a model first (python train_transformer.py) or name another file with --model_path."
        raise SuiteError(f"{path} cannot be read ({error.strerror}); {advice}", ExitCode.NO_INPUT) from error
    content: Any = None
    try:
        problem = _archive_problem(path)
        with warnings.catch_warnings(action="ignore"):  # about pickle protocols; the refusal says enough
            content = problem or torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        problem = "it holds more than tensors and plain values, and code in a file is never run"
    # A damaged or hostile file may raise anything; all of it means the same to the user.
    except Exception as error:
        problem = f"it cannot be read (damaged? {type(error).__name__})"
    found = content.get("format") if isinstance(content, dict) else None
    if (kind, found) == (_MODEL, _RESUME):
        raise SuiteError(
            f"{path} is the state of a run, not a model; the run's own command with --resume {path} --max_steps "
            f"{_shown(content.get('step'))} --model_path NEW.pth writes the model of what it has learnt so far.",
            ExitCode.BAD_DATA,
        )
    if problem or found != kind:
        raise _unusable(path, problem or f"it is not a {kind} file")
    version = content.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        problem = f"its format version is {_shown(version)}, this suite reads {FORMAT_VERSION}"
        raise _unusable(path, f"{problem}; use the version of the suite that wrote it")
    return content


def _archive_problem(path: Path) -> str:
    """What sizes, layout and checksums say, before anything is unpickled or takes memory."""
    size = path.stat().st_size
    with path.open("rb") as file:  # torch.load would take other beginnings for one of its older formats
        if file.read(4) != b"PK\3\4":
            return "it is no checkpoint archive (damaged?)"
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > size:  # compressed, or the same bytes under many names
            return "its parts are larger than the file (a zip bomb?)"
        pickles = [part.file_size for part in parts if part.filename.endswith(".pkl")]
        # One byte of a pickle can become a hundred in memory; the pickle of a model file is small.
        if len(pickles) != 1 or pickles[0] > (1 << 20) + size // 128:
            return "it is not laid out as a checkpoint"
        damaged = archive.testzip()  # checksums, which torch.load ignores
    return f"its part {damaged!r:.80} is damaged" if damaged else ""


def _shown(number: Any) -> str:
    """A file's number as a message may show it: a damaged or hostile file may hold anything there."""
    return str(number) if type(number) is int and abs(number) < 10**9 else "unknown"


def _unusable(path: Path, reason: str) -> SuiteError:
    return SuiteError(f"{path} cannot be used: {reason}; restore a good copy or train again.", ExitCode.BAD_DATA)
