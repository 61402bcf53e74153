"""The README.md of a repository: metadata for the Hub's search, and a text that a reader finishes.

Its sentences stand in published/model_card.md.jinja, its figures come from the checkpoint. The suite's text is between
two marks and is made anew at each push; what a person writes outside of them stays, and so does their metadata.
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
from data import SHA256

if TYPE_CHECKING:
    from charseq2seq.checkpoint import Checkpoint

TAGS = ["pytorch", "encoder-decoder", "text2text-generation", "character-level"]
SAMPLE_LENGTH, SAMPLE_SEED = 240, 1337
_TEMPLATE = Path(__file__).parent / "published" / "model_card.md.jinja"
_DATASETS = {SHA256["tinyshakespeare"]: "karpathy/tiny_shakespeare"}  # texts that the Hub has too
_RESULTS = {"nats_per_char": "Nats per character", "bits_per_char": "Bits per character", "perplexity": "Perplexity"}


def is_shakespeare(corpus: Mapping[str, Any]) -> bool:
    """Whether a text is one that `data/prepare.py` makes; translations have licences and languages of their own."""
    return corpus.get("sha256") in SHA256.values()


def sample_prompt(checkpoint: Checkpoint) -> str:
    """What the samples continue; nothing where the text is not Shakespeare's."""
    return "ROMEO:" if is_shakespeare(checkpoint.corpus) and set("ROMEO:") <= set(checkpoint.vocab) else ""


def render_card(checkpoint: Checkpoint, repo_id: str, samples: Mapping[float, str], curve: str | None) -> str:
    """The complete README.md of a new repository; what the checkpoint does not tell is left out.

    Args:
        repo_id: `owner/name`, for the examples.
        samples: temperature -> what the model wrote, `sample_prompt` included.
        curve: file name of the training-curve picture, None where there is none.
    """
    from huggingface_hub import ModelCard

    backticks = re.findall("`+", "\n".join(samples.values()))
    corpus, parts = checkpoint.corpus, Counter[str]()  # parts of the model, and how many parameters they have
    sha256 = str(corpus.get("sha256", "unknown"))
    for name, tensor in checkpoint.model_state_dict.items():
        parts[name.partition(".")[0]] += tensor.numel()
    card = ModelCard.from_template(
        _metadata(checkpoint, repo_id),
        template_path=str(_TEMPLATE),
        repo_id=repo_id,
        name=repo_id.partition("/")[2],
        is_shakespeare=is_shakespeare(corpus),
        alphabet_size=checkpoint.config["vocab_size"] - 1,
        corpus_name=corpus.get("name", "unknown"),
        sha256=sha256,
        dataset=_DATASETS.get(sha256),
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
    )
    return f"{card}\n"


def _metadata(checkpoint: Checkpoint, repo_id: str) -> Any:
    """The card's YAML as `ModelCardData`; language and licence only where the text is known to allow it."""
    from huggingface_hub import EvalResult, ModelCardData

    metrics, corpus = _finite_numbers(checkpoint.metrics), checkpoint.corpus
    known, dataset = is_shakespeare(corpus), _DATASETS.get(str(corpus.get("sha256")))
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
        datasets=[dataset] if dataset else None,
        library_name="pytorch",
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


# --- how the card lives with what people write on the Hub

_BLOCK = re.compile(r"<!-- charseq2seq begins: \S* [^\n]*-->.*?<!-- charseq2seq ends -->", re.DOTALL)
_FRONT_MATTER = re.compile(r"\A\s*---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_PROPOSED = ("license", "language", "library_name", "pipeline_tag")  # a person may choose others on the website


def is_our_card(text: str) -> bool:
    """Whether a README.md bears the marks of this suite."""
    return _BLOCK.search(text) is not None


def merge_cards(ours: str, theirs: str) -> str:
    """Our new card, with everything that people wrote into the published one.

    Text outside the marks stays as it is. Of the metadata, keys that we do not write stay; where a person chose
    another licence, language, library or pipeline, theirs stays; tags are united; results are ours, except for
    other models' ones. A card without marks (made on the website) keeps its text, below ours.
    """
    import yaml
    from huggingface_hub.utils import yaml_dump

    our_front, our_text = _split(ours)
    their_front, their_text = _split(theirs)
    block = _BLOCK.search(our_text)
    assert block is not None, "our card has its marks"
    if is_our_card(their_text):
        text = _BLOCK.sub(lambda _: block[0], their_text, count=1)
    else:
        text = f"\n{block[0]}\n\n{their_text.strip()}\n" if their_text.strip() else our_text
    try:
        their_data = yaml.safe_load(their_front) or {}
    except yaml.YAMLError:
        their_data = None
    if not isinstance(their_data, dict):  # not metadata: nothing that could be kept
        return f"---\n{our_front}\n---\n{text}"
    merged = _merge_metadata(yaml.safe_load(our_front) or {}, their_data)
    # Unchanged metadata stays letter for letter, so that comments survive and nothing looks changed.
    front = their_front if merged == their_data else yaml_dump(merged, sort_keys=False).rstrip("\n")
    return f"---\n{front}\n---\n{text}"


def _merge_metadata(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    merged = {**theirs, **ours}
    merged.update({key: theirs[key] for key in _PROPOSED if theirs.get(key)})
    their_tags = theirs.get("tags") or []
    their_tags = their_tags if isinstance(their_tags, list) else [their_tags]
    merged["tags"] = their_tags + [tag for tag in ours.get("tags", []) if tag not in their_tags]
    our_results = ours.get("model-index", [])
    our_names = [model["name"] for model in our_results]
    their_results = theirs.get("model-index")
    if isinstance(their_results, list):
        others = [one for one in their_results if isinstance(one, dict) and one.get("name") not in our_names]
        merged["model-index"] = our_results + others
    return merged


def _split(card: str) -> tuple[str, str]:
    """The YAML and the text of a card; no YAML is an empty one."""
    found = _FRONT_MATTER.match(card)
    return (found["yaml"], card[found.end() :]) if found else ("", card)
