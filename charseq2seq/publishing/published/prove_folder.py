"""Run by proof.py in a fresh process that knows nothing but a repository folder: does it work for a stranger?

    python -E -s -B prove_folder.py FOLDER

It tries every way to the model that needs no browser. The output is that of usage_example.py, the reason why not is the
exit message.
"""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def main(folder: Path) -> None:
    """Load both weight files, compare what they make of the same input, and run the example and the notebook."""
    example = str(folder / "usage_example.py")
    sys.path[0], sys.argv = str(folder), [example]  # this file's own folder is none of a stranger's
    import torch

    from encoder_decoder_transformer import Transformer

    config, record = (json.loads((folder / name).read_text("utf-8")) for name in ("config.json", "training_args.json"))
    by_hand, loaded = Transformer(**config), Transformer.from_pretrained(folder)  # the latter reads model.safetensors
    saved = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    by_hand.load_state_dict(saved["model_state_dict"])
    (folder / "model.safetensors").stat()  # without it, `from_pretrained` has taken the other file
    generator = torch.Generator().manual_seed(0)
    lengths = [config["source_length"], config["target_length"]]
    source, target = (torch.randint(config["vocab_size"], (2, one), generator=generator) for one in lengths)
    with torch.inference_mode():
        logits = [model(source, target) for model in (by_hand.eval(), loaded)]
    if not torch.isfinite(logits[0]).all():
        sys.exit("the model's logits are not finite")
    if not torch.equal(*logits):
        sys.exit("pytorch_model.bin and model.safetensors do not hold the same weights")
    loaded.write("", 20)
    for name in (name for name in record["files"] if name.startswith("runs/")):
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        steps = [event.step for event in EventFileLoader(str(folder / name)).Load() if not event.file_version]
        if steps != [row["step"] for row in record["metrics"]["history"]]:
            sys.exit(f"TensorBoard cannot read {name}")
    del sys.modules["encoder_decoder_transformer"]  # the example has to find it by itself
    runpy.run_path(example, run_name="__main__")
    try:
        run_notebook(folder)
    except Exception as error:
        sys.exit(f"notebook.ipynb does not run: {error!r}")


def run_notebook(folder: Path) -> None:
    """Run its first two cells, which load the model and let it write; the others draw and train."""
    hub: Any = SimpleNamespace(snapshot_download=lambda *_, **__: str(folder))  # what the Hub would send is here
    sys.modules["huggingface_hub"] = hub
    sys.modules.pop("encoder_decoder_transformer", None)
    sys.path.remove(str(folder))  # the notebook has to find it by itself, too
    cells = json.loads((folder / "notebook.ipynb").read_text("utf-8"))["cells"]
    load, write, *_ = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as elsewhere:
        program = Path(elsewhere, "cells.py")
        program.write_text(load + "\n" + write.replace("300", "30"), "utf-8")  # so many characters tell that it writes
        runpy.run_path(str(program))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
