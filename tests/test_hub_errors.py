"""What passes is waited out, the token goes to the Hub only, and each exception of the client finds its row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import httpx

from charseq2seq.errors import ExitCode
from charseq2seq.publishing.failures import PublishError, explain, is_xet_failure
from charseq2seq.publishing.hub import limit_client
from tests.hub.server import LFS_ONLY, WRITE, HubServer
from tests.push_client import REPO, Publisher


@pytest.mark.slow
def test_passing_trouble_is_waited_out(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    hub.fail("GET", "whoami", status=429, headers={"Retry-After": "1"}, times=1)
    hub.fail("GET", "/api/models/", status=503, times=3)
    hub.fail("GET", "/refs", drop="before", times=1)
    done = Publisher(hub, tmp_path / "user").push("--check")
    assert done.code == 0 and done.log.count("trying again") == 5


def test_a_servers_request_id_is_printed_and_an_echoed_token_is_not(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("GET", "/api/models/", status=403, message=f"token {WRITE} is out", headers={"X-Request-Id": "Root=1-abc"})
    done = Publisher(hub, tmp_path / "user").push("--check", "--json")
    assert "request id: Root=1-abc" in done.log and done.json["request_id"] == "Root=1-abc"
    assert "token … is out" in done.log


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"Retry-After": "3600"}, "in 60 minutes"),
        ({"RateLimit": '"api";r=0;t=90000'}, "in 1500 minutes"),
        ({"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"}, " minutes, which is too long to wait"),
    ],
)
def test_a_pause_that_is_too_long_ends_the_push_at_once(
    asked: dict[str, str], says: str, hub: HubServer, tmp_path: Path
) -> None:
    hub.add_repo(REPO)
    hub.fail("POST", "preupload", status=429, headers=asked)
    done = Publisher(hub, tmp_path / "user").push("--check")
    assert done.code == ExitCode.LOCKED and "it asks to come back" in done.log and says in done.log
    assert len(hub.calls("POST", "preupload")) == 1


def test_a_server_cannot_have_the_token_sent_elsewhere(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    actions = {"upload": {"href": f"{hub.storage_url}/sink"}, "verify": {"href": f"{hub.storage_url}/verify"}}
    objects = [
        {"oid": hashlib.sha256(path.read_bytes()).hexdigest(), "size": path.stat().st_size, "actions": actions}
        for path in folder.iterdir()
        if path.suffix in (".bin", ".safetensors", ".png")
    ]
    answer = json.dumps({"transfer": "basic", "objects": objects}).encode()
    hub.fail("POST", "/objects/batch", status=200, body=answer)
    hub.fail(path="^/(sink|verify)", status=200)
    Publisher(hub, tmp_path / "user").push(**LFS_ONLY)
    assert hub.calls("POST", "^/verify")
    assert {one.token for one in hub.requests if one.listener == "storage"} == {None}


def test_the_token_goes_to_the_hub_s_own_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    factories: list[Callable[[], httpx.Client]] = []
    monkeypatch.setattr("huggingface_hub.set_client_factory", factories.append)
    limit_client(60.0, WRITE)
    for address in (constants.ENDPOINT, constants.ENDPOINT.replace("https:", "http:"), f"{constants.ENDPOINT}:8443"):
        request = httpx.Request("GET", f"{address}/api/x", headers={"Authorization": f"Bearer {WRITE}"})
        with factories[0]() as client:
            client.event_hooks["request"][-1](request)
        assert ("Authorization" in request.headers) == (address == constants.ENDPOINT), address


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectTimeout("timed out"), "timeout"),
        (httpx.ConnectError("[Errno 111] Connection refused"), "unreachable"),
        (httpx.ProxyError("403 Forbidden"), "unreachable"),
        (httpx.ReadError("reset"), "dropped"),
        (ConnectionError("Network error: HTTP status client error (413 Payload Too Large), domain: x"), "too_large"),
        (ConnectionError("Network error: HTTP status server error (503 Service Unavailable)"), "server"),
        (ValueError("LFS batch API returned errors:\nfile larger than 5GB"), "too_large"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "server"),
        (PublishError("quota"), "quota"),
        (ValueError("a defect of ours"), None),
        (OSError(28, "No space left on device"), None),
    ],
)
def test_the_classifier_knows_what_it_cannot_be_shown(error: Exception, kind: str | None) -> None:
    explained = explain(error)
    assert (explained.kind if explained else None) == kind
    try:
        raise RuntimeError("Error while uploading 'pytorch_model.bin' to the Hub.") from error
    except RuntimeError as outer:
        explained = explain(outer)
    assert (explained.kind if explained else None) == kind, "causes are walked"


def test_only_failures_without_a_response_are_xets() -> None:
    assert is_xet_failure(ConnectionError("Network error: Request error"))
    assert is_xet_failure(RuntimeError("Data processing error"))
    assert not is_xet_failure(httpx.ReadTimeout("x")) and not is_xet_failure(FileNotFoundError("x"))
