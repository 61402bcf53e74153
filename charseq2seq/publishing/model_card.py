"""The README.md of a repository: metadata for the Hub's search, and a text that a reader finishes.

Everything in it comes from the checkpoint. How it lives with what people write on the Hub: card_merge.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from charseq2seq.checkpoint import Checkpoint
from charseq2seq.publishing.card_merge import marked
from charseq2seq.publishing.samples import PROMPT, SEED, Sample

TAGS = ["pytorch", "encoder-decoder", "text2text-generation", "character-level"]
# The arguments of a run that are flags of train_transformer.py, in the order of its help.
_FLAGS = (
    *("d_model", "num_heads", "num_encoder_layers", "num_decoder_layers", "d_ff", "dropout"),
    *("source_length", "target_length", "max_steps", "max_minutes", "batch_size", "learning_rate", "weight_decay"),
    *("seed", "eval_interval", "precision"),
)

_PARTS = {
    "embedding": "characters to vectors, shared by both sides",
    "encoder": "reads the source in both directions",
    "decoder": "writes the target, one character at a time",
    "head": "vectors to characters",
    "bigram": "what usually follows the previous character",
}


def render_card(checkpoint: Checkpoint, repo_id: str, samples: Sequence[Sample], curve: str | None) -> str:
    """The complete README.md of a new repository.

    Args:
        checkpoint: the model.
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


def _is_shakespeare(corpus: Mapping[str, Any]) -> bool:
    return "shakespeare" in str(corpus.get("name", "")).lower()


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
            metric_value=round(metrics[kind], 4),
        )
        for kind, name in names.items()
        if kind in metrics
    ]
    known = _is_shakespeare(corpus)
    return ModelCardData(
        language="en" if known else None,
        license="apache-2.0" if known else None,
        library_name="pytorch",
        pipeline_tag="text-generation",
        tags=TAGS + ["shakespeare"] * known,
        model_name=repo_id.partition("/")[2],
        eval_results=results or None,
    )


def _introduction(checkpoint: Checkpoint, repo_id: str) -> str:
    corpus, metrics = checkpoint.corpus, checkpoint.metrics
    total = sum(tensor.numel() for tensor in checkpoint.model_state_dict.values())
    subject = "Shakespeare's plays" if _is_shakespeare(corpus) else f"the text `{corpus.get('name', 'unknown')}`"
    return (
        f"# {repo_id.partition('/')[2]}\n\n"
        f"A character-level encoder-decoder Transformer with {total:,} parameters, trained from nothing on {subject}. "
        "Its encoder reads a piece of text in both directions; its decoder writes the text that follows, one character "
        f"at a time. On text it never saw it reaches **{metrics['nats_per_char']:.4f} nats per character** "
        f"({metrics['bits_per_char']:.4f} bits). The model is one file that needs nothing but PyTorch, written to be "
        "read: `encoder_decoder_transformer.py`."
    )


def _samples(samples: Sequence[Sample]) -> str:
    pieces = [f"## What it writes\n\nAfter the prompt `{PROMPT}`, unedited, with seed {SEED}."]
    for sample in samples:
        # A fence longer than any run of backticks in the text cannot be closed by it.
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", sample.text)), default=0))
        pieces.append(f"Temperature {sample.temperature}:\n\n{fence}text\n{sample.text}\n{fence}")
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

