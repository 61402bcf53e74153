"""A model from a folder or from the Hub in one line, and back into a folder; text in, text out."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import encoder_decoder_transformer
from charseq2seq.generation import Sampling, TextGenerator
from charseq2seq.publishing.folder import build_folder
from encoder_decoder_transformer import Transformer
from tests.hub.server import WRITE, HubServer
from tests.push_client import REPO, ROOT, Publisher, tiny_checkpoint


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """The folder of a tiny checkpoint, as it is published."""
    build_folder(tiny_checkpoint(), tmp_path / "published", "alice/m")
    return tmp_path / "published"


def test_a_published_folder_writes_what_the_suite_writes(published: Path) -> None:
    checkpoint, before = tiny_checkpoint(), torch.get_rng_state()
    model = Transformer.from_pretrained(published)
    generator = TextGenerator(checkpoint.build_model(), checkpoint.vocabulary())
    for prompt in ("ROMEO:", ""):
        expected = generator.generate(prompt, 60, Sampling(0.8, top_p=0.9, seed=3))
        assert model.write(prompt, 60, temperature=0.8, top_p=0.9, seed=3) == expected
    assert torch.equal(torch.get_rng_state(), before) and not model.training
    assert model.write("ROMEO:", 60) != model.write("ROMEO:", 60), "without a seed always another text"
    assert model.write("ROMEO:", 0) == ""


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint()
    model = checkpoint.build_model()
    model.save_pretrained(tmp_path / "new" / "folder")
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    assert names == {"config.json", "vocab.json", "model.safetensors"}
    loaded = Transformer.from_pretrained(str(tmp_path / "new" / "folder"))
    assert (loaded.config, loaded.vocab) == (model.config, checkpoint.vocab)
    assert loaded.state_dict().keys() == checkpoint.model_state_dict.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, checkpoint.model_state_dict[name])


@pytest.mark.parametrize("installed", [True, False])
def test_without_safetensors_the_other_weight_file_is_read(
    published: Path, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file is missing, as in a repository of an older version, and where the library is."""
    if installed:
        (published / "model.safetensors").unlink()
    else:
        (published / "model.safetensors").write_bytes(b"not to be read")
        monkeypatch.setattr(encoder_decoder_transformer, "find_spec", lambda name: None)
    config = json.loads((published / "config.json").read_text(encoding="utf-8"))
    assert "num_kv_heads" not in config, "as models were published before there were several"
    model = Transformer.from_pretrained(published)
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in tiny_checkpoint().model_state_dict.items())
    assert model.config["num_kv_heads"] == 1


