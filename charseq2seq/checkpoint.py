"""`transformer_model.pth`: the one product of training and the one input of everything else.

It holds tensors and plain Python types only, so that `torch.load(..., weights_only=True)` reads it and no code in
a file can run. `load_checkpoint` trusts nothing: a damaged, foreign, newer or hostile file gives one sentence, and
reading never takes more memory than four times the file and `MEMORY_ALLOWANCE` (benchmarks/campaigns/fuzz.py tries).
What resuming needs beyond it lies in a second file, `resume_path(model_path)`, written and read the same way.
"""

from __future__ import annotations

import inspect
import math
import pickle
import pickletools
import platform
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq import __version__
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import atomic_write
from charseq2seq.vocabulary import CharVocabulary

if TYPE_CHECKING:
    from encoder_decoder_transformer import Transformer

FORMAT_VERSION = 4  # 1: a key and a value for every head; 2: each token embedded alone; 3: blocks one after the other
MEMORY_ALLOWANCE = 256 << 20  # bytes that reading may take beyond four times the file

_MODEL = "charseq2seq model"
_RESUME = "charseq2seq resume state"

# All that `torch.save` calls upon to rebuild tensors and plain values.
_STORAGES = ("Bool", "Byte", "Char", "Short", "Int", "Long", "Half", "BFloat16", "Float", "Double")
_GLOBALS = {"torch._utils _rebuild_tensor_v2", "collections OrderedDict"} | {
    f"torch {kind}Storage" for kind in _STORAGES
}

# One byte of a pickle can become a hundred in memory, one of an archive's directory ten. In a file of ours both are
# small: at most so many bytes and this share of the file.
_SMALL = 1 << 20
_PICKLE_SHARE, _DIRECTORY_SHARE = 1 / 128, 1 / 8
_DEEPEST_NESTING = 16
LARGEST_TABLE = 1 << 23  # positions times features of a head: what a model computes from its config alone
_LARGEST_FIGURE = 1e300

_ONLY_VALUES = "it holds more than tensors and plain values, and code in a file is never run"

# What the rest of the suite computes with: counts that a corpus has, numbers that metrics may have.
_COUNTS = ("characters", "distinct_characters", "train_characters", "validation_characters")
_FIGURES = (
    *("nats_per_char", "bits_per_char", "perplexity", "train_nats_per_char", "characters", "max_context"),
    *("step", "steps", "seconds", "characters_per_second"),
)


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
    content = _load(path, _MODEL)
    names = {field.name for field in fields(Checkpoint)}
    missing = sorted(name for name in names if not isinstance(content.get(name), dict))
    if missing:
        raise _unusable(path, f"it lacks {', '.join(missing)}")
    checkpoint = Checkpoint(**{name: content[name] for name in names})
    problem = (
        _facts_problem(checkpoint)
        or _config_problem(checkpoint)
        or _weights_problem(checkpoint, path.stat().st_size)
        or _fit_problem(checkpoint)
    )
    if problem:
        raise _unusable(path, problem)
    return checkpoint


def _facts_problem(checkpoint: Checkpoint) -> str | None:
    """Facts that the rest of the suite could not show or compute with."""
    for name in ("config", "vocab", "training_args", "metrics", "corpus", "environment"):
        if not _is_json(getattr(checkpoint, name)):
            return f"its {name} are not what JSON can hold"
    corpus, metrics = checkpoint.corpus, checkpoint.metrics
    counts = [corpus.get(name) for name in _COUNTS]
    named = all(isinstance(corpus.get(name), str) for name in ("name", "sha256"))
    if not named or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        return "its corpus lacks a name, a sha256 or the numbers of characters"
    loss = metrics.get("nats_per_char")
    if loss is None or not all(_is_figure(metrics.get(name)) for name in _FIGURES) or not math.isfinite(loss):
        return "its metrics lack a loss, or are not numbers"
    return history_problem(metrics.get("history", []))


def history_problem(history: Any) -> str | None:
    """What is wrong with a list of losses, in words."""
    if not isinstance(history, list) or not all(isinstance(point, dict) for point in history):
        return "its history is not a list of losses"
    if not all(type(point.get("step")) is int and all(map(_is_figure, point.values())) for point in history):
        return "its history has something else than steps and losses"
    return None


