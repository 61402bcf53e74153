"""The folder that goes to the Hub: complete, loadable by a stranger, the same bytes each time, without secrets."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.folder import EVENTS, build_folder, parse_record
from charseq2seq.publishing.proof import prove_folder
from charseq2seq.publishing.secrets import refuse_secrets
from charseq2seq.vocabulary import CharVocabulary
from encoder_decoder_transformer import Transformer
from tests.hub.server import fake_token
from tests.push_client import ALL_FILES, REPO, ROOT, tiny_checkpoint


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parsed(folder: Path, name: str) -> Any:
    """A JSON file of a folder."""
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_config_and_weights_make_the_very_model(folder: Path) -> None:
    checkpoint = tiny_checkpoint()
    assert parsed(folder, "config.json") == checkpoint.config
    saved = torch.load(folder / "pytorch_model.bin", weights_only=True)
    assert set(saved) == {"model_state_dict"}
    for weights in (saved["model_state_dict"], load_file(folder / "model.safetensors")):
        assert set(weights) == set(checkpoint.model_state_dict)
        for name, tensor in checkpoint.model_state_dict.items():
            assert torch.equal(weights[name], tensor)
        Transformer(**parsed(folder, "config.json")).load_state_dict(weights)


def test_the_two_vocabularies_are_each_others_inverse_for_every_kind_of_character(tmp_path: Path) -> None:
    vocabulary = CharVocabulary(sorted("a\n\0\x1b\u2028é莎🎭\U0001f3ff|`"))
    base = tiny_checkpoint()
    config = {**base.config, "vocab_size": len(vocabulary)}
    checkpoint = dataclasses.replace(
        base, config=config, vocab=vocabulary.index_of_token(), model_state_dict=Transformer(**config).state_dict()
    )
    build_folder(checkpoint, tmp_path / "folder", "alice/m")
    index_of, token_of = (parsed(tmp_path / "folder", name) for name in ("vocab.json", "idx_to_vocab.json"))
    assert {int(index): token for index, token in token_of.items()} == {i: token for token, i in index_of.items()}
    assert set(vocabulary.characters) <= set(index_of)


def test_the_same_checkpoint_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    deep = tmp_path / "elsewhere" / "deep"
    torch.set_num_threads(2)  # the machine's mood must not matter
    for checkpoint in (tiny_checkpoint(), tiny_checkpoint(1.4, seed=1), tiny_checkpoint()):
        build_folder(checkpoint, deep, REPO)
        assert (contents(deep) == contents(folder)) == (checkpoint.metrics["nats_per_char"] == 1.5)
    assert torch.get_num_threads() == 1, "several threads add in another order"


def test_a_view_does_not_drag_its_storage_along(tmp_path: Path) -> None:
    base = tiny_checkpoint()
    state = dict(base.model_state_dict)
    name, tensor = next(iter(state.items()))
    state[name] = torch.zeros(1000, *tensor.shape).copy_(tensor)[7]
    build_folder(dataclasses.replace(base, model_state_dict=state), tmp_path / "views", "alice/m")
    assert (tmp_path / "views" / "pytorch_model.bin").stat().st_size < 100_000


def test_model_code_and_example_are_the_files_of_this_project(folder: Path) -> None:
    model_file = ROOT / "encoder_decoder_transformer.py"
    assert (folder / "encoder_decoder_transformer.py").read_bytes() == model_file.read_bytes()
    pins = (folder / "requirements.txt").read_text().split()
    assert {pin.partition("==")[0] for pin in pins} == {"torch", "numpy", "safetensors", "huggingface_hub"}
    assert set(pins) <= set((ROOT / "requirements_transformer.txt").read_text().split())


def test_nothing_tells_of_the_machine_or_the_moment(folder: Path, tmp_path: Path) -> None:
    for name, content in contents(folder).items():
        for secret in (str(Path.home()).encode() + b"/", str(folder).encode(), str(tmp_path).encode(), b"2026-"):
            assert secret not in content, name
    assert not re.search(b"tEXt|iTXt|tIME", (folder / "training_curve.png").read_bytes())


def test_json_stays_json_where_a_loss_is_not_a_number(tmp_path: Path) -> None:
    history = [{"step": step, "train_nats_per_char": float("nan"), "nats_per_char": 2.0} for step in (1, 2)]
    build_folder(tiny_checkpoint(history=history, extra=(1, float("inf"))), tmp_path / "folder", "alice/m")
    text = (tmp_path / "folder" / "training_args.json").read_text()
    metrics = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["metrics"]
    assert metrics["history"][0]["train_nats_per_char"] is None and metrics["extra"] == [1, None]


def test_a_folder_that_is_half_built_says_so_and_can_be_built_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_folder(tiny_checkpoint(), tmp_path, REPO)
    (tmp_path / "README.md.0123abcd.tmp").write_bytes(b"of a run that was killed")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("charseq2seq.publishing.folder.render_card", lambda *_, **__: 1 / 0)
        build_folder(tiny_checkpoint(), tmp_path, REPO)
    assert parsed(tmp_path, "training_args.json")["files"] == []
    build_folder(tiny_checkpoint(), tmp_path, REPO)
    assert contents(tmp_path) == contents(folder)


@pytest.mark.parametrize("record", [None, b'{"lr": 1}', b"\xff", b"{"])
def test_a_folder_of_somebody_else_is_left_alone(record: bytes | None, tmp_path: Path) -> None:
    theirs = {"README.md": b"a year's work", "config.json": b"{}"}
    theirs |= {"training_args.json": record} if record else {}
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SuiteError, match=r"holds other files \(README\.md") as refusal:
        build_folder(tiny_checkpoint(), tmp_path, "alice/m")
    assert refusal.value.exit_code == ExitCode.CANNOT_CREATE and contents(tmp_path) == theirs


def test_a_record_of_another_tool_is_none_of_ours(folder: Path) -> None:
    record = parsed(folder, "training_args.json")
    assert parse_record(json.dumps(record)) == record
    changes: list[dict[str, Any]] = [{name: [3]} for name in ("made_by", "metrics", "files")]
    changes += [{"files": [name]} for name in ("../notes.txt", "/notes.txt", "runs/../../notes.txt")]
    for odd in ("[1]", "[" * 100_000, *(json.dumps(record | change) for change in changes)):
        assert parse_record(odd) is None


def damaged(folder: Path, name: str, change: Callable[[bytes], bytes] | None) -> Path:
    """The folder of a tiny checkpoint, TensorBoard's events included, with one file changed, or missing."""
    build_folder(tiny_checkpoint(), folder, "alice/m", with_runs=True)
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if change is not None:
        (folder / name).write_bytes(change(content))
    return folder


