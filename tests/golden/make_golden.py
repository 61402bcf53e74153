"""Small models with what they must compute, for every implementation of the decoder: PyTorch, numpy and JavaScript.

    python -m tests.golden.make_golden

A folder for each shape holds the model as it is published, and `expected.json`:

    prompt      a text
    source      the ids that the encoder reads: the prompt's last `source_length` characters
    target      ids that may follow it
    logits      of every target id, given the source and the target ids before it, (target_length, vocab_size)
    num_chars   the number of characters in `greedy`
    greedy      what follows the prompt if the likeliest character is always taken, through several sources
    sampled     for one row of logits: temperature, top_p, a random number from 0 to below 1, and the id it samples

The logits are those of the independent implementation, in float64.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from charseq2seq.vocabulary import CharVocabulary
from encoder_decoder_transformer import Transformer, sample
from tests.reference_model import Reference

HERE = Path(__file__).parent
TEXT = 'to be, or not:\né😀"\\'  # JSON escapes some, and the emoji is two units of UTF-16
SIZES: dict[str, Any] = {"d_model": 16, "num_heads": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "d_ff": 24}
SIZES |= {"source_length": 7, "target_length": 9, "num_kv_heads": 1}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "multi_head": ("to be or not", {"num_kv_heads": 2}),
    "grouped_heads": ("be", {"num_heads": 4, "num_kv_heads": 2}),
    "empty_prompt": ("", {}),
    "layers_without_bigram": ("not é 😀", {"num_encoder_layers": 2, "num_decoder_layers": 2, "bigram": False}),
}
NUM_CHARS = 40
SMALLEST_GAP = 1e-3  # between the two largest logits, so that rounding does not decide


def random_model(seed: int, vocabulary: CharVocabulary, **sizes: Any) -> Transformer:
    """A model none of whose weights are zero; its numbers are short, so that all arithmetic begins alike."""
    torch.manual_seed(seed)
    model = Transformer(len(vocabulary), **SIZES | sizes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_((weight + torch.randn_like(weight) * 0.4).mul_(256).round_().div_(256))
    model.vocab = vocabulary.index_of_token()
    return model


def expected(model: Transformer, prompt: str) -> dict[str, Any]:
    """The content of expected.json; raises ValueError where the likeliest character is a close call."""
    source = [model.vocab[character] for character in prompt][-model.source_length :]
    greedy, written = "", list(source)
    ids = [model.vocab[character] for character in model.write(prompt, NUM_CHARS, temperature=0)]
    reference, token_of = Reference(model), {number: token for token, number in model.vocab.items()}
    target = ids[: model.target_length]
    logits = reference.logits(source, target)
    for first in range(0, NUM_CHARS, model.target_length):
        piece = ids[first : first + model.target_length]
        rows = reference.logits(written[-model.source_length :], piece)
        rows[:, model.start_id] = -math.inf
        best = rows.topk(2).values
        if rows.argmax(dim=1).tolist() != piece or float((best[:, 0] - best[:, 1]).min()) < SMALLEST_GAP:
            raise ValueError("a close call")
        written += piece
        greedy += "".join(token_of[number] for number in piece)
    sampled = []
    row = logits[-1:].float()
    row[:, model.start_id] = -math.inf
    for temperature, top_p in ((1.0, None), (0.7, 0.9), (1.5, 0.5)):
        for random in (0.0, 0.25, 0.5, 0.75, 0.984375):
            number = int(sample(row, torch.tensor([random]), temperature, None, top_p))
            sampled.append({"temperature": temperature, "top_p": top_p, "random": random, "id": number})
    rounded = [[round(float(logit), 6) for logit in row] for row in logits]
    return {
        "prompt": prompt,
        "source": source,
        "target": target,
        "logits": rounded,
        "num_chars": NUM_CHARS,
        "greedy": greedy,
        "sampled": sampled,
    }


def main() -> None:
    """Write all folders: of each shape the first model that always knows which character is the likeliest."""
    vocabulary = CharVocabulary(sorted(set(TEXT)))
    for name, (prompt, sizes) in SHAPES.items():
        for seed in range(1000):
            model = random_model(seed, vocabulary, **sizes)
            try:
                content = expected(model, prompt)
            except ValueError:
                continue
            if len(set(content["greedy"])) < 8:  # one character over and over would test little
                continue
            model.save_pretrained(HERE / name)
            text = json.dumps(content).replace('], "', '],\n "').replace("], [", "],\n  [")
            (HERE / name / "expected.json").write_text(text + "\n", encoding="utf-8")
            print(f"{name}: seed {seed}, {content['greedy']!r}")
            break


if __name__ == "__main__":
    main()