source = torch.tensor([[vocab[character] for character in "JULIET:" if character in vocab]])
written = model.generate(source, 300, temperature=0.8)
character_of = {{index: character for character, index in vocab.items()}}
print("".join(character_of[index] for index in written[0].tolist()))
```

`model.safetensors` holds the same weights in a format that cannot contain code."""


def _evaluation(metrics: Mapping[str, Any], curve: str | None) -> str:
    rows = [("validation loss", f"{metrics['nats_per_char']:.4f} nats per character")]
    rows.append(("the same in bits", f"{metrics['bits_per_char']:.4f} bits per character"))
    optional = {
        "perplexity": ("perplexity per character", "{:.3f}"),
        "train_nats_per_char": ("training loss at the end", "{:.4f} nats per character"),
        "characters": ("characters scored", "{:,}"),
        "max_context": ("longest context", "{} characters"),
    }
    for key, (label, form) in optional.items():
        if metrics.get(key) is not None:
            rows.append((label, form.format(metrics[key])))
    picture = f"\n\n![Training and validation loss over the run]({curve})" if curve else ""
    return (
        f"## How good it is\n\n{_table(rows)}\n\nHow it was measured: {metrics.get('protocol', 'not stated')}{picture}"
    )


def _architecture(checkpoint: Checkpoint) -> str:
    counts: dict[str, int] = {}
    for name, tensor in checkpoint.model_state_dict.items():
        part = name.partition(".")[0]
        counts[part] = counts.get(part, 0) + tensor.numel()
    rows = [(f"{part}: {_PARTS.get(part, 'weights')}", f"{count:,}") for part, count in counts.items()]
    rows.append(("**all parameters**", f"**{sum(counts.values()):,}**"))
    sizes = [(f"`{name}`", str(value)) for name, value in checkpoint.config.items()]
    return f"## How it is built\n\n{_table(rows)}\n\n`config.json`:\n\n{_table(sizes)}"


def _training(checkpoint: Checkpoint) -> str:
    corpus, metrics, arguments = checkpoint.corpus, checkpoint.metrics, checkpoint.training_args
    rows = [("text", f"`{corpus.get('name', 'unknown')}`"), ("sha256", f"`{corpus.get('sha256', 'unknown')}`")]
    labels = {
        "characters": "characters",
        "distinct_characters": "distinct characters",
        "train_characters": "of them for training",
        "validation_characters": "of them for validation",
    }
    rows += [(label, f"{corpus[key]:,}") for key, label in labels.items() if key in corpus]
    run = []
    if "steps" in metrics:
        run.append(("steps", f"{metrics['steps']:,}"))
    if "step" in metrics:
        run.append(("weights published: those of step", f"{metrics['step']:,}"))
    if "seconds" in metrics:
        run.append(("training time", f"{metrics['seconds'] / 60:.1f} minutes"))
    if "characters_per_second" in metrics:
        run.append(("speed", f"{metrics['characters_per_second']:,.0f} characters per second"))
    run += [(name, str(value)) for name, value in checkpoint.environment.items()]
    chosen = [(f"`{name}`", f"`{value}`") for name, value in arguments.items() if name not in checkpoint.config]
    return (
        f"## How it was trained\n\nThe data:\n\n{_table(rows)}\n\nThe run:\n\n{_table(run)}\n\n"
        f"Its arguments:\n\n{_table(chosen)}\n\nTo train one like it:\n\n```bash\n{_command(arguments, corpus)}\n```"
    )


def _command(arguments: Mapping[str, Any], corpus: Mapping[str, Any]) -> str:
    words = ["python train_transformer.py --mode train"]
    if corpus.get("name", "shakespeare.txt") != "shakespeare.txt":  # the default text is found by itself
        words.append(f'--data_path "{corpus["name"]}"')
    words += [f"--{name} {arguments[name]}" for name in _FLAGS if arguments.get(name) is not None]
    return " \\\n    ".join(words)


def _limits(checkpoint: Checkpoint) -> str:
    text = (
        "## What it is not\n\n"
        "It is a small model of the *form* of one text. It spells, sets lines and keeps up a tone, but it knows "
        "nothing of the world, follows no instruction, answers no question, and forgets what it wrote a few "
        f"hundred characters ago. It reads and writes only the {checkpoint.config['vocab_size'] - 1} characters of its "
        "vocabulary. It may repeat passages of its training text word for word."
    )
    if not _is_shakespeare(checkpoint.corpus):
        return f"{text} Whatever views and errors that text has, the model has too; see its owner for its licence."
    return (
        f"{text}\n\nIts English is that of about 1600, and so are its views: the plays' treatment of women, of Jews "
        "and Moors, of rank and of violence returns in what it writes, without the play around it that might answer. "
        "Do not take its lines for Shakespeare's, nor for anybody's opinion. The plays are in the public domain."
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    return "\n".join(["| | |", "| --- | --- |", *(f"| {cell(left)} | {cell(right)} |" for left, right in rows)])
