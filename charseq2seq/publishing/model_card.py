"""The README.md of a repository: metadata for the Hub's search, and a text that a reader finishes.

Everything in it comes from the checkpoint. How it lives with what people write on the Hub: card_merge.py.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from charseq2seq.checkpoint import Checkpoint
from charseq2seq.publishing.card_merge import marked
from charseq2seq.publishing.samples import SEED, Sample, is_shakespeare

TAGS = ["pytorch", "encoder-decoder", "text2text-generation", "character-level"]
# Texts that can be had from the Hub, by the sha256 of the whole text.
_DATASETS = {"86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed": "karpathy/tiny_shakespeare"}
# What a checkpoint tells of its run that does not change the model, or is said by another flag.
_NO_FLAGS = {"data", "device", "compile", "num_threads", "log_interval", "max_minutes"}
_NO_FLAGS |= {"parallel", "accumulation_steps", "gradient_checkpointing"}

_PARTS = {
    "embedding": "a character and the three before it to a vector, for both sides",
    "encoder": "reads the source in both directions",
    "decoder": "writes the target, one character at a time",
    "head": "vectors to characters",
    "bigram": "what usually follows the previous character",
}


def render_card(checkpoint: Checkpoint, repo_id: str, samples: Sequence[Sample], curve: str | None) -> str:
    """The complete README.md of a new repository.

    Args:
        checkpoint: the model; what its metrics do not tell is left out.
        repo_id: `owner/name`, for the examples.
        samples: text that this model wrote.
        curve: file name of the training-curve picture, None where there is none.
    """
    from huggingface_hub import ModelCard

    sections = [
        _introduction(checkpoint, repo_id),
        _samples(samples),
        _usage(repo_id),
        _evaluation(checkpoint.metrics, curve),
        _architecture(checkpoint),
        _training(checkpoint),
        _limits(checkpoint),
    ]
    block = marked("\n\n".join(sections), repo_id)
    return str(ModelCard(f"---\n{_metadata(checkpoint, repo_id).to_yaml()}\n---\n\n{block}\n"))


def _metadata(checkpoint: Checkpoint, repo_id: str) -> Any:
    """The card's YAML as `ModelCardData`; language and licence only where the text is known to allow it."""
    from huggingface_hub import EvalResult, ModelCardData

    metrics, corpus = checkpoint.metrics, checkpoint.corpus
    names = {"nats_per_char": "Nats per character", "bits_per_char": "Bits per character", "perplexity": "Perplexity"}
    results = [
        EvalResult(
            task_type="text-generation",
            task_name="Character-level continuation",
            dataset_type=str(corpus.get("name", "text")),
            dataset_name=str(corpus.get("name", "text")),
            dataset_split="validation",
            dataset_args={"sha256": corpus.get("sha256")},
            metric_type=kind,
            metric_name=name,
            metric_value=float(value),
        )
        for kind, name in names.items()
        if (value := _number(metrics, kind, ".4f"))
    ]
    known = is_shakespeare(corpus)
    dataset = _DATASETS.get(str(corpus.get("sha256")))
    return ModelCardData(
        language="en" if known else None,
        license="apache-2.0" if known else None,
        datasets=[dataset] if dataset else None,
        library_name="pytorch",
        pipeline_tag="text-generation",
        tags=TAGS + ["shakespeare"] * known,
        model_name=repo_id.partition("/")[2],
        eval_results=results or None,
    )


