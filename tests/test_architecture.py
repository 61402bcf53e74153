"""The house stays as design.md draws it: imports run downwards, the wings do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.push_client import ROOT

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("charseq2seq", "data")
    for path in (ROOT / folder).rglob("*.py")
} | {path.stem: path for path in ROOT.glob("*.py")}

# Each floor may import from those below it, and its files from one another.
FLOORS = [
    {"encoder_decoder_transformer", "errors", "arguments", "command_line"},
    {"files", "device"},
    {"vocabulary", "console"},
    {"corpus", "checkpoint", "data", "options"},
    {"windows", "numpy_decoder", "generation"},
    {"training", "publishing"},
    {"train_transformer", "push_to_huggingface"},
]


def floor_of(module: str) -> int:
    """The floor that a module stands on."""
    parts = module.split(".")
    name = parts[1] if parts[0] == "charseq2seq" and len(parts) > 1 else parts[0]
    return next((number for number, names in enumerate(FLOORS) if name in names), -1)


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
    for imported in imports_of(SOURCES[module]):
        assert floor_of(imported) <= floor_of(module), f"{module} imports {imported}"
        wings = {"charseq2seq.training", "charseq2seq.publishing"}
        mine = [wing for wing in wings if module.startswith(wing)]
        assert not mine or not imported.startswith(tuple(wings - set(mine))), f"{module} imports {imported}"


def test_there_are_no_circles() -> None:
    def reachable(module: str, seen: set[str]) -> set[str]:
        for imported in imports_of(SOURCES[module]) - seen:
            seen.add(imported)
            reachable(imported, seen)
        return seen

    assert not [module for module in SOURCES if module in reachable(module, set())]


def test_the_model_stands_alone() -> None:
    assert imports_of(ROOT / "encoder_decoder_transformer.py") == set()
