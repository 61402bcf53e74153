"""Checkpoint -> the folder that goes to the Hub.

The same checkpoint gives the same bytes: all facts come from it, none from the time, the machine, the user or a path.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq.device import use_threads
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.files import atomic_write, atomic_write_bytes, atomic_write_text, leftovers, make_folder, write_error
from charseq2seq.publishing.card import SAMPLE_LENGTH, SAMPLE_SEED, render_card, sample_prompt
from charseq2seq.publishing.hub import CARD, RECORD
from charseq2seq.publishing.notebook import NOTEBOOK, render_notebook
from charseq2seq.publishing.training_curve import draw_training_curve, write_events

if TYPE_CHECKING:
    from charseq2seq.checkpoint import Checkpoint

MADE_BY = "charseq2seq"
CURVE, EVENTS = "training_curve.png", "runs/events.out.tfevents.0"

_HERE = Path(__file__).parent
_COPIED = {
    "encoder_decoder_transformer.py": _HERE.parents[1] / "encoder_decoder_transformer.py",
    "usage_example.py": _HERE / "published" / "usage_example.py",
    "requirements.txt": _HERE / "published" / "requirements.txt",
}


def build_folder(
    checkpoint: Checkpoint, folder: Path, repo_id: str, *, has_page: bool = False, with_runs: bool = False
) -> dict[str, Any]:
    """Write the complete folder of the repository `owner/name`, or raise SuiteError.

    With `has_page` the card links to the Space where the model writes; `with_runs` adds TensorBoard's events.

    Returns:
        The record: the content of `training_args.json`, by which the suite recognises its own repositories. Only what
        it lists as `files` is published.
    """
    import torch
    from safetensors.torch import save

    from charseq2seq.generation import Sampling, TextGenerator

    _claim(folder)
    vocabulary, prompt = checkpoint.vocabulary(), sample_prompt(checkpoint)
    generator = TextGenerator(checkpoint.build_model(), vocabulary)
    token_of_index = {index: token for token, index in checkpoint.vocab.items()}
    tables = {"config.json": checkpoint.config, "vocab.json": checkpoint.vocab, "idx_to_vocab.json": token_of_index}
    texts = {name: json_text(table) for name, table in tables.items()}
    texts |= {name: path.read_text(encoding="utf-8") for name, path in _COPIED.items()}
    texts[NOTEBOOK] = render_notebook(repo_id, prompt)
    curve = draw_training_curve(checkpoint.metrics, checkpoint.config["vocab_size"])
    events = write_events(checkpoint.metrics) if with_runs else None
    extras = {name: content for name, content in ((CURVE, curve), (EVENTS, events)) if content}
    for name, content in extras.items():
        make_folder((folder / name).parent)
        atomic_write_bytes(folder / name, content)
    # Cloned, because a view would be saved with its whole storage.
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in checkpoint.model_state_dict.items()}
    with atomic_write(folder / "pytorch_model.bin") as file:
        torch.save({"model_state_dict": weights}, file)
    atomic_write_bytes(folder / "model.safetensors", save(weights, metadata={"format": "pt"}))
    record = {
        "made_by": MADE_BY,
        "files": sorted([*texts, *extras, "pytorch_model.bin", "model.safetensors", CARD, RECORD]),
        "training_args": checkpoint.training_args,
        "metrics": checkpoint.metrics,
        "corpus": checkpoint.corpus,
        "environment": checkpoint.environment,
    }
    use_threads(1)  # the order of sums, and so the samples, must not depend on the machine
    samples = {
        temperature: prompt + generator.generate(prompt, SAMPLE_LENGTH, Sampling(temperature, seed=SAMPLE_SEED))
        for temperature in (0.5, 0.8, 1.0)
    }
    texts[CARD] = render_card(checkpoint, repo_id, samples, CURVE if curve else None, has_page=has_page)
    texts[RECORD] = json_text(record)  # written last: it vouches for the others
    for name, text in texts.items():
        atomic_write_text(folder / name, text)
    return record


def parse_record(text: str) -> dict[str, Any] | None:
    """The record in a `training_args.json`; None if this suite did not write it."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    kinds = {"made_by": str, "metrics": dict, "corpus": dict, "files": list}
    if not isinstance(record, dict) or not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        return None
    inside = (isinstance(name, str) and not {"", ".", ".."} & set(name.split("/")) for name in record["files"])
    return record if record["made_by"] == MADE_BY and all(inside) else None


def _claim(folder: Path) -> None:
    """Make the folder; refuse one that is neither empty nor ours."""
    try:
        make_folder(folder)
        left = leftovers(folder)
        found = sorted({entry.name for entry in folder.iterdir()} - {path.name for path in left})
        # Other tools write a training_args.json too, so its content decides.
        record = (folder / RECORD).read_text(encoding="utf-8", errors="replace") if RECORD in found else ""
    except OSError as error:
        raise write_error(folder, error) from error
    if found and parse_record(record) is None:
        problem = f"{folder} holds other files ({', '.join(found[:3])} …); choose an empty --output_dir."
        raise SuiteError(problem, ExitCode.CANNOT_CREATE)
    # Until the other files are written, the record lists none: the folder is ours, and not complete.
    atomic_write_text(folder / RECORD, json_text({"made_by": MADE_BY, "files": [], "metrics": {}, "corpus": {}}))
    for path in left:
        path.unlink(missing_ok=True)


def json_text(content: Any) -> str:
    """JSON in ASCII, which no tool garbles; infinity and NaN, e.g. a loss not yet measured, become null."""
    return json.dumps(json.loads(json.dumps(content), parse_constant=lambda name: None), indent=2) + "\n"
