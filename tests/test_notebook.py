"""The published notebook: every cell runs in a fresh kernel that has the Hub and nothing of the suite."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from charseq2seq.publishing.notebook import render_notebook
from tests.hub.server import HubServer
from tests.push_client import PLAYS, REPO, Publisher, tiny_checkpoint


def outputs(cell: Any) -> str:
    """What a cell printed."""
    return "".join(output["text"] for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.slow
@pytest.mark.parametrize(("sha256", "prompt"), [(PLAYS, "ROMEO:"), ("f" * 64, "")])
def test_every_cell_runs(sha256: str, prompt: str, hub: HubServer, tmp_path: Path) -> None:
    publisher = Publisher(hub, tmp_path / "alice", tiny_checkpoint(sha256=sha256))
    assert publisher.push().code == 0
    text = hub.repo(REPO).files()["notebook.ipynb"].decode()
    notebook = nbformat.reads(text.replace("steps = 300", "steps = 2"), as_version=4)
    nbformat.validate(notebook)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "my_text.txt").write_text("We sail, we sail!\n" * 20, encoding="utf-8")
    client = NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(stranger)}})
    client.execute(env=hub.environment(stranger) | {"OMP_NUM_THREADS": "1"})

    load, write, curve, train, again = (cell for cell in notebook.cells if cell.cell_type == "code")
    weights = tiny_checkpoint().model_state_dict.values()
    assert outputs(load) == f"{sum(tensor.numel() for tensor in weights):,} parameters\n"
    samples = outputs(write).split("--- temperature ")[1:]
    assert [sample.partition("\n\n")[0] for sample in samples] == ["0.5", "0.8", "1.1"]
    assert all(len(sample.partition("\n\n")[2]) > 300 and f"\n\n{prompt}" in sample for sample in samples)
    (picture,) = (output.data["image/png"] for output in curve.outputs if "image/png" in output.get("data", {}))
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert "step 2: " in outputs(train) and set(outputs(train).partition("character\n\n")[2]) <= {*"We sail,w!\n"}
    assert len(outputs(again)) == 101 and (stranger / "my_model" / "model.safetensors").exists()


def test_names_are_filled_in_once() -> None:
    notebook = nbformat.reads(render_notebook("NAME/PROMPT", 'a"b'), as_version=4)
    assert notebook.cells[0].source.startswith("# PROMPT\n")
    cells = "\n".join(cell.source for cell in notebook.cells)
    assert 'snapshot_download("NAME/PROMPT",' in cells and 'prompt = "a\\"b"\n' in cells
