"""The model file: what is saved comes back to the bit, and whatever else a file holds is refused in one sentence."""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import random
import re
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from charseq2seq.checkpoint import (
    Checkpoint,
    library_versions,
    load_checkpoint,
    load_resume_state,
    save_checkpoint,
    save_resume_state,
)
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.generation import Sampling, TextGenerator
from charseq2seq.publishing.card import render_card
from encoder_decoder_transformer import Transformer
from tests.push_client import ROOT, tiny_checkpoint
from tests.train_client import contents

Content = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good model file."""
    save_checkpoint(tmp_path / "transformer_model.pth", tiny_checkpoint())
    return tmp_path / "transformer_model.pth"


def refused(path: Path, said: str = "", code: ExitCode = ExitCode.BAD_DATA) -> None:
    """Assert that both loaders refuse a file in one sentence that names it."""
    sentence = ""
    for load in (load_resume_state, load_checkpoint):
        with pytest.raises(SuiteError) as refusal:
            load(path)
        sentence = str(refusal.value)
        assert refusal.value.exit_code == code
        assert str(path) in sentence
        assert "\n" not in sentence
    assert re.search(said, sentence), sentence


def exact(value: Any) -> str:
    """Every type, number and bit of a value, in order."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor):
        return f"{kind} {value.dtype} {value.double().tolist()}"
    if isinstance(value, dict):
        return f"{kind} {[(name, exact(part)) for name, part in value.items()]}"
    return f"{kind} {[exact(part) for part in value] if isinstance(value, list | tuple) else repr(value)}"


# --- what is saved comes back


def test_a_checkpoint_comes_back(path: Path) -> None:
    expected = tiny_checkpoint(train_nats_per_char=math.nan)
    save_checkpoint(path, expected)
    loaded = load_checkpoint(path)
    for field in dataclasses.fields(Checkpoint):
        assert exact(dict(getattr(expected, field.name))) == exact(getattr(loaded, field.name))
    source = torch.randint(1, 9, (2, 8))
    assert torch.equal(loaded.build_model()(source, source), expected.build_model()(source, source))
    assert not loaded.build_model().training
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_checkpoint_is_plain(path: Path) -> None:
    content = contents(path)  # by weights_only=True
    assert (content["format"], content["format_version"]) == ("charseq2seq model", 4)
    assert set(content) == {field.name for field in dataclasses.fields(Checkpoint)} | {"format", "format_version"}
    assert type(content["model_state_dict"]) is dict
    assert all(type(version) is str for version in library_versions().values())


def test_views_parameters_and_transposed_weights_are_saved_as_plain_ones(path: Path) -> None:
    size, checkpoint = path.stat().st_size, tiny_checkpoint()
    weights: Content = {
        name: torch.nn.Parameter(weight.T.contiguous().T if weight.dim() == 2 else weight)
        for name, weight in checkpoint.model_state_dict.items()
    }
    weights["head.weight"] = torch.zeros(1000, *weights["head.weight"].shape).copy_(weights["head.weight"].detach())[7]
    save_checkpoint(path, dataclasses.replace(checkpoint, model_state_dict=weights))
    assert path.stat().st_size == pytest.approx(size, abs=1000), "a view does not bring its storage along"
    assert exact(load_checkpoint(path).model_state_dict) == exact(dict(checkpoint.model_state_dict))


def test_a_resume_state_comes_back(tmp_path: Path) -> None:
    generator = random.Random(3)
    generator.gauss(0, 1)
    state: Content = {
        "weights": dict(tiny_checkpoint().model_state_dict),
        "random": {"python": generator.getstate(), "torch": torch.get_rng_state()},
        "history": [{"step": 1, "seconds": 0.5, "train_nats_per_char": math.nan}] * 3,
        "best_loss": math.inf,
        "nothing": [None, True, -1, 2**70, "莎\ud800", (), [], {}],
        "half": torch.arange(5).to(torch.bfloat16),
    }
    save_resume_state(tmp_path / "a.resume.pth", state)
    kind = {"format": "charseq2seq resume state", "format_version": 4}
    assert exact(load_resume_state(tmp_path / "a.resume.pth")) == exact(kind | state)


def test_a_long_history_or_a_large_alphabet_does_not_lock_its_model_up(path: Path) -> None:
    point = {"step": 123_456, "seconds": 0.123, "train_nats_per_char": 1.234, "nats_per_char": 1.5}
    save_checkpoint(path, tiny_checkpoint(history=[dict(point) for _ in range(10_000)]))
    assert len(load_checkpoint(path).metrics["history"]) == 10_000
    config = {**tiny_checkpoint().config, "vocab_size": 20_001, "d_model": 8, "num_heads": 1, "bigram": False}
    vocab = {"<start>": 0} | {chr(0x4E00 + i): i for i in range(1, 20_001)}
    weights = Transformer(**config).state_dict()
    save_checkpoint(path, dataclasses.replace(tiny_checkpoint(), config=config, vocab=vocab, model_state_dict=weights))
    assert len(load_checkpoint(path).vocabulary()) == 20_001


