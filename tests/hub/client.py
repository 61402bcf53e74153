"""The real client against `HubServer`: scripts in fresh processes, and the people whom they speak for.

The client reads its environment when it is imported, so every script is a process of its own (a quarter of
a second); what it leaves in the variable `result` comes back to the test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.hub.server import HubServer, fake_token

WRITE, READ, STRANGER = fake_token("write"), fake_token("read"), fake_token("stranger")
ONE_REPO, WHOLE_ORG = fake_token("oneRepo"), fake_token("wholeOrg")
LFS_ONLY = {"HF_HUB_DISABLE_XET": "1"}

# What every script begins with; `refusal(call)` tells how a call failed, None if it did not.
PRELUDE = """
import json, os, sys
from huggingface_hub import CommitOperationAdd as Add, CommitOperationDelete as Delete, HfApi
from huggingface_hub import hf_hub_download, set_client_factory, snapshot_download
api, result = HfApi(), {}

def refusal(call):
    try:
        call()
    except Exception as error:
        response = getattr(error, "response", None)
        return {"class": type(error).__name__, "bases": [base.__name__ for base in type(error).__mro__],
                "status": getattr(response, "status_code", None), "text": str(error),
                "message": getattr(error, "server_message", None)}

def commit(repo, files, **options):
    return api.create_commit(repo, [Add(path, text.encode()) for path, text in files.items()],
                             **{"commit_message": "push", **options})
"""


def start_client(
    hub: HubServer, home: Path, script: str, token: str | None = WRITE, **environment: str
) -> subprocess.Popen[str]:
    """Start a process that runs `script` with the real client; it works in `home`."""
    home.mkdir(exist_ok=True)
    program = f"{PRELUDE}\n{script}\nprint(json.dumps(result))"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env={**hub.environment(home, token), **environment},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_client(hub: HubServer, home: Path, script: str, token: str | None = WRITE, **environment: str) -> Any:
    """Run `script` with the real client to its end and return its `result`."""
    process = start_client(hub, home, script, token, **environment)
    output, log = process.communicate()
    assert process.returncode == 0, log
    return json.loads(output.splitlines()[-1])


def hub_with_people(**options: Any) -> HubServer:
    """A Hub where alice has every kind of token, writes for acme and reads for museum; and a stranger.

    Args:
        options: as for `HubServer`.
    """
    hub = HubServer(**options)
    alice: dict[str, Any] = {WRITE: "write", READ: "read"}
    alice[ONE_REPO] = {"alice/m": ["repo.write"]}
    alice[WHOLE_ORG] = {"acme": ["repo.content.read", "repo.write"]}
    hub.add_user("alice", tokens=alice, orgs={"acme": "write", "museum": "read"})
    hub.add_user("mallory", tokens={STRANGER: "write"})
    return hub