def test_a_folder_proves_itself(folder: Path, tmp_path: Path) -> None:
    prove_folder(folder)
    assert set(parsed(folder, "training_args.json")["files"]) == ALL_FILES
    assert set(contents(folder)) == ALL_FILES, "the proof leaves nothing behind"
    prove_folder(damaged(tmp_path, EVENTS, bytes))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("model.safetensors", lambda content: content[:-4] + bytes(4), "do not hold the same weights"),
        ("model.safetensors", None, r"No such file or directory: .*model\.safetensors"),
        ("vocab.json", lambda content: b'{"a": 0}', r"cannot be loaded: .*vocab\.json and config\.json differ in size"),
        ("vocab.json", lambda content: b"{}", "the model has no vocabulary"),
        ("usage_example.py", lambda content: b"import encoder_decoder_transformer", "generated no text"),
        ("notebook.ipynb", lambda content: content[:-9], r"notebook\.ipynb does not run: JSONDecodeError"),
        ("notebook.ipynb", lambda content: content.replace(b"sys.path", b"[]"), "does not run: ModuleNotFoundError"),
        ("notebook.ipynb", lambda content: content.replace(b"model.write", b"model.say"), "has no attribute 'say'"),
        (EVENTS, lambda content: content[:-9], "TensorBoard cannot read runs/"),
    ],
)
def test_damage_is_found(name: str, change: Callable[[bytes], bytes] | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(PublishError, match=rf"the folder does not work\n.*{reason}"):
        prove_folder(damaged(tmp_path, name, change))


def test_the_proof_sees_neither_tokens_nor_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "MY_API_KEY", "DB_PASSWORD", "PYTHONPATH", "HF_ENDPOINT"):
        monkeypatch.setenv(name, "seen")
    spy = b"import os, sys; sys.exit(f'seen: {[name for name, value in os.environ.items() if value == \"seen\"]}')"
    with pytest.raises(PublishError, match=r"seen: \[\]"):
        prove_folder(damaged(tmp_path / "spying", "usage_example.py", lambda _: spy))


OTHER_TOKENS = ["ghp_", "ghr_", "github_pat_", "sk-", "AKIA", "xoxb-", "hf_jwt_", "-----BEGIN RSA PRIVATE KEY-----"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fake_token("inACard"), "what looks like a token, in notes.txt line 2"),
        *((begin + "A" * 60, "what looks like a token") for begin in OTHER_TOKENS),
        ("/home/alice/corpus.txt", "a path of a machine"),
        ("C:\\Users\\alice\\corpus.txt", "a path of a machine"),
        (str(ROOT / "data"), "a path of a machine"),
        (f"at {ROOT}: it is", "a path of a machine"),
        (f"{ROOT}-poet", None),
        ("a secret of no known shape", "the token in use, in notes.txt"),
        ("hf_hub_download and /home pages", None),
    ],
)
def test_secrets_are_found_and_not_shown(text: str, expected: str | None, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text(f"line one\n{text}\n")
    if expected is None:
        refuse_secrets(tmp_path, ["notes.txt"], "a secret of no known shape")
        return
    with pytest.raises(PublishError) as refusal:
        refuse_secrets(tmp_path, ["notes.txt"], "a secret of no known shape")
    assert expected in str(refusal.value)
    assert text not in str(refusal.value)


def test_the_token_in_use_is_found_even_among_weights(folder: Path, tmp_path: Path) -> None:
    token = fake_token("amongWeights")
    refuse_secrets(folder, sorted(ALL_FILES), token)
    leaking = damaged(tmp_path / "leaking", "pytorch_model.bin", lambda weights: weights + token.encode())
    with pytest.raises(PublishError, match="the token in use"):
        refuse_secrets(leaking, sorted(ALL_FILES), token)


def test_the_events_are_what_tensorboard_reads_and_the_same_each_time(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = build_folder(tiny_checkpoint(), tmp_path / "one", "alice/m", with_runs=True)
    build_folder(tiny_checkpoint(), tmp_path / "two", "alice/m", with_runs=True)
    assert set(record["files"]) == ALL_FILES | {EVENTS}
    assert (tmp_path / "one" / EVENTS).read_bytes() == (tmp_path / "two" / EVENTS).read_bytes()
    refuse_secrets(tmp_path / "one", record["files"], fake_token("unused"))
    read = EventAccumulator(str((tmp_path / "one" / EVENTS).parent))
    read.Reload()
    losses = [(one.step, one.value) for one in read.Scalars("nats_per_char")]
    assert losses == [(1, 4.5), (10, pytest.approx(1.8)), (100, pytest.approx(1.53))]