def _introduction(checkpoint: Checkpoint, repo_id: str) -> str:
    corpus, metrics = checkpoint.corpus, checkpoint.metrics
    total = sum(tensor.numel() for tensor in checkpoint.model_state_dict.values())
    subject = "Shakespeare's plays" if is_shakespeare(corpus) else f"the text `{corpus.get('name', 'unknown')}`"
    text = (
        f"# {repo_id.partition('/')[2]}\n\nA small Transformer that continues text, character by character: {total:,} "
        f"parameters, trained from scratch on {subject}. Its encoder reads a piece of text in both directions; its "
        "decoder writes what follows"
    )
    if loss := _number(metrics, "nats_per_char", ".4f"):
        text += f". On text that it never saw it reaches **{loss} nats per character**"
    if loss and (choices := _number(metrics, "perplexity", ".1f")):
        alphabet = checkpoint.config["vocab_size"] - 1
        text += (
            f": it is as unsure as if it chose among {choices} characters each time, where its alphabet has {alphabet}"
        )
    return (
        f"{text}.\n\nThe model is one file that needs nothing but PyTorch and is written to be read, "
        "[`encoder_decoder_transformer.py`](encoder_decoder_transformer.py)."
    )


def _samples(samples: Sequence[Sample]) -> str:
    pieces = [f"## What it writes\n\nUnedited, with seed {SEED}, cut off where it stood."]
    for sample in samples:
        # A fence longer than any run of backticks in the text cannot be closed by it.
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", sample.text)), default=0))
        start = f"after the prompt `{sample.prompt}`" if sample.prompt else "without a prompt"
        pieces.append(f"At temperature {sample.temperature}, {start}:\n\n{fence}text\n{sample.text}\n{fence}")
    return "\n\n".join(pieces)


def _usage(repo_id: str) -> str:
    return f"""## How to use it

The short way: fetch two files and run one.

```bash
pip install torch numpy huggingface_hub
hf download {repo_id} usage_example.py encoder_decoder_transformer.py --local-dir model
python model/usage_example.py {repo_id} --prompt "JULIET:" --num_chars 500
```

In a program of your own, with `encoder_decoder_transformer.py` from this repository beside it:

```python
from huggingface_hub import hf_hub_download
model_path = hf_hub_download("{repo_id}", "pytorch_model.bin")
config_path = hf_hub_download("{repo_id}", "config.json")
vocab_path = hf_hub_download("{repo_id}", "vocab.json")

import torch
import json
from encoder_decoder_transformer import Transformer

with open(config_path) as f:
    config = json.load(f)
with open(vocab_path) as f:
    vocab = json.load(f)

model = Transformer(**config)
checkpoint = torch.load(model_path, map_location="cpu")
model.load_state_dict(checkpoint["model_state_dict"])
model.eval()

source = torch.tensor([[vocab[character] for character in "JULIET:" if character in vocab]], dtype=torch.long)
written = model.generate(source, 300, temperature=0.8)
character_of = {{index: character for character, index in vocab.items()}}
print("".join(character_of[index] for index in written[0].tolist()))
```

`model.safetensors` holds the same weights in a format that cannot contain code."""


def _evaluation(metrics: Mapping[str, Any], curve: str | None) -> str:
    labels = {
        "nats_per_char": ("validation loss, nats per character", ".4f"),
        "bits_per_char": ("the same in bits per character", ".4f"),
        "perplexity": ("perplexity per character", ".3f"),
        "train_nats_per_char": ("training loss at the end, nats per character", ".4f"),
        "characters": ("characters scored", ",.0f"),
        "max_context": ("longest context, characters", ",.0f"),
    }
    rows = [(label, text) for name, (label, form) in labels.items() if (text := _number(metrics, name, form))]
    picture = f"\n\n![Training and validation loss over the run]({curve})" if curve else ""
    return (
        f"## How good it is\n\n{_table(('measure', 'value'), rows)}\n\nMeasured on the validation text, the end of the "
        f"corpus, which was not trained on: {metrics.get('protocol', 'by a protocol that is not stated')}.{picture}"
    )


def _architecture(checkpoint: Checkpoint) -> str:
    counts: dict[str, int] = {}
    for name, tensor in checkpoint.model_state_dict.items():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + tensor.numel()
    rows = [(f"{part}: {_PARTS.get(part, 'weights')}", f"{count:,}") for part, count in counts.items()]
    rows.append(("**all**", f"**{sum(counts.values()):,}**"))
    sizes = ", ".join(f"`{name}` {value}" for name, value in checkpoint.config.items())
    return f"## How it is built\n\n{_table(('part', 'parameters'), rows)}\n\nIts sizes (`config.json`): {sizes}."


