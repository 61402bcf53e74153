"""What the loopback Hub is told to do wrong goes wrong for the real client, as often as told and no further."""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.hub.client import LFS_ONLY, WRITE, hub_with_people, run_client, start_client
from tests.hub.server import HubServer


def test_planned_faults_strike_as_often_as_planned(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.add_repo("alice/m")
    before = hub.fail("POST", "/commit/", drop="before", times=1)
    after = hub.fail("POST", "/commit/", drop="after", times=1)
    busy = hub.fail("POST", "/commit/", status=429, message="slow down", headers={"Retry-After": "7"}, times=1)
    html = {"Content-Type": "text/html"}
    gateway = hub.fail("POST", "/commit/", status=504, headers=html, body=b"<html>", drop="after", times=1)
    hub.fail("POST", "/commit/", call=lambda: repository.push({"between.txt": b"!"}), times=1)
    script = """
def attempt(name, **options):
    failure = refusal(lambda: commit("alice/m", {name: name}, **options))
    result[name] = failure and [failure["class"], failure["status"], failure["message"]]
    result[name + " head"] = api.model_info("alice/m").sha
for name in ("dropped before", "dropped after", "busy", "gateway"):
    attempt(name)
repeated = commit("alice/m", {"dropped after": "dropped after"})
result["repeated"] = repeated.oid
attempt("overtaken", parent_commit=repeated.oid)
attempt("sound")
"""
    result = run_client(hub, tmp_path, script)
    titles = [one.title for one in repository.commits][::-1]
    commits = [one.id for one in repository.commits][::-1]
    assert result["dropped before"] == result["dropped after"] == ["RemoteProtocolError", None, None]
    assert result["busy"] == ["HfHubHTTPError", 429, "slow down"]
    assert result["gateway"] == ["HfHubHTTPError", 504, None]
    assert result["overtaken"][:2] == ["HfHubHTTPError", 412]
    assert result["sound"] is None
    assert titles == ["initial commit", "push", "push", "Edit on the website", "push"]
    heads = [result[f"{name} head"] for name in ("dropped before", "dropped after", "busy", "gateway")]
    assert heads == [commits[0], commits[1], commits[1], commits[2]]
    assert result["repeated"] == commits[2], "a push whose answer was lost is not committed again"
    assert [fault.hits for fault in (before, after, busy, gateway)] == [1, 1, 1, 1]
    statuses = [one.status for one in hub.calls("POST", "/commit/")]
    assert statuses == [None, None, 429, 504, 412, 200]


def test_a_silent_server_is_given_up_only_with_a_timeout_of_ones_own(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("GET", "/api/whoami-v2", delay=math.inf)
    script = """
from huggingface_hub.utils import httpx
from huggingface_hub.utils._http import default_client_factory
result["default"] = default_client_factory().timeout.read
def impatient():
    client = default_client_factory()
    client.timeout = httpx.Timeout(1, connect=5)
    return client
set_client_factory(impatient)
result["silent"] = refusal(api.whoami)
result["other"] = refusal(lambda: api.create_repo("alice/m"))
"""
    result = run_client(hub, tmp_path, script)
    assert result["default"] is None
    assert result["silent"]["class"] == "ReadTimeout"
    assert result["other"] is None
    assert [one.status for one in hub.calls("GET", "whoami")] == [None]


def test_xet_that_fails_looks_like_a_connection_error_without_status(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.add_repo("alice/m")
    token_fault = hub.fail("GET", "xet-write-token", status=403, message="no", times=1)
    hub.fail("POST", "/v1/xorbs/", status=401, times=1)
    push = """
push = lambda: refusal(lambda: api.create_commit("alice/m", [Add("w.bin", os.urandom(1000))], commit_message="x"))
result = {name: push() for name in NAMES}
"""
    impatient = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1", "HF_XET_CLIENT_RETRY_BASE_DELAY": "100ms"}

    def pushes(server: HubServer, *names: str) -> dict[str, Any]:
        script = push.replace("NAMES", repr(names))
        return dict(run_client(server, tmp_path / names[0], script, **impatient))

    result = pushes(hub, "token", "unauthorized", "sound")
    assert result.pop("sound") is None and token_fault.hits == 1
    head = repository.head
    hub.fail("POST", "/v1/xorbs/", status=503)
    result |= pushes(hub, "unavailable")
    hub.mend()
    hub.unplug_cas()
    result |= pushes(hub, "dead")
    with hub_with_people(xet="off") as plain_hub:
        plain_hub.add_repo("alice/m")
        result |= pushes(plain_hub, "absent")

    assert repository.head == head
    assert {name: ("ConnectionError" in one["bases"], one["status"]) for name, one in result.items()} == dict.fromkeys(
        ("token", "unauthorized", "unavailable", "dead", "absent"), (True, None)
    )
    for name, status in (("token", "403"), ("unauthorized", "401"), ("unavailable", "503"), ("absent", "404")):
        assert status in result[name]["text"], name


def test_a_client_killed_in_the_middle_of_a_commit_leaves_the_old_head(hub: HubServer, tmp_path: Path) -> None:
    repository = hub.add_repo("alice/m")
    head = repository.head
    started = threading.Event()
    process: list[subprocess.Popen[str]] = []

    def kill() -> None:
        started.wait()
        process[0].send_signal(signal.SIGKILL)
        process[0].wait()

    hub.fail("POST", "/objects/batch", call=kill)
    script = 'api.create_commit("alice/m", [Add("w.bin", b"w")], commit_message="x")'
    process.append(start_client(hub, tmp_path, script, **LFS_ONLY))
    started.set()
    process[0].communicate()
    assert process[0].returncode == -signal.SIGKILL
    assert repository.head == head and not hub.calls("POST", "/commit/")


def commit_body(path: str, parent: str) -> bytes:
    """The ndjson of a commit that adds one small file."""
    header = {"key": "header", "value": {"summary": path, "parentCommit": parent}}
    file = {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}}
    return f"{json.dumps(header)}\n{json.dumps(file)}\n".encode()


def test_half_a_request_does_nothing(hub: HubServer) -> None:
    repository = hub.add_repo("alice/m")
    body = commit_body("x.txt", repository.head)
    head = (
        "POST /api/models/alice/m/commit/main HTTP/1.1\r\nHost: hub\r\n"
        f"Authorization: Bearer {WRITE}\r\nContent-Length: {len(body) + 1}\r\n\r\n"
    )
    with socket.create_connection((urlsplit(hub.endpoint).hostname, urlsplit(hub.endpoint).port)) as connection:
        connection.sendall(head.encode() + body)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"", "the server hangs up without an answer"
    assert len(repository.commits) == 1


def test_of_many_commits_upon_one_parent_exactly_one_wins(hub: HubServer) -> None:
    repository = hub.add_repo("alice/m")
    parent = repository.head

    def push(number: int) -> int:
        connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc)
        body = commit_body(f"{number}.txt", parent)
        connection.request("POST", "/api/models/alice/m/commit/main", body, {"Authorization": f"Bearer {WRITE}"})
        status = connection.getresponse().status
        connection.close()
        return status

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(push, range(16)))
    assert sorted(statuses) == [200] + [412] * 15
    assert set(repository.files()) == {".gitattributes", f"{statuses.index(200)}.txt"}


def test_closing_cuts_waiting_clients_and_frees_the_ports() -> None:
    with hub_with_people() as hub:
        host, port = urlsplit(hub.endpoint).hostname, urlsplit(hub.endpoint).port
        hub.fail(delay=math.inf)
        waiting = socket.create_connection((host, port))
        waiting.sendall(b"GET /api/whoami-v2 HTTP/1.1\r\nHost: hub\r\n\r\n")
        idle = socket.create_connection((host, port))
    for connection in (waiting, idle):
        with connection:
            connection.settimeout(30)
            with contextlib.suppress(ConnectionResetError):  # what the server had not yet accepted is reset
                assert connection.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, port))


def test_a_defect_of_the_server_itself_fails_the_test_that_uses_it() -> None:
    with pytest.raises(AssertionError, match="KeyError"), hub_with_people() as hub:
        nonsense = urllib.request.Request(f"{hub.endpoint}/api/validate-yaml", data=b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(nonsense)