def _config_problem(checkpoint: Checkpoint) -> str | None:
    """A config that is not one of keyword arguments of the right types."""
    types = {"int": (int,), "float": (int, float), "bool": (bool,)}
    known = _model_arguments()
    for name, value in checkpoint.config.items():
        if name not in known:
            return f"its config has {name!r:.80}, which this version of the model does not know"
        if type(value) not in types.get(str(known[name].annotation), (type(value),)):
            return f"its config has {value!r:.80} for {name}"
    try:
        vocabulary = checkpoint.vocabulary()
    except SuiteError as error:
        return str(error).rstrip(".")
    if checkpoint.config.get("vocab_size") != len(vocabulary):
        return "its vocabulary and its model differ in size"
    layers = sum(value for name, value in checkpoint.config.items() if name.endswith("_layers"))
    if layers > len(checkpoint.model_state_dict):  # before building so many layers takes the day
        return "its weights do not fit its config"
    return None


def _weights_problem(checkpoint: Checkpoint, size: int) -> str | None:
    """Weights that are not finite float32 numbers, or more of them than the file has room for."""
    import torch

    weights = checkpoint.model_state_dict
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float32:
            return f"its weight {name!r:.80} is not a float32 tensor"
    if sum(tensor.nbytes for tensor in weights.values()) > size:  # many can be views of the same few bytes
        return "its weights are more than the file has room for"
    infinite = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    return f"its weight {infinite[0]!r:.80} holds numbers that are not finite" if infinite else None


def _fit_problem(checkpoint: Checkpoint) -> str | None:
    """Weights and config that do not fit each other."""
    sizes = {name: parameter.default for name, parameter in _model_arguments().items()} | dict(checkpoint.config)
    positions = sizes["source_length"] + sizes["target_length"]
    if positions * sizes["d_model"] > LARGEST_TABLE * max(1, sizes["num_heads"]):
        return "its config has lengths that would take more memory than its weights"
    try:
        expected = _empty_model(checkpoint.config).state_dict()
    # Which error it is depends on the model's code, which may change.
    except Exception as error:
        return f"its config does not fit this version of the model ({str(error).partition(chr(10))[0]:.200})"
    shapes = {name: tensor.shape for name, tensor in checkpoint.model_state_dict.items()}
    if shapes != {name: tensor.shape for name, tensor in expected.items()}:
        return "its weights do not fit its config"
    return None


def _model_arguments() -> Mapping[str, inspect.Parameter]:
    from encoder_decoder_transformer import Transformer

    return inspect.signature(Transformer).parameters


