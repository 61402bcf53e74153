"""Small model files that would be large in memory are refused within a small memory."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.campaigns.fuzz import MEMORY_ALLOWANCE, read_parts, write_parts
from benchmarks.machine import peak_memory
from charseq2seq.checkpoint import load_checkpoint, save_checkpoint
from charseq2seq.errors import SuiteError
from tests.push_client import tiny_checkpoint

Content = dict[str, Any]


def bomb_of_shared_lists(content: Content) -> None:
    """A thousand characters, two to the power of thirteen times when it is written out."""
    shared: list[Any] = ["x" * 1000]
    for _ in range(13):
        shared = [shared, shared]
    content["environment"] = {"of": shared}


def deep(content: Content) -> None:
    """A list in a list in a list."""
    nested: list[Any] = []
    for _ in range(100):
        nested = [nested]
    content["environment"] = {"nested": nested}


def repeated_numbers(content: Content) -> None:
    """One number, claimed to be ten thousand million."""
    content["model_state_dict"]["head.weight"] = torch.zeros(1).expand(100_000, 100_000)


def large_pickle(content: Content) -> None:
    """Three million boxes, a byte each."""
    content["environment"] = {"boxes": [{} for _ in range(600_000)]}


def packed(path: Path) -> None:
    """Fifty million zeros, packed."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data/zeros", bytes(50_000_000))


def long_number(path: Path) -> None:
    """A storage said to be larger than its bytes: reading on would read another's memory."""
    parts = read_parts(path.read_bytes())
    content = parts["data.pkl"]
    start = content.index(b"FloatStorage")
    at = content.index(b"cpu", start) + 3
    at += content[at:].index(b"M")  # a number of two bytes
    write = content[: at + 1] + b"\xff\xff" + content[at + 3 :]
    path.write_bytes(write_parts(parts | {"data.pkl": write}))


def holding(bomb: Callable[[Content], None]) -> Callable[[Path], None]:
    """A change of what a file holds."""

    def change(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        bomb(content)
        torch.save(content, path)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (holding(bomb_of_shared_lists), "not what JSON can hold"),
        (holding(lambda content: content["environment"].update(of=[[0] * 3000] * 3000)), "not what JSON can hold"),
        (holding(deep), "not what JSON can hold"),
        (holding(repeated_numbers), "its weights are larger than the file"),
        (holding(large_pickle), "not laid out as a checkpoint"),
        (packed, "a zip bomb"),
        (long_number, "RuntimeError"),
    ],
)
def test_a_small_file_stays_small(change: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    path = tmp_path / "transformer_model.pth"
    save_checkpoint(path, tiny_checkpoint())
    change(path)

    def load() -> None:
        with pytest.raises(SuiteError, match=said):
            load_checkpoint(path)

    assert peak_memory(load) < 4 * path.stat().st_size + MEMORY_ALLOWANCE
