"""The repository's notebook, which the Hub offers to open in Colab and Kaggle; its text is published/notebook.md."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

NOTEBOOK = "notebook.ipynb"
_TEXT = Path(__file__).parent / "published" / "notebook.md"


def render_notebook(repo_id: str, prompt: str) -> str:
    """The notebook of a repository, `owner/name`: a cell to run for each Python block, and cells to read between them.

    Args:
        prompt: what its model continues at first; may be empty.
    """
    values = {"OWNER/NAME": repo_id, "NAME": repo_id.partition("/")[2], "PROMPT": json.dumps(prompt)}
    text = re.sub("|".join(values), lambda name: values[name[0]], _TEXT.read_text(encoding="utf-8"))
    cells: list[dict[str, Any]] = []
    for number, part in enumerate(re.split(r"```python\n(.*?)```\n", text, flags=re.DOTALL)):
        cell: dict[str, Any] = {"cell_type": "markdown", "id": f"cell-{number}", "metadata": {}}
        if number % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        if part.strip():
            cells.append(cell | {"source": part.strip().splitlines(keepends=True)})
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"
