"""A token goes to the request header and nowhere else: not to a log at any level, a traceback, a file or a child."""

from __future__ import annotations

import ast
import contextlib
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from charseq2seq.errors import ExitCode
from tests.hub.server import READ, WRITE, HubServer, fake_token
from tests.train_client import ROOT, TINY, Done, Trainee
from tests.warm_client import WarmClient

SPARE = fake_token("spare")  # lies in the environment while another one is used
QUICK = ["--data_path", "text.txt", *TINY, "--max_steps", "4", "--eval_interval", "2", "--log_file", "night.log"]
WARNING = "note: a token on the command line can be seen by everybody on this machine (ps)"
# As talkative as the libraries can be made.
LOUD = {"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "RUST_LOG": "debug", "PYTHONFAULTHANDLER": "1"}


def watch_children(process: subprocess.Popen[str]) -> dict[int, tuple[bytes, bytes]]:
    """What a process gives its children, for as long as it lives: process id -> command line, environment."""
    seen = {}
    while process.poll() is None:
        for child in children_of(process.pid):
            with contextlib.suppress(OSError):  # one of them has gone
                command, environment = (Path(f"/proc/{child}/{name}").read_bytes() for name in ("cmdline", "environ"))
                # Between fork and exec a child looks like its parent.
                if command and command != Path(f"/proc/{process.pid}/cmdline").read_bytes():
                    seen[child] = command, environment
    return seen


def children_of(pid: int) -> Iterator[int]:
    """The children of a process, theirs, and so on."""
    try:
        listings = [listing.read_text() for listing in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it, or one of its threads, has gone; the next look will see what stays
        return
    for child in map(int, " ".join(listings).split()):
        yield child
        yield from children_of(child)


def start(hub: HubServer, user: Trainee, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start a run that shall train and push."""
    return user.start("--push_to_hf", *QUICK, *arguments, **hub.environment(user.home, SPARE), **LOUD, **environment)


def end(process: subprocess.Popen[str]) -> Done:
    """Wait for a run; tracebacks are what is looked at here."""
    out, log = process.communicate()
    return Done(process.returncode, out, log)


def see_no_token(user: Trainee, done: Done, *but_in: Path) -> None:
    """Search everything that a run said or wrote for every token it was given."""
    texts = {"stdout": done.out.encode(), "stderr": done.log.encode()}
    texts |= {str(path): path.read_bytes() for path in user.home.rglob("*") if path.is_file() and path not in but_in}
    assert {"night.log", "text.txt"} <= {Path(name).name for name in texts}
    for name, content in texts.items():
        for token in (WRITE, READ, SPARE):
            for shape in (token, token[:20], token[::-1]):
                assert shape.encode() not in content, f"{name} holds a token"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc here")
def test_a_token_on_the_command_line_is_used_warned_of_once_and_kept_nowhere(hub: HubServer, user: Trainee) -> None:
    process = start(hub, user, "--hf_token", WRITE)
    with ThreadPoolExecutor() as pool:
        ended = pool.submit(end, process)
        children = watch_children(process)
    done = ended.result()
    assert done.code == 0 and done.report["outcome"] == "pushed", done.log
    see_no_token(user, done)
    assert {one.token for one in hub.requests if one.listener == "hub"} <= {WRITE, None}
    assert done.log.count(WARNING) == 1
    warning = done.log[done.log.index(WARNING) :][:300]
    assert "HF_TOKEN" in warning and "--hf_token_file" in warning and "--token_file" in warning, warning
    for content in hub.repo("alice/shakespeare-transformer").files().values():
        assert WRITE.encode() not in content and SPARE.encode() not in content
    assert len(children) >= 2, "the proof and the verification"
    for command, environment in children.values():
        for token in (WRITE, SPARE):
            assert token.encode() not in command + environment, command
    for written in ("transformer_model.pth", "transformer_model.resume.pth", "transformer_model.pth.lock"):
        assert (user.home / written).exists(), "it was searched"


@pytest.mark.slow
def test_a_token_in_a_file_is_used_and_kept_nowhere_when_the_push_fails(hub: HubServer, user: Trainee) -> None:
    (user.home / "my.token").write_text(WRITE + "\n")
    (user.home / "my.token").chmod(0o600)
    hub.fail("POST", "/commit/", status=500, message=f"no room for {WRITE} today")
    done = end(start(hub, user, "--hf_token_file", "my.token"))
    assert done.code == ExitCode.UNAVAILABLE and done.report["outcome"] == "finished, not pushed", done.log
    assert WARNING not in done.log
    see_no_token(user, done, user.home / "my.token")
    assert {one.token for one in hub.requests if one.listener == "hub"} <= {WRITE, None}


def test_a_traceback_shows_no_token(hub: HubServer, user: Trainee) -> None:
    (user.home / "numpy.py").write_text("raise RuntimeError('this numpy is broken')")
    done = end(start(hub, user, "--hf_token", WRITE, PYTHONPATH=str(user.home)))
    assert done.code == ExitCode.UNEXPECTED and "this numpy is broken" in done.log
    see_no_token(user, done)


@pytest.mark.parametrize(
    "mistaken",
    [
        ["--tokn", WRITE],
        ["--tokn", f"hf_oauth_{WRITE}.{WRITE}-{WRITE}"],
        ["--hf_token", WRITE, "--hf_tokenfile=" + WRITE],
        ["--hf_token", WRITE, "--hf_token_file", WRITE],
        ["--max_steps", WRITE],
        [WRITE],
        ["@leaky.args"],
    ],
)
def test_a_token_in_the_wrong_place_is_not_repeated(mistaken: list[str], user: Trainee, client: WarmClient) -> None:
    (user.home / "leaky.args").write_text(f'--hf_token "{WRITE}\n')
    for program in ("train_transformer.py", "push_to_huggingface.py"):
        done = client.run(user.home, *mistaken, program=program)
        assert done.code == ExitCode.USAGE and WRITE not in done.out + done.log, done.log


# --- no code in a file ever runs

SOURCES = [
    path
    for path in ROOT.rglob("*.py")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts) and "tests" not in path.parts
]


def calls_in(source: str) -> Iterator[tuple[str, ast.Call]]:
    """The calls in a program, with what is called as it is written there."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_files_are_loaded_as_weights_only() -> None:
    loads = 0
    for path in SOURCES:
        for name, call in calls_in(path.read_text(encoding="utf-8")):
            where = f"{path}:{call.lineno}"
            assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "eval", "exec"), where
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert keywords.get("allow_pickle", "False") == "False", where
            if name == "torch.load":
                loads += 1
                assert keywords.get("weights_only") == "True", where
    assert loads, "nothing was searched"
