"""What the documents say is so: commands run, links lead somewhere, and both languages agree."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest
import yaml

from charseq2seq import __version__
from charseq2seq.errors import ExitCode
from charseq2seq.options import read_settings
from tests.hub.server import HubServer
from tests.train_client import ROOT, TINY, tiny_text

README, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-TW.md"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TITLE = "charseq2seq: train a small Transformer on a text, and publish it"
HEADINGS = {
    TITLE: "charseq2seq：用一段文字訓練小型 Transformer，並發布出去",
    "Write and measure": "寫作與評估",
    "Train on something else": "用別的文字訓練",
    "Publish": "發布",
    "Every night": "每晚自動執行",
    "Exit codes": "離開碼",
    "More machines": "更多機器",
    "How good, how fast": "多好、多快",
    "Where is what": "檔案在哪裡",
    "Read it in an afternoon": "一個下午讀完",
    "Licence": "授權",
}
# Of the user's guide: what its readers may have in their scripts.
GUIDE_FLAGS = {"push_to_hf", "hf_repo_name", "hf_username", "hf_token", "hf_private"}
GUIDE_FLAGS |= {"model_path", "repo_name", "username", "token", "private", "commit_message"}
TOKEN = "your_token_here"


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^ *```{language}\n(.*?)```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """The commands of a README, one a line."""
    return [line.strip() for block in blocks(text, "bash") for line in block.splitlines() if line.strip()]


COMMANDS = commands(README)


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


def quickly(command: str) -> list[str]:
    """The command's words, with a model so small that it takes seconds, on a text that is there."""
    *_, command = command.split(" && ")  # the environment: the one that runs the tests was made by these words
    words = shlex.split(command)
    assert words[0] in ("python", ".venv/bin/python", "torchrun"), command
    words[:1] = [sys.executable, *(["-m", "torch.distributed.run"] if words[0] == "torchrun" else [])]
    if "train_transformer.py" in words and not {"--help", "generate", "demo"} & set(words):
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


@pytest.mark.slow
def test_every_command_works(folder: Path) -> None:
    with HubServer() as hub:
        hub.add_user("your_username", tokens={TOKEN: "write"})
        environment = hub.environment(folder, TOKEN) | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        for command in COMMANDS:
            if "pytest" in command:
                continue  # that one is being run right now, by .ci/run
            processes = [
                subprocess.Popen(words, cwd=folder, env=environment, stdin=DEVNULL, stdout=PIPE, stderr=PIPE, text=True)
                for words in on_machines(quickly(command))
            ]
            for process in processes:
                if "--mode demo" in command:
                    assert process.stdout and process.stdout.readline().startswith("http://127.0.0.1:")
                    process.send_signal(signal.SIGINT)
                _, log = process.communicate()
                assert process.returncode == (130 if "--mode demo" in command else 0), f"{command}\n{log}"
        model = "your_username/my-shakespeare-transformer"
        assert hub.repos == [model, f"spaces/{model}-demo"]


def test_every_command_has_arguments_that_are_understood() -> None:
    for command in COMMANDS:
        if "train_transformer.py" in command and "@" not in command and "--help" not in command:
            read_settings(shlex.split(command.partition("train_transformer.py")[2]))


# --- both languages


def test_both_languages_have_the_same_commands_flags_figures_and_headings() -> None:
    assert commands(CHINESE) == COMMANDS
    assert blocks(CHINESE, "python") == blocks(README, "python")
    assert flags(CHINESE) == flags(README)
    assert figures(CHINESE) == figures(README)
    prose = [re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE) for text in (README, CHINESE)]
    english, chinese = (re.findall(r"^#+ (.*)", text, re.MULTILINE) for text in prose)
    assert [HEADINGS.get(heading) for heading in english] == chinese


def flags(text: str) -> set[str]:
    """All flags that a document names."""
    return set(re.findall(r"--(\w[\w-]*)", text))


def figures(text: str) -> list[str]:
    """The measured numbers in a document's tables."""
    return re.findall(r"\d+,\d{3}|\d+\.\d+", "\n".join(re.findall(r"^\|.*", text, re.MULTILINE)))


def test_the_guide_s_flags_and_snippet_are_here() -> None:
    assert flags(README) >= GUIDE_FLAGS
    _, snippet = blocks(README, "python")
    assert snippet in (ROOT / "tests" / "test_push_guide.py").read_text(encoding="utf-8"), "which runs it"


# --- tables, tree, links


