"""Run by proof.py in a fresh process that knows nothing but a repository folder: does it work for a stranger?

    python -E -s -B prove_folder.py FOLDER

Strict loading of both weight files into `Transformer(**config)`, identical logits from both, then usage_example.py as
a stranger runs it. The output is the example's; the reason why not is the exit message.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Load both weight files, compare what they make of the same input, and run the example."""
    example = str(folder / "usage_example.py")
    sys.path[0], sys.argv = str(folder), [example]  # this file's own folder is none of a stranger's
    import torch
    from safetensors.torch import load_file

    from encoder_decoder_transformer import Transformer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    saved = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    lengths = [config["source_length"], config["target_length"]]
    source, target = (torch.randint(config["vocab_size"], (2, one), generator=generator) for one in lengths)
    logits = []
    for weights in (saved["model_state_dict"], load_file(folder / "model.safetensors")):
        model = Transformer(**config)
        model.load_state_dict(weights, strict=True)
        model.eval()
        with torch.inference_mode():
            logits.append(model(source, target))
    if not torch.isfinite(logits[0]).all():
        sys.exit("the model's logits are not finite")
    if not torch.equal(*logits):
        sys.exit("pytorch_model.bin and model.safetensors do not hold the same weights")
    del sys.modules["encoder_decoder_transformer"]  # the example has to find it by itself
    runpy.run_path(example, run_name="__main__")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
