"""The guide, run as it stands: its second way to publish, and what others do with what was published."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from charseq2seq import __version__
from tests.hub.server import HubServer, fake_token
from tests.push_client import ALL_FILES, Publisher, fresh_python

# From the guide, letter for letter; so the Hub has a user "username" with a repository "repo-name".
GUIDE_SNIPPET = """
from huggingface_hub import hf_hub_download
model_path = hf_hub_download("username/repo-name", "pytorch_model.bin")
config_path = hf_hub_download("username/repo-name", "config.json")
vocab_path = hf_hub_download("username/repo-name", "vocab.json")

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
"""
INFERENCE = """
written = model.generate(torch.tensor([[vocab["R"]]]), 40, temperature=0)
token_of = {index: token for token, index in vocab.items()}
print("".join(token_of[index] for index in written[0].tolist()))
"""


@pytest.mark.slow  # installs the published requirements
def test_the_guides_second_way_ends_with_a_repository_that_a_stranger_uses(hub: HubServer, tmp_path: Path) -> None:
    token = fake_token("username")
    hub.add_user("username", tokens={token: "write"})
    user = Publisher(hub, tmp_path / "user")
    done = user.push("--repo_name", "repo-name", "--username", "username", "--token", token, token=None)
    assert (done.code, done.out) == (0, f"{hub.endpoint}/username/repo-name\n"), done.log
    assert "verified: a fresh download generates text" in done.log
    assert token not in done.log and "can be seen by everybody" in done.log
    repository = hub.repo("username/repo-name")
    files = repository.files()
    assert set(files) - {".gitattributes"} == ALL_FILES and not repository.private
    assert [one.title for one in repository.commits] == [
        f"1.5000 nats per character, step 90 (charseq2seq {__version__})",
        "initial commit",
    ]
    assert not any(token.encode() in content for content in files.values())
    assert {one.token for one in hub.requests if one.listener == "storage"} == {None}

    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "requirements.txt").write_bytes(files["requirements.txt"])
    (stranger / "snippet.py").write_text(GUIDE_SNIPPET + INFERENCE)
    card = files["README.md"].decode()
    three_lines, by_hand = re.findall("```python\n(.*?)```", card, re.DOTALL)
    assert by_hand == GUIDE_SNIPPET.lstrip()
    (stranger / "card.py").write_text(three_lines)
    get_the_code, run_the_example, _ = re.findall("```bash\n(.*?)```", card, re.DOTALL)
    programs = fresh_python(stranger / "requirements.txt", stranger / "environment")
    environment = hub.environment(stranger)
    environment["PATH"] = f"{programs}:{environment['PATH']}"
    for commands in (get_the_code, "python card.py", run_the_example, "python snippet.py"):
        bash = ["bash", "-ec", commands]
        run = subprocess.run(bash, cwd=stranger, env=environment, capture_output=True, encoding="utf-8", check=False)
        assert run.returncode == 0 and len(run.stdout) > 30 and "Warning" not in run.stderr, run.stderr