def test_the_exit_codes_are_all_in_the_table() -> None:
    for text in (README, CHINESE):
        table = {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}
        assert table == {int(code) for code in ExitCode}


def test_the_links_lead_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_tree_names_every_file_of_the_suite() -> None:
    (tree,) = [block for block in blocks(README, "text") if "charseq2seq/" in block]
    named, folders = set(), [""]
    for line in tree.splitlines():
        name, depth = line.split()[0], (len(line) - len(line.lstrip())) // 4
        folders[depth + 1 :] = [folders[depth] + name]
        named |= {folders[depth] + name}
    assert not [name for name in named if not (ROOT / name).exists()]
    sources = [*ROOT.glob("*.py"), *(ROOT / "charseq2seq").rglob("*.py")]
    paths = {path.relative_to(ROOT).as_posix() for path in sources if path.name != "__init__.py"}
    assert {path for path in paths if "/published/" not in path} <= named


def test_the_route_gives_the_lines_of_its_files() -> None:
    route = re.findall(r"^\| \[(\S+\.py)\]\(\S+\) \| (\d+) \|$", README, re.MULTILINE)
    assert len(route) == 13
    for name, lines in route:
        real = len((ROOT / name).read_text(encoding="utf-8").splitlines())
        assert abs(int(lines) - real) <= max(20, real // 8), f"{name} has {real} lines"
    reading = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    assert re.findall(r"^\d+\. \[(\S+)\]", reading, re.MULTILINE) == [name for name, _ in route]


def test_records_are_few_and_can_be_reproduced() -> None:
    table = (ROOT / "benchmarks" / "RECORDS.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")][1:]
    assert 1 <= len([row for row in rows if "---" not in row[0]]) <= 10
    for _, _, command, _, date in rows[1:]:
        (script,) = re.findall(r"python (\S+\.py)", command)
        assert (ROOT / script).exists() and re.search(r"\d{4}-\d\d-\d\d", date)


# --- the walk through the model


def test_romeo_goes_through_the_model() -> None:
    walk = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    steps = re.findall(r"```python\n(.*?)```\n\n(?:```text\n(.*?)```)?", walk, re.DOTALL)
    program = [sys.executable, "-c", "\n".join(code for code, _ in steps)]
    done = subprocess.run(program, cwd=ROOT, env={"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(steps) >= 5 and done.stdout == "".join(printed for _, printed in steps)


def test_the_figure_is_what_its_script_draws() -> None:
    from docs.draw_how_it_works import FIGURE, draw

    assert FIGURE.read_text(encoding="utf-8") == draw()


# --- what runs elsewhere


def test_the_slurm_job_is_the_command_for_several_machines() -> None:
    job = ROOT / "examples" / "cluster" / "train.sbatch"
    assert subprocess.run(["bash", "-n", job], check=False).returncode == 0
    (command,) = [command for command in COMMANDS if "--nnodes" in command]
    of_job = set(re.findall(r"--\w+", job.read_text().partition("srun")[2]))
    assert set(re.findall(r"--\w+", command)) <= of_job
    assert read_settings(job.read_text().partition("train_transformer.py")[2].split()).size == "large"


def test_ci_runs_the_test_command_the_slow_tests_and_all_linters_of_the_hooks() -> None:
    (command,) = [command for command in COMMANDS if "pytest" in command]
    script = (ROOT / ".ci" / "run").read_text()
    assert "requirements_dev.txt && .*pytest" in script and "-m slow" in script
    assert re.search("requirements_dev.txt && .*pytest", command)
    assert command.split(" && ")[0] == "python3 -m venv .venv"
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    linters = re.findall(r"entry: (\S+/(?:ruff|mypy|vulture).*?)(?: --.*)?$", hooks, re.MULTILINE)
    assert len(linters) == 4 and all(linter in script for linter in linters)


def test_the_workflow_tests_the_pythons_that_are_promised() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())["jobs"]
    versions = jobs["linux"]["strategy"]["matrix"]["python"]
    assert PROJECT["project"]["requires-python"] == f">={versions[0]}" and versions[-1] == "3.14"
    assert {"run": ".ci/run"} in jobs["linux"]["steps"]
    assert jobs["experimental"]["continue-on-error"] is True


def test_there_is_one_version() -> None:
    assert PROJECT["project"]["dynamic"] == ["version", "dependencies"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "charseq2seq.__version__"}
    newest, *_ = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest == __version__


def test_every_module_imports_with_what_a_user_installs() -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci" / "import_all.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d\d modules import\n", done.stdout)
