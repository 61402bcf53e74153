"""Load this model and write some text with it.

    pip install -r requirements.txt
    python usage_example.py                                # with the files of the repository beside it
    python usage_example.py owner/name --prompt "JULIET:"  # fetches them from the Hub

It loads weights only: no code from the weight file is ever run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch


def find_file(name: str, repo_id: str | None) -> Path:
    """The file beside this script, or else downloaded from the repository."""
    beside = Path(__file__).resolve().with_name(name)
    if beside.exists():
        return beside
    if repo_id is None:
        sys.exit(f"{name} is not beside this script; name the repository to fetch it from, e.g. owner/name.")
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo_id, name))


def main() -> None:
    """Generate text after a prompt and print both."""
    parser = argparse.ArgumentParser(description="Write text with this model.")
    parser.add_argument("repo_id", nargs="?", help="repository on the Hub, for files that are not beside this script")
    parser.add_argument("--prompt", default="ROMEO:", help="text to continue")
    parser.add_argument("--num_chars", type=int, default=300, help="characters to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is the likeliest text, 1 the wildest")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed writes the same text")
    args = parser.parse_args()

    sys.path.insert(0, str(find_file("encoder_decoder_transformer.py", args.repo_id).parent))
    from encoder_decoder_transformer import Transformer

    config = json.loads(find_file("config.json", args.repo_id).read_text(encoding="utf-8"))
    vocab = json.loads(find_file("vocab.json", args.repo_id).read_text(encoding="utf-8"))
    weights = torch.load(find_file("pytorch_model.bin", args.repo_id), map_location="cpu", weights_only=True)
    model = Transformer(**config)
    model.load_state_dict(weights["model_state_dict"])
    model.eval()

    token_of_index = {index: token for token, index in vocab.items()}
    prompt = "".join(character for character in args.prompt if character in vocab)  # it knows no others
    source = torch.tensor([[vocab[character] for character in prompt]], dtype=torch.long)
    generator = torch.Generator().manual_seed(args.seed)
    written = model.generate(source, args.num_chars, temperature=args.temperature, generator=generator)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the terminal's code page is
    print(prompt + "".join(token_of_index[index] for index in written[0].tolist()))


if __name__ == "__main__":
    main()
