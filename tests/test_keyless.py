"""Pushes without a stored token: a job shows the Hub who it is, and the examples' own commands do so."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from charseq2seq.errors import ExitCode
from charseq2seq.options import read_settings
from tests.hub.server import WRITE, HubServer
from tests.push_client import ALL_FILES, REPO, ROOT, Publisher, titles
from tests.train_client import TINY, Trainee

IDENTITY = "eyJidGVzdCI6MX0.e30.c2ln"  # of a job, as its CI system states it
JOB = {"HF_OIDC_RESOURCE": REPO, "HF_OIDC_ID_TOKEN": IDENTITY}
SIGNED_IN = "token: from keyless sign-in (HF_OIDC_RESOURCE)"


def on_github(hub: HubServer) -> dict[str, str]:
    """Play GitHub, which states a job's identity to whoever has the job's own token."""
    hub.fail("GET", "^/github", status=200, body=json.dumps({"value": IDENTITY}).encode())
    job = {"ACTIONS_ID_TOKEN_REQUEST_URL": f"{hub.endpoint}/github", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "of-the-job"}
    return {"GITHUB_ACTIONS": "true", "HF_OIDC_RESOURCE": REPO, **job}


def test_a_job_that_is_trusted_pushes_to_its_repository(alice: Publisher, hub: HubServer, folder: Path) -> None:
    hub.add_repo(REPO)
    hub.trust(REPO, IDENTITY)
    hub.fail("POST", "/oauth/token", status=503, times=1)
    done = alice.push("--json", token=None, **on_github(hub))
    assert done.code == ExitCode.OK and done.json["state"] == "pushed", done.log
    assert SIGNED_IN in done.log and f"may write to {REPO} alone" in done.log
    files = hub.repo(REPO).files()
    assert {name: files[name] for name in ALL_FILES} == {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = hub.calls("GET", "^/github")[-1]
    assert asked.query["audience"] == hub.endpoint and asked.token == "of-the-job"
    assert not hub.calls("GET", "whoami") and not hub.calls("POST", "/repos/create"), "its token does not open these"
    tokens = {one.token for one in hub.requests if one.token and one.listener == "hub"} - {"of-the-job"}
    assert len(tokens) == 1 and tokens.pop() not in done.log + done.out, "one exchange, and nobody sees the token"
    assert "up to date" in alice.push(token=None, **JOB).log and len(titles(hub)) == 1


@pytest.mark.parametrize(
    ("arguments", "resource", "says"),
    [
        (["--repo_name", "other"], REPO, f"it is {REPO}, and the push goes to alice/other"),
        (["--username", "bob"], REPO, f"it is {REPO}, and the push goes to bob/"),
        ([], "alice/not-there", "invalid_grant: No matching trusted publisher"),
        ([], f"datasets/{REPO}", "invalid_grant: No matching trusted publisher"),
    ],
)
def test_a_job_can_push_nowhere_else(
    arguments: list[str], resource: str, says: str, alice: Publisher, hub: HubServer
) -> None:
    hub.add_repo(REPO)
    hub.trust(REPO, IDENTITY)
    done = alice.push("--check", *arguments, token=None, **JOB | {"HF_OIDC_RESOURCE": resource})
    assert done.code == ExitCode.NO_PERMISSION and "❌ Push failed: keyless sign-in failed" in done.log, done.log
    assert says in done.log and "set it to the OWNER/NAME of the push" in done.log
    assert not hub.calls("POST", "preupload")


def test_an_exchange_that_a_proxy_stops_is_a_failure_of_the_network(alice: Publisher, hub: HubServer) -> None:
    hub.fail("POST", "/oauth/token", status=407)
    done = alice.push("--check", token=None, **JOB)
    assert done.code == ExitCode.UNAVAILABLE and "the Hub cannot be reached (HTTP 407" in done.log


# --- the examples

ACTIONS, JOBS = ROOT / "examples" / "github_actions", ROOT / "examples" / "hf_jobs"


@pytest.mark.slow
def test_the_workflow_checks_trains_and_pushes_without_a_secret(alice: Publisher, hub: HubServer) -> None:
    text = (ACTIONS / "nightly.yml").read_text()
    workflow: dict[Any, Any] = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read", "id-token": "write"} and "secrets." not in text
    steps = [step for step in workflow["jobs"]["nightly"]["steps"] if "python " in step.get("run", "")]
    check, train, push = [step["run"] for step in steps]
    settings = read_settings(shlex.split(train.splitlines()[-1])[2:])
    assert settings.mode == "train" and settings.max_minutes and not settings.push_to_hf
    resource = workflow["env"]["HF_OIDC_RESOURCE"].replace("your_username", "alice")
    hub.add_repo(resource)
    hub.trust(resource, IDENTITY)
    (alice.home / "push_to_huggingface.py").symlink_to(ROOT / "push_to_huggingface.py")
    (alice.home / "nightly").mkdir()
    (alice.home / "transformer_model.pth").rename(alice.home / settings.model_path)
    environment = hub.environment(alice.home) | on_github(hub) | {"HF_OIDC_RESOURCE": resource, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    for command in (check, push):
        run = ["bash", "-ec", command]
        done = subprocess.run(run, cwd=alice.home, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and SIGNED_IN in done.stderr, done.stderr
    assert len(titles(hub, resource)) == 1


def schedule() -> list[str]:
    """The command line that schedules the nights on the Hub's machines."""
    (line,) = re.findall(r"^    hf (jobs scheduled run .*)$", (JOBS / "README.md").read_text(), re.MULTILINE)
    return shlex.split(line)


def test_the_line_that_schedules_a_job_is_what_the_hubs_program_takes(hub: HubServer, tmp_path: Path) -> None:
    words = schedule()
    words.insert(words.index("python:3.12"), "--dry-run")
    command = [str(Path(sys.executable).with_name("hf")), *words]
    environment = hub.environment(tmp_path, WRITE)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "15 3 * * *" in done.stdout, done.stderr
    assert "/suite/examples/hf_jobs/nightly.sh" in done.stdout and WRITE not in done.stdout


@pytest.mark.slow
def test_a_night_on_the_hubs_machine_trains_pushes_and_keeps_its_state(hub: HubServer, user: Trainee) -> None:
    suite = user.home / "read_only"
    for name in ("charseq2seq", "data", "examples/hf_jobs"):
        shutil.copytree(ROOT / name, suite / name)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("requirements*")):
        shutil.copy(path, suite)
    suite.chmod(0o500)
    (user.home / "pip").write_text("#!/bin/bash\n")  # what is to be installed is there
    (user.home / "pip").chmod(0o755)
    environment = hub.environment(user.home, WRITE) | {"STATE": str(user.home), "TMPDIR": str(user.home)}
    environment["PATH"] = os.pathsep.join(map(str, (user.home, Path(sys.executable).parent, environment["PATH"])))
    words = schedule()
    script = words.index("/suite/examples/hf_jobs/nightly.sh")
    tiny = ["--data_path", str(user.home / "text.txt"), *TINY, "--max_steps", "4", "--num_threads", "1"]
    command = ["bash", str(suite / "examples" / "hf_jobs" / "nightly.sh"), *words[script + 1 :], *tiny]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(titles(hub, "alice/my-shakespeare-transformer")) == 1
    assert {"nightly.pth", "nightly.resume.pth"} <= {path.name for path in user.home.iterdir()}