def _empty_model(config: Mapping[str, Any]) -> Transformer:
    """A model whose weights are not initialised: however large, memory that is never written to is never taken.

    PyTorch's meta device would do the same, but costs a second at its first use.
    """
    from torch.overrides import TorchFunctionMode

    from encoder_decoder_transformer import Transformer

    class SkipInPlace(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(getattr(func, "__name__", ""))
            if name.endswith("_") and not name.endswith("__"):  # zero_, normal_, kaiming_uniform_
                return args[0] if args else None
            return func(*args, **(kwargs or {}))

    with SkipInPlace():
        return Transformer(**config)


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_json(part) for name, part in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _is_figure(value: Any) -> bool:
    """Whether it is None or a number; a loss that was not measured may be NaN."""
    return value is None or (type(value) in (int, float) and not abs(value) > _LARGEST_FIGURE)


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
        content = _plain_copy(torch.load(path, map_location="cpu", weights_only=True), path.stat().st_size)
    except pickle.UnpicklingError as error:
        raise _unusable(path, _ONLY_VALUES) from error
    # A file made to break the reader may raise anything; all of it means the same to the user.
    except Exception as error:
        raise _unusable(path, f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(content, dict) or content.get("format") != kind:
        raise _unusable(path, f"it is not a {kind} file")
    version = content.get("format_version")
    found = version if type(version) is int else "not given"
    if found != FORMAT_VERSION:
        older = found in range(1, FORMAT_VERSION)
        remedy = "use the version of the suite that wrote it" if older else "update the suite"
        raise _unusable(path, f"its format version is {found}, this suite reads {FORMAT_VERSION}; {remedy}")
    return content


def _check_archive(path: Path) -> None:
    """Refuse what is not a complete archive of `torch.save` with right checksums and a harmless pickle in it."""
    try:
        if path.exists() and not path.is_file():
            kind = "folder" if path.is_dir() else "pipe or device"
            raise SuiteError(f"{path} is a {kind}; name a model file.", ExitCode.NO_INPUT)
        whole = _is_whole(path)
    except FileNotFoundError as error:
        raise SuiteError(
            f"{path} does not exist; train a model first (python train_transformer.py --mode train) or name "
            "another file with --model_path.",
            ExitCode.NO_INPUT,
        ) from error
    except OSError as error:
        raise SuiteError(
            f"{path} cannot be read ({error.strerror}); check the path and its permissions.", ExitCode.NO_INPUT
        ) from error
    problem: str | None = "it is no complete checkpoint archive (cut short or damaged?)"
    if whole:
        try:
            with zipfile.ZipFile(path) as archive:
                problem = _archive_problem(archive, path.stat().st_size)
        except Exception as error:
            raise _unusable(path, f"its archive is damaged ({type(error).__name__})") from error
    if problem is not None:
        raise _unusable(path, problem)


def _is_whole(path: Path) -> bool:
    """Whether a file begins and ends as `torch.save` makes it, and its archive's directory is not absurdly large.

    It ends with three records of fixed length; the first has the size of the directory, which zipfile would read
    into memory without asking.
    """
    with path.open("rb") as file:
        begin = file.read(4)
        size = file.seek(0, 2)
        file.seek(max(0, size - 98))
        end = file.read()
    if (begin, end[:4], end[56:60], end[76:80]) != (b"PK\3\4", b"PK\6\6", b"PK\6\7", b"PK\5\6"):
        return False
    (directory,) = struct.unpack_from("<Q", end, 40)
    return bool(directory <= _SMALL + size * _DIRECTORY_SHARE)


def _archive_problem(archive: zipfile.ZipFile, size: int) -> str | None:
    """What is wrong with an archive of `size` bytes; nothing in it is unpickled."""
    parts = archive.infolist()
    if sum(part.file_size for part in parts) > size:  # packed, or the same bytes under many names
        return "its parts are larger than the file (a zip bomb?)"
    damaged = archive.testzip()
    if damaged is not None:
        return f"its part {damaged!r:.80} is damaged"
    pickles = [part for part in parts if part.filename.endswith(".pkl")]
    if len(pickles) != 1 or pickles[0].file_size > _SMALL + size * _PICKLE_SHARE:
        return "it is not laid out as a checkpoint"
    for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):
        if opcode.name == "GLOBAL" and argument not in _GLOBALS:
            return f"it calls upon {str(argument).replace(' ', '.')!r:.80}, and code in a file is never run"
        if opcode.proto > 2:  # torch.save writes protocol 2
            return _ONLY_VALUES
    return None


def _plain_copy(content: Any, size: int) -> Any:
    """The content of a file of `size` bytes in tensors, plain values, lists, tuples and dicts, and nothing else.

    Raises:
        ValueError: there is something else in it, or it is larger than it seems: containers that are shared over and
            over or hold themselves, tensors that repeat a few numbers.
    """
    import torch

    room = _SMALL + size * _PICKLE_SHARE  # as many values as the pickle may have bytes

    def copy(value: Any, depth: int = 0) -> Any:
        nonlocal room
        room -= 1 + len(value) / 16 if isinstance(value, str) else 1
        if room < 0 or depth > _DEEPEST_NESTING:
            raise ValueError("nested too deep, or endlessly")
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (list, tuple):
            return type(value)(copy(part, depth + 1) for part in value)
        if isinstance(value, dict) and all(type(name) in (str, int) for name in dict.keys(value)):
            return {copy(name): copy(part, depth + 1) for name, part in dict.items(value)}
        if type(value) is torch.Tensor and value.nbytes <= value.untyped_storage().nbytes():
            return value.detach()
        raise ValueError(f"a {type(value).__name__} that cannot be")

    return copy(content)


def _unusable(path: Path, reason: str) -> SuiteError:
    return SuiteError(f"{path} cannot be used: {reason}; restore a good copy or train again.", ExitCode.BAD_DATA)
