"""Every command of the README is run, and what it promises is there."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

from charseq2seq.errors import ExitCode
from charseq2seq.options import read_settings
from tests.hub.server import HubServer
from tests.push_client import ROOT
from tests.train_client import TINY, tiny_text

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-TW.md"))


def commands(text: str) -> list[str]:
    """The commands of a README, one a line."""
    blocks = re.findall(r"^ *```bash\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


COMMANDS = commands(README)
CHINESE_COMMANDS = [command for command in commands(CHINESE) if not command.startswith("pip install")]
TOKEN = "your_token_here"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of what is under version control, with a small text where the plays would be."""
    folder = tmp_path / "clone"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "small.txt").write_text("ROMEO:\n" + tiny_text())
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub where the README's user has an account."""
    with HubServer() as server:
        server.add_user("your_username", tokens={TOKEN: "write"})
        yield server


def quickly(command: str) -> list[str]:
    """The command's words, with a model so small that it takes seconds, on a text that is there."""
    *_, command = command.split(" && ")  # the environment: the one that runs the tests was made by these words
    words = shlex.split(command)
    assert words[0] in ("python", ".venv/bin/python", "torchrun"), command
    words[:1] = [sys.executable, *(["-m", "torch.distributed.run"] if words[0] == "torchrun" else [])]
    if "train_transformer.py" in words and "--help" not in words and "generate" not in words:
        words += [] if "--data_path" in words else ["--data_path", "small.txt"]
    if "train" in words or any(word.startswith("@") for word in words):
        words += [*TINY, "--max_steps", "2"]
    return words


def on_machines(words: list[str]) -> list[list[str]]:
    """The same words on as many machines as they name, all of them this one, with a single process each."""
    if "--nnodes" not in words:
        return [words]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        here = {"--rdzv_endpoint": f"127.0.0.1:{free.getsockname()[1]}", "--nproc_per_node": "1"}
    words = [here.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    words[words.index("--nnodes") : words.index("--nnodes")] = ["--local_addr", "127.0.0.1"]
    return [words] * int(words[words.index("--nnodes") + 1])


@pytest.mark.parametrize("listed", [COMMANDS, CHINESE_COMMANDS], ids=["English", "Chinese"])
def test_every_command_works(listed: list[str], folder: Path, hub: HubServer) -> None:
    for command in listed:
        if "pytest" in command:
            continue  # that one is being run right now, by .ci/run
        environment = hub.environment(folder, TOKEN) | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        processes = [
            subprocess.Popen(words, cwd=folder, env=environment, stdout=DEVNULL, stderr=PIPE, text=True)
            for words in on_machines(quickly(command))
        ]
        for process in processes:
            _, log = process.communicate()
            assert process.returncode == 0, f"{command}\n{log}"
    assert hub.repos == ["your_username/my-shakespeare-transformer"]


def test_the_slurm_job_is_the_command_for_several_machines() -> None:
    job = ROOT / "examples" / "cluster" / "train.sbatch"
    assert subprocess.run(["bash", "-n", job], check=False).returncode == 0
    (command,) = [command for command in COMMANDS if "--nnodes" in command]
    of_job = set(re.findall(r"--\w+", job.read_text().partition("srun")[2]))
    assert set(re.findall(r"--\w+", command)) <= of_job
    assert read_settings(job.read_text().partition("train_transformer.py")[2].split()).size == "large"


def test_ci_runs_the_test_command() -> None:
    (command,) = [command for command in COMMANDS if "pytest" in command]
    assert "requirements_dev.txt && .*pytest" in (ROOT / ".ci" / "run").read_text()
    assert re.search("requirements_dev.txt && .*pytest", command)
    assert command.split(" && ")[0] == "python3 -m venv .venv"


def test_the_exit_codes_are_all_in_the_table() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert table == {int(code) for code in ExitCode}


def test_the_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)", README + CHINESE):
        assert (ROOT / target).exists(), target


def test_the_snippet_of_the_guide_is_here() -> None:
    from tests.test_push_guide import GUIDE_SNIPPET

    assert GUIDE_SNIPPET.strip() in README
    assert GUIDE_SNIPPET.strip() in CHINESE