@pytest.mark.slow
def test_loading_needs_no_second_of_imports(path: Path) -> None:
    script = "import sys; sys.path.insert(0, sys.argv[1]); from charseq2seq.checkpoint import *\n"
    script += "load_checkpoint(Path(sys.argv[2])).build_model(); print(*{'torch._dynamo', 'sympy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", script, ROOT, path], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# --- files that are not there, or not files


def test_what_is_no_file_is_refused(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    for name, said in {
        "missing.pth": r"\(No such file or directory\); train a model first \(python train_transformer.py\)",
        ".": "is a folder, pipe or device; name a model file",
        "pipe": "is a folder, pipe or device",
        "x" * 300: r"cannot be read \(File name too long\)",
        "transformer_model.pth/x": r"cannot be read \(Not a directory\)",
    }.items():
        refused(path.parent / name, said, ExitCode.NO_INPUT)
    refused(Path("/dev/zero"), "is a folder, pipe or device", ExitCode.NO_INPUT)


def test_a_file_that_may_not_be_read(path: Path, nobody: Callable[[], AbstractContextManager[None]]) -> None:
    path.chmod(0)
    with nobody():
        refused(Path(path.name), r"cannot be read \(Permission denied\); check the path", ExitCode.NO_INPUT)


# --- damage


def test_a_file_cut_short_anywhere_is_refused(path: Path) -> None:
    whole = path.read_bytes()
    for length in (*range(8), *(len(whole) * i // 40 for i in range(40)), *(len(whole) - i for i in (98, 42, 22, 1))):
        path.write_bytes(whole[:length])
        refused(path, "damaged")


def test_a_flipped_bit_is_found_or_does_not_matter(path: Path) -> None:
    whole, expected = path.read_bytes(), load_checkpoint(path)
    chance, harmless = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except SuiteError as error:
            assert error.exit_code == ExitCode.BAD_DATA
        else:
            harmless += 1
            assert exact(vars(loaded)) == exact(vars(expected))
    assert harmless < 100, "padding and time stamps"


# --- files made by somebody else, or to do harm


class Hostile:
    """What would run a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 4, 5])
def test_code_in_a_file_is_never_run(protocol: int, path: Path) -> None:
    marker = path.with_name("marker")
    hostile = contents(path) | {"environment": Hostile(marker)}
    torch.save(hostile, path, pickle_protocol=protocol)
    refused(path, "code in a file is never run")
    torch.save(hostile, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)
    refused(path)
    path.write_bytes(pickle.dumps(hostile["environment"], protocol))
    refused(path)
    assert not marker.exists()


def test_what_is_checked_is_what_is_loaded(path: Path) -> None:
    archive, other = path.read_bytes(), contents(path) | {"environment": {"never": "checked"}}
    torch.save(other, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + archive)  # to torch.load a file of its old format, to zipfile an archive
    refused(path, "damaged")


def test_other_calls_are_not_made_either(path: Path) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    for value in (bytearray(9), {1, 2}, 1j, torch.Size([1]), torch.float32, parameter, b"bytes"):
        torch.save(contents(path) | {"environment": {"extra": value}}, path.with_name("other.pth"))
        refused(path.with_name("other.pth"))


@pytest.mark.parametrize("foreign", [torch.nn.Linear(2, 2).state_dict(), {"format": "charseq2seq"}, None])
def test_a_file_of_another_project_is_refused(foreign: Any, path: Path) -> None:
    torch.save(foreign, path)
    refused(path, "it is not a charseq2seq model file")


def test_model_and_resume_state_are_not_taken_for_each_other(path: Path) -> None:
    with pytest.raises(SuiteError, match="it is not a charseq2seq resume state file"):
        load_resume_state(path)
    save_resume_state(path, {"step": 7})
    with pytest.raises(SuiteError, match=r"is the state of a run, not a model; .* --max_steps 7 "):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "odd", [{"identity": torch.ones(2)}, {"identity": {1: "x"}}, {"finished": torch.ones(2)}, {7: "a field"}]
)
def test_a_resume_state_of_an_odd_run_is_refused(odd: Content, path: Path) -> None:
    save_resume_state(path, {"identity": {"seed": 1}, "finished": False} | odd)
    with pytest.raises(SuiteError, match="the options of its run are not what JSON can hold"):
        load_resume_state(path)


ODD_VERSIONS = [True, 4.0, "4", None, torch.ones(2, 2), [4], "\x1b[2J\n"]


@pytest.mark.parametrize("version", [5, 10**6, 0, -1, 1, 2, 3, *ODD_VERSIONS])
def test_another_format_is_refused(version: Any, path: Path) -> None:
    torch.save(contents(path) | {"format_version": version}, path)
    refused(path, r"format version is (-?\d+|unknown), this suite reads 4; use the version of the suite that wrote it;")


# --- parts that do not fit


def having(part: str, **changes: Any) -> Callable[[Content], None]:
    """A change of some values of one part."""
    return lambda content: content[part].update(changes)


def with_weight(change: Callable[[torch.Tensor], Any]) -> Callable[[Content], None]:
    """A change of one weight."""

    def changed(content: Content) -> None:
        content["model_state_dict"]["head.weight"] = change(content["model_state_dict"]["head.weight"])

    return changed


CHANGES: dict[str, tuple[Callable[[Content], None], str]] = {
    "no weights and no vocabulary": (
        lambda content: content.update(model_state_dict=None, vocab=[]),
        "it lacks model_state_dict, vocab",
    ),
    # the vocabulary
    "a character too many": (lambda content: content["vocab"].update({"🎭": len(content["vocab"])}), "differ in size"),
    "a token that is none": (lambda content: content["vocab"].update({"R": 3, 5: 4}), "vocab"),
    "an empty vocabulary": (lambda content: content["vocab"].clear(), "not a sorted set"),
    # the weights
    "NaN": (
        lambda content: content["model_state_dict"]["head.weight"].view(-1)[3].fill_(math.nan),
        r"head\.weight' holds numbers that are not finite",
    ),
    "a weight transposed": (with_weight(lambda weight: weight.T), "do not fit this version of the model"),
    "a weight of doubles": (with_weight(lambda weight: weight.double()), "is not a float32 tensor"),
    "a sparse weight": (with_weight(lambda weight: weight.to_sparse()), "is not a float32 tensor"),
    # the config
    "a truth for a size": (having("config", num_heads=True), "its config has True for num_heads"),
    "a negative length": (having("config", source_length=-1), "source_length must be at least 1"),
    "another vocabulary size": (having("config", vocab_size=10), "differ in size"),
    "layers without end": (having("config", num_encoder_layers=10**6), "do not fit together: num_encoder_layers"),
    "a gigantic target": (having("config", target_length=10**100), "more memory than its weights"),
    # the facts
    "no loss": (lambda content: content["metrics"].pop("nats_per_char"), "its metrics lack a loss"),
    "a loss that is no number": (having("metrics", nats_per_char=math.nan), "its metrics lack a loss"),
    "a history without steps": (having("metrics", history=[{"nats_per_char": 1.0}]), "its history"),
    "a metric without a name": (lambda content: content["metrics"].update({1: 2}), "its metrics are not what JSON"),
    "a text without a hash": (having("corpus", sha256=7), "its corpus lacks"),
    "a negative split": (having("corpus", train_characters=-1), "its corpus lacks"),
    "a tuple among the arguments": (having("training_args", betas=(1, 2)), "its training_args are not what JSON"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_parts_that_do_not_fit_are_refused(name: str, path: Path) -> None:
    change, said = CHANGES[name]
    content = contents(path)
    change(content)
    torch.save(content, path)
    refused(path, said)


def test_what_is_odd_but_harmless_is_used(path: Path) -> None:
    content = contents(path)
    content["training_args"] = {"extra": {"nested": [1, None, "\ud800"]}, "betas": [0.9, 0.95]}
    content["metrics"] = {"nats_per_char": 1, "train_nats_per_char": math.nan, "perplexity": None, "other": "x"}
    content["metrics"]["history"] = [{"step": 1}, {"step": 2, "nats_per_char": None, "train_nats_per_char": math.nan}]
    content["corpus"]["name"] = "caf\udce9\n`.txt"
    content["environment"] = {}
    content["extra"] = {"of": "a later version"}
    content["config"].pop("dropout")
    content["model_state_dict"] = OrderedDict(content["model_state_dict"])
    torch.save(content, path)
    checkpoint = load_checkpoint(path)
    assert len(TextGenerator(checkpoint.build_model(), checkpoint.vocabulary()).generate("", 9, Sampling())) == 9
    assert "caf" in render_card(checkpoint, "alice/m", {}, None)


@pytest.mark.slow
def test_fuzzing_a_little() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "campaigns" / "fuzz.py"), "--count", "60"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "60 model files, 60 JSON files" in done.stdout
