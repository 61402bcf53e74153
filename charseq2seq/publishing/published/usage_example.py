"""Load this model and write some text with it; encoder_decoder_transformer.py has to be beside this file.

    pip install -r requirements.txt
    python usage_example.py                                # with the other files of the repository beside it
    python usage_example.py owner/name --prompt "JULIET:"  # fetches them from the Hub

It loads weights only: no code from the weight file is ever run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from encoder_decoder_transformer import Transformer


def main() -> None:
    """Generate text after a prompt and print both."""
    parser = argparse.ArgumentParser(description="Write text with this model.")
    parser.add_argument("repo_id", nargs="?", help="repository on the Hub (default: the files beside this script)")
    parser.add_argument("--prompt", default="ROMEO:", help="text to continue")
    parser.add_argument("--num_chars", type=int, default=300, help="characters to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is the likeliest text, 1 the wildest")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed writes the same text")
    args = parser.parse_args()

    try:
        model = Transformer.from_pretrained(args.repo_id or Path(__file__).resolve().parent)
    except ValueError as error:
        sys.exit(f"{error}\nTo fetch the model from the Hub, name its repository: usage_example.py owner/name")
    prompt = "".join(character for character in args.prompt if character in model.vocab)  # it knows no others
    written = model.write(prompt, args.num_chars, temperature=args.temperature, seed=args.seed)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # whatever the terminal's code page is
    print(prompt + written)


if __name__ == "__main__":
    main()
