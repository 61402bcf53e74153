"""The suite stays as it was designed: imports run downwards, nothing is there twice, and it can be read."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("charseq2seq", "data")
    for path in (ROOT / folder).rglob("*.py")
    if path.parent.name != "published"  # what runs elsewhere
} | {path.stem: path for path in ROOT.glob("*.py")}
TESTS, BENCHMARKS = (sorted((ROOT / folder).rglob("*.py")) for folder in ("tests", "benchmarks"))

# Each floor may import from those below it, and its files from one another.
FLOORS = [
    {"encoder_decoder_transformer", "errors", "command_line", "__init__"},
    {"files", "gpu_kernels", "text_encoding"},
    {"vocabulary", "console", "device"},
    {"corpus", "checkpoint", "data", "options"},
    {"windows", "numpy_decoder", "generation", "interactive", "demo"},
    {"training", "publishing"},
    {"train_transformer", "push_to_huggingface"},
]


FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def name_of(module: str) -> str:
    """The name by which `FLOORS` knows a module."""
    return module.removeprefix("charseq2seq.").split(".")[0]


def imports_of(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in SOURCES and name != "charseq2seq"}


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_run_downwards(module: str) -> None:
    assert (name := name_of(module)) in FLOOR_OF
    for imported in map(name_of, imports_of(SOURCES[module])):
        assert FLOOR_OF[imported] <= FLOOR_OF[name] and {imported, name} != {"training", "publishing"}, imported


def test_there_are_no_circles() -> None:
    TopologicalSorter({module: imports_of(path) for module, path in SOURCES.items()}).prepare()  # raises CycleError


def test_the_model_stands_alone() -> None:
    assert imports_of(ROOT / "encoder_decoder_transformer.py") == set()


def test_no_test_imports_a_test() -> None:
    for path in TESTS:
        assert not re.search(r"^\s*(from|import) [\w.]*\btest_", path.read_text(encoding="utf-8"), re.MULTILINE), path


# --- nothing twice

SAME_LINES = 6


def lines_that_count(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of a file's lines: no imports, comments, signatures, and nothing as short as a bracket."""
    text, left_out = path.read_text(encoding="utf-8"), set[int]()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            left_out |= set(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            left_out |= set(range(node.lineno, (node.end_lineno or 0) + 1))
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        if len(words) > 3 and not words.startswith("#") and number not in left_out:
            yield number, words


def test_no_two_places_share_six_lines() -> None:
    places = defaultdict(list)
    for path in [*SOURCES.values(), *(ROOT / "charseq2seq").rglob("published/*.py"), *TESTS, *BENCHMARKS]:
        lines = list(lines_that_count(path))
        for at in range(len(lines) - SAME_LINES + 1):
            words = tuple(line for _, line in lines[at : at + SAME_LINES])
            places[words].append(f"{path.relative_to(ROOT)}:{lines[at][0]}")
    twice = [found for found in places.values() if len(found) > 1]
    assert not twice, "\n".join(" and ".join(found) for found in twice)


# --- ceilings: raise one only with a reason in the same commit

# 2026-11-28: of these some 5,900 are the suite as it was rebuilt (6,200 were planned). The rest came afterwards, where
# 1,000 were planned: 420 for the GPU, 850 for busy machines, power cuts, bad surroundings and short texts, 650 for the
# page, the notebook, metrics, the terminal and `from_pretrained`.
SUITE, ROUTE, FILE, ALL_TESTS = 7_800, 2_820, 450, 11_500
LONG_FILES = {
    "encoder_decoder_transformer.py": 735,  # one file on purpose: it is published as it stands and needs no other
}
ROUTE_FILES = re.findall(r"^\| \[(\S+\.py)\]", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)


def lines_of(paths: list[Path]) -> int:
    """The lines of several files, blank ones and comments included."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def test_the_suite_can_be_read() -> None:
    suite = [*SOURCES.values(), *(ROOT / "charseq2seq").rglob("published/*.py")]
    assert lines_of(suite) <= SUITE
    assert lines_of([ROOT / name for name in ROUTE_FILES]) <= ROUTE
    assert lines_of(TESTS) <= ALL_TESTS


def test_no_file_is_long() -> None:
    for path in [*SOURCES.values(), *TESTS, *BENCHMARKS]:
        name = path.relative_to(ROOT).as_posix()
        assert lines_of([path]) <= LONG_FILES.get(name, FILE), name
    assert all(lines_of([ROOT / name]) > FILE for name in LONG_FILES), "no longer long: take it off the list"
