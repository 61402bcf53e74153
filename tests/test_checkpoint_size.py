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
    """Two to the power of fourteen lists when it is written out, and more."""
    shared: list[Any] = ["x" * 1000]
    for _ in range(14):
        shared = [shared, shared]
    content["environment"] = {"of": shared, "and": shared}
    for _ in range(12):
        content["environment"] = {"of": content["environment"], "and": content["environment"]}


def bomb_of_long_words(content: Content) -> None:
    """One long word, written two hundred thousand times."""
    word = "x" * 500_000
    content["environment"] = {"words": [word] * 200_000}


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


def packed(path: Path, parts: dict[str, bytes]) -> None:
    """Fifty million zeros, packed."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in parts.items():
            archive.writestr(f"archive/{name}", content)
        with archive.open("archive/data/zeros", "w") as file:
            for _ in range(5):
                file.write(bytes(10_000_000))


def long_number(path: Path, parts: dict[str, bytes]) -> None:
    """A storage said to be larger than its bytes: reading on would read another's memory."""
    content = parts["data.pkl"]
    start = content.index(b"FloatStorage")
    at = content.index(b"cpu", start) + 3
    at += content[at:].index(b"M")  # a number of two bytes
    write = content[: at + 1] + b"\xff\xff" + content[at + 3 :]
    path.write_bytes(write_parts(parts | {"data.pkl": write}))


BOMBS: dict[Callable[[Content], None], str] = {
    bomb_of_shared_lists: "not what JSON can hold",
    bomb_of_long_words: "not what JSON can hold",
    deep: "not what JSON can hold",
    repeated_numbers: "its weights are larger than the file",
    large_pickle: "not laid out as a checkpoint",
}
ARCHIVES: dict[Callable[[Path, dict[str, bytes]], None], str] = {
    packed: "a zip bomb",
    long_number: "RuntimeError",
}


def assert_small(path: Path, said: str) -> None:
    """Assert that a file is refused for this reason, and within the memory that is promised."""

    def load() -> None:
        with pytest.raises(SuiteError, match=said):
            load_checkpoint(path)

    assert peak_memory(load) < 4 * path.stat().st_size + MEMORY_ALLOWANCE


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_small_content_stays_small(bomb: Callable[[Content], None], tmp_path: Path) -> None:
    path = tmp_path / "transformer_model.pth"
    save_checkpoint(path, tiny_checkpoint())
    content = torch.load(path, weights_only=True)
    bomb(content)
    torch.save(content, path)
    assert_small(path, BOMBS[bomb])


@pytest.mark.parametrize("make", ARCHIVES)
def test_a_small_archive_stays_small(make: Callable[[Path, dict[str, bytes]], None], tmp_path: Path) -> None:
    path = tmp_path / "transformer_model.pth"
    save_checkpoint(path, tiny_checkpoint())
    make(path, read_parts(path.read_bytes()))
    assert_small(path, ARCHIVES[make])
