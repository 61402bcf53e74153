"""Run by proof.py in a fresh process that knows nothing but a repository folder: do its weights load and agree?

    python -E -s -B prove_folder.py FOLDER

Strict loading of both weight files into `Transformer(**config)`, and identical logits from both.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Prove the folder; the reason why not is the exit message."""
    sys.path[0] = str(folder)  # this file's own folder is none of a stranger's
    import torch
    from safetensors.torch import load_file

    from encoder_decoder_transformer import Transformer

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    both = [
        torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)["model_state_dict"],
        load_file(folder / "model.safetensors"),
    ]
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(config["vocab_size"], (2, config["source_length"]), generator=generator)
    target = torch.randint(config["vocab_size"], (2, config["target_length"]), generator=generator)
    logits = []
    for weights in both:
        model = Transformer(**config)
        model.load_state_dict(weights, strict=True)
        model.eval()
        with torch.inference_mode():
            logits.append(model(source, target))
    if not torch.isfinite(logits[0]).all():
        sys.exit("the model's logits are not finite")
    if not torch.equal(*logits):
        sys.exit("pytorch_model.bin and model.safetensors do not hold the same weights")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
