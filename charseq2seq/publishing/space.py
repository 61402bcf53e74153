"""The page that writes: what goes into the static Space beside a model's repository."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from charseq2seq.files import atomic_write_text
from charseq2seq.publishing.card import space_of
from charseq2seq.publishing.folder import json_text
from charseq2seq.publishing.hub import CARD, RECORD
from charseq2seq.publishing.merge import seal

_PAGE = Path(__file__).parent / "published" / "demo"
_MODEL_FILES = ("model.safetensors", "config.json", "vocab.json")  # what the page reads
_PLACEHOLDER = "<!-- the model's address -->"  # in index.html


def build_space(folder: Path, model: Path, repo_id: str, record: dict[str, Any]) -> dict[str, Any]:
    """Write the Space of a model into an empty folder; returns its record, as `build_folder` does.

    `model` is the folder of the model's files, `record` theirs.
    """
    for name in _MODEL_FILES:
        shutil.copyfile(model / name, folder / name)
    address = f'<a href="https://huggingface.co/{repo_id}" target="_blank" rel="noopener">About this model</a>'
    texts = {path.name: path.read_text(encoding="utf-8").replace(_PLACEHOLDER, address) for path in _PAGE.iterdir()}
    texts[CARD] = space_card(repo_id)
    record = record | {"files": sorted([*texts, *_MODEL_FILES, RECORD])}
    for name, text in {**texts, RECORD: json_text(record)}.items():
        atomic_write_text(folder / name, text)
    return record


def space_card(repo_id: str) -> str:
    """The README.md of a Space; its metadata tells the Hub how to serve it."""
    name = repo_id.partition("/")[2]
    return seal(f"""---
title: {json.dumps(name)}
emoji: 🖋️
colorFrom: indigo
colorTo: yellow
sdk: static
short_description: A small Transformer that writes in your browser
models:
- {repo_id}
---

<!-- charseq2seq begins: {space_of(repo_id)} (this part is made anew at each push; write above or below it) -->

# {name}: a page that writes

This page runs [{repo_id}](https://huggingface.co/{repo_id}) in your browser. Nothing that you type leaves it.

<!-- charseq2seq ends -->
""")