class Trap:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def only_pickled(content: Any) -> Callable[[Path], object]:
    """Makes pytorch_model.bin the only weight file, with this content."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save(content(folder) if callable(content) else content, folder / "pytorch_model.bin")

    return change


def with_json(name: str, **changes: Any) -> Callable[[Path], object]:
    """Changes entries of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | changes), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "JSONDecodeError"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"PK"), "SafetensorError"),
        (with_json("config.json", d_ff=33), "do not fit together"),
        (with_json("config.json", vocab_size=10_000_000), "do not fit together"),
        (with_json("config.json", source_length=2_000_000_000), "too many positions"),
        (with_json("config.json", num_experts=8), "num_experts"),
        (with_json("vocab.json", Z=7), "vocab.json and config.json"),
        (only_pickled({"weights": {}}), "model_state_dict"),
        (only_pickled(lambda folder: {"model_state_dict": Trap(folder / "run")}), "UnpicklingError"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_in_a_sentence(
    published: Path, change: Callable[[Path], object], reason: str
) -> None:
    change(published)
    with pytest.raises(ValueError, match=r"published cannot be loaded: files are missing, damaged") as refusal:
        Transformer.from_pretrained(published)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (published / "run").exists(), "no code of a file is run"


def test_what_cannot_be_written_is_refused_in_a_sentence(published: Path, tmp_path: Path) -> None:
    model = Transformer.from_pretrained(published)
    with pytest.raises(ValueError, match="the model never saw 'q', '€'; leave them out of the prompt"):
        model.write("€q: But")
    with pytest.raises(ValueError, match=r"no vocabulary: load it with Transformer\.from_pretrained"):
        Transformer(vocab_size=9).write("But")
    with pytest.raises(ValueError, match=r"no folder .*nowhere, and a repository of the Hub is named owner/name"):
        Transformer.from_pretrained(tmp_path / "nowhere")


PROGRAM = """
import sys
from encoder_decoder_transformer import Transformer
name, token, *revisions = sys.argv[1:]
for revision in revisions:
    model = Transformer.from_pretrained(name, revision=revision, token=token or None)
    print(ascii(model.write("ROMEO:", 40, temperature=0)))
"""


def test_a_repository_is_loaded_with_nothing_but_the_models_file(hub: HubServer, published: Path) -> None:
    repository = hub.add_repo("alice/m", {path.name: path.read_bytes() for path in published.iterdir()}, private=True)
    first, newer = repository.head, published.parent / "newer"
    build_folder(tiny_checkpoint(seed=1), newer, "alice/m")
    repository.push({path.name: path.read_bytes() for path in newer.iterdir()})
    stranger = published.parent / "stranger"
    stranger.mkdir()
    shutil.copy(ROOT / "encoder_decoder_transformer.py", stranger)

    def run(token: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, "alice/m", token, first, "main"]
        environment = hub.environment(stranger)
        return subprocess.run(command, cwd=stranger, env=environment, capture_output=True, text=True, check=False)

    assert "401" in run("").stderr, "a private one needs a token"
    done = run(WRITE)
    texts = [Transformer.from_pretrained(folder).write("ROMEO:", 40, temperature=0) for folder in (published, newer)]
    assert (done.stdout.splitlines(), done.returncode) == ([ascii(text) for text in texts], 0), done.stderr
    assert texts[0] != texts[1]
    fetched = {path.name for path in stranger.glob("huggingface/hub/*/snapshots/*/*")}
    assert fetched == {"config.json", "vocab.json", "model.safetensors"}, "and no other file of the repository"


# --- with other clients than the one that pushed


def output(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a program prints; it must not fail."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow  # installs a client
def test_an_old_python_client_loads_a_pushed_model(hub: HubServer, alice: Publisher, tmp_path: Path) -> None:
    assert alice.push().code == 0
    card, old = hub.repo(REPO).files()["README.md"].decode(), tmp_path / "old"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(old), "huggingface_hub==0.36.0"]
    output(install, tmp_path, dict(os.environ))
    shutil.copy(ROOT / "encoder_decoder_transformer.py", tmp_path)
    environment = hub.environment(tmp_path) | {"PYTHONPATH": str(old)}
    program = "import huggingface_hub\nassert huggingface_hub.__version__ == '0.36.0'\n"
    program += "".join(re.findall("```python\n(.*?)```", card, re.DOTALL))  # the three lines, and step by step
    program += "assert torch.equal(model.head.weight, Transformer.from_pretrained(REPO).head.weight)"
    written = output([sys.executable, "-c", program.replace("REPO", repr(REPO))], tmp_path, environment)
    assert written == tiny_checkpoint().build_model().write("ROMEO:", 300, seed=1) + "\n"


NPM_PROGRAM = """
import { downloadFile, listFiles } from "@huggingface/hub";
const [hubUrl, name, ...paths] = process.argv.slice(1), repo = { type: "model", name }, names = [], files = [];
for await (const file of listFiles({ repo, hubUrl, recursive: true })) names.push(file.path);
for (const path of paths) {
  const file = await downloadFile({ repo, path, hubUrl });
  files.push(Buffer.from(await file.arrayBuffer()).toString("base64"));
}
console.log(JSON.stringify([names, files]));
"""


@pytest.mark.slow  # installs a client
@pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm")
def test_the_client_of_npm_reads_a_pushed_model(hub: HubServer, alice: Publisher, tmp_path: Path) -> None:
    assert alice.push().code == 0
    published, wanted = hub.repo(REPO).files(), ("config.json", "model.safetensors")
    output(["npm", "install", "--silent", "--prefix", ".", "@huggingface/hub@2.17.5"], tmp_path, dict(os.environ))
    node = ["node", "--input-type=module", "--eval", NPM_PROGRAM, hub.endpoint, REPO, *wanted]
    names, files = json.loads(output(node, tmp_path, hub.environment(tmp_path)))
    assert set(names) == set(published)
    assert [base64.b64decode(file) for file in files] == [published[name] for name in wanted]