def _training(checkpoint: Checkpoint) -> str:
    corpus, metrics, environment = checkpoint.corpus, checkpoint.metrics, checkpoint.environment
    dataset = _DATASETS.get(str(corpus.get("sha256")))
    known = f", [{dataset}](https://huggingface.co/datasets/{dataset}) on the Hub" if dataset else ""
    rows = [("text", f"`{corpus.get('name', 'unknown')}`{known}"), ("sha256", f"`{corpus.get('sha256', 'unknown')}`")]
    labels = {
        "characters": ("characters", corpus),
        "distinct_characters": ("distinct characters", corpus),
        "train_characters": ("characters for training", corpus),
        "validation_characters": ("characters for validation, the last ones", corpus),
        "steps": ("steps", metrics),
        "step": ("step of the published weights, the best", metrics),
        "characters_per_second": ("characters trained on per second", metrics),
    }
    rows += [(label, text) for name, (label, facts) in labels.items() if (text := _number(facts, name, ",.0f"))]
    if seconds := _number(metrics, "seconds", ".0f"):
        rows.append(("training time", f"{seconds} s" if int(seconds) < 120 else f"{int(seconds) / 60:.1f} minutes"))
    rows += [("charseq2seq" if name == "suite" else name, str(value)) for name, value in environment.items()]
    return (
        f"## How it was trained\n\n{_table(('fact', 'value'), rows)}\n\nThe command that trains one like it, with all "
        f"arguments that matter (`training_args.json` has every one):\n\n```bash\n{_command(checkpoint)}\n```"
    )


def _command(checkpoint: Checkpoint) -> str:
    """Counts steps even where the run was timed: another machine does not make as many in as many minutes."""
    name, steps = str(checkpoint.corpus.get("name", "shakespeare.txt")), checkpoint.metrics.get("steps")
    arguments = {key: value for key, value in checkpoint.training_args.items() if key not in _NO_FLAGS}
    if checkpoint.training_args.get("max_minutes") or not arguments.get("max_steps"):
        arguments["max_steps"] = steps
    words = ["python train_transformer.py --mode train"]
    if name != "shakespeare.txt":  # the default text is found by itself
        words.append(f"--data_path {shlex.quote(name)}")
    words += [
        f"--{key}" if value is True else f"--{key} {value}"
        for key, value in arguments.items()
        if value is not None and value is not False
    ]
    return " \\\n    ".join(words)


def _limits(checkpoint: Checkpoint) -> str:
    text = (
        "## What it is not\n\n"
        "It is a small model of the *form* of one text. It spells, sets lines and keeps up a tone, but it knows "
        "nothing of the world, follows no instruction, answers no question, and forgets what it wrote a few "
        f"hundred characters ago. It reads and writes only the {checkpoint.config['vocab_size'] - 1} characters of its "
        "vocabulary. It may repeat passages of its training text word for word."
    )
    if not is_shakespeare(checkpoint.corpus):
        return f"{text} Whatever views and errors that text has, the model has too; see its owner for its licence."
    return (
        f"{text}\n\nIts English is that of about 1600, and so are its views: the plays' treatment of women, of Jews "
        "and Moors, of rank and of violence returns in what it writes, without the play around it that might answer. "
        "Do not take its lines for Shakespeare's, nor for anybody's opinion. The plays are in the public domain."
    )


def _number(facts: Mapping[str, Any], name: str, form: str) -> str:
    """A number as text; empty where there is none, or none that can be shown."""
    value = facts.get(name)
    return format(value, form) if isinstance(value, (int, float)) and math.isfinite(value) else ""


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    lines = [f"| {cell(left)} | {cell(right)} |" for left, right in (head, ("---", "---"), *rows)]
    return "\n".join(lines)
