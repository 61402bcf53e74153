"""Everything that can go wrong with a push, provoked by a Hub on loopback and seen at the command line.

Each row must give its message, its remedy and its exit code, the same as JSON, no traceback, no token, and must leave
nothing half-published. `Publisher.push` checks for tracebacks and tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import httpx

from charseq2seq.errors import ExitCode
from charseq2seq.publishing.failures import FAILURES, PublishError
from charseq2seq.publishing.hub_errors import explain, is_xet_failure
from charseq2seq.publishing.repository_folder import build_folder
from tests.hub_client import LFS_ONLY, ONE_REPO, READ, STRANGER, WRITE, hub_with_people
from tests.hub_server import HubServer, fake_token
from tests.push_client import Publisher, tiny_checkpoint

REPO = "alice/shakespeare-transformer"
CHECK = ("--check",)


@dataclass(frozen=True)
class Row:
    """A case: how it comes about, and what the user must see."""

    headline: str
    code: ExitCode
    remedy: str
    arrange: Callable[[HubServer], object] = lambda hub: None
    arguments: tuple[str, ...] = CHECK
    token: str | None = WRITE
    environment: Mapping[str, str] = field(default_factory=dict)


def failing(method: str, path: str, **how: Any) -> Callable[[HubServer], object]:
    """Plan a fault."""
    return lambda hub: hub.fail(method, path, **how)


def hide_what_was_made(hub: HubServer) -> None:
    """Play a Hub that no longer lists files once it has made a commit."""
    hub.fail("POST", "/commit/", call=lambda: hub.fail("GET", "/tree/", status=403), times=1)


DENIED, DOWN, BUSY = ExitCode.NO_PERMISSION, ExitCode.UNAVAILABLE, ExitCode.LOCKED
HTML = {"Content-Type": "text/html"}
BEFORE_ANYTHING_SLOW = {
    "bad token": Row("Push failed: HTTP 401 Unauthorized", DENIED, '"Write" permission', token=fake_token("nobody")),
    "no token": Row("Push failed: no token", DENIED, "HF_TOKEN", token=None),
    "read-only token": Row("Push failed: read-only token", DENIED, '"Write" permission', token=READ),
    "read-only on an existing repository": Row(
        "Push failed: read-only token", DENIED, '"Write" permission', lambda hub: hub.add_repo(REPO), token=READ
    ),
    "the Hub says read-only": Row(
        "Push failed: read-only token (HTTP 403 Forbidden)",
        DENIED,
        '"Write" permission',
        lambda hub: (
            hub.add_repo(REPO),
            hub.fail(path="preupload", status=403, message="you must use a write token to upload to a repository."),
        ),
    ),
    "somebody else's namespace": Row(
        "Push failed: no right on this namespace", DENIED, "--username", arguments=(*CHECK, "--username", "mallory")
    ),
    "an organisation to look at": Row(
        "Push failed: no right on this namespace", DENIED, "--username", arguments=(*CHECK, "--username", "museum")
    ),
    "token for another repository": Row(
        "Push failed: token without the right to write here", DENIED, "write access", token=ONE_REPO
    ),
    "token for another repository, this one exists": Row(
        "Push failed: token without the right to write here (HTTP 403 Forbidden)",
        DENIED,
        "write access",
        lambda hub: hub.add_repo(REPO),
        token=ONE_REPO,
    ),
    "the Hub says it is somebody else's": Row(
        "Push failed: no right on this repository (HTTP 403 Forbidden)",
        DENIED,
        "--create_pr",
        lambda hub: (
            hub.add_repo(REPO),
            hub.fail(path="preupload", status=403, message="pass `create_pr=1` as a query parameter"),
        ),
    ),
    "any other refusal": Row(
        "Push failed: HTTP 403 Forbidden", DENIED, "account access", failing("GET", "whoami", status=403)
    ),
    "somebody else's repository": Row(
        "Repository already exists",
        ExitCode.CONFLICT,
        "add a version number",
        lambda hub: hub.add_repo(REPO),
        (*CHECK, "--username", "alice"),
        STRANGER,
    ),
    "somebody's work": Row(
        "Repository already exists", ExitCode.CONFLICT, "--overwrite", lambda hub: hub.add_repo(REPO, {"a.py": b"1"})
    ),
    "public, not private": Row(
        "Push failed: the repository is public",
        ExitCode.CONFLICT,
        "leave out --private",
        lambda hub: hub.add_repo(REPO),
        (*CHECK, "--private"),
    ),
    "invalid name": Row(
        "Push failed: invalid repository name",
        ExitCode.USAGE,
        "choose another --repo_name",
        arguments=(*CHECK, "--repo_name", "a--b"),
    ),
    "owner in the name": Row(
        "Push failed: invalid repository name",
        ExitCode.USAGE,
        "choose another --repo_name",
        arguments=(*CHECK, "--repo_name", "alice/m"),
    ),
    "not the Hub": Row(
        "Push failed: not found (HTTP 404 Not Found)", ExitCode.NO_INPUT, "check", failing("GET", "whoami", status=404)
    ),
    "rate limit": Row(
        "Push failed: HTTP 429 Too Many Requests",
        BUSY,
        "wait a few minutes",
        failing("GET", "whoami", status=429, headers={"Retry-After": "7200"}),
        (*CHECK, "--deadline", "5"),
    ),
    "gateway": Row(
        "Push failed: HTTP 502 Bad Gateway",
        DOWN,
        "status.huggingface.co",
        failing("GET", "whoami", status=502, headers=HTML, body=b"<html>"),
    ),
    "host not found": Row(
        "Push failed: host not found", DOWN, "HTTPS_PROXY", environment={"HF_ENDPOINT": "http://nowhere.invalid"}
    ),
    "refused": Row("Push failed: Connection refused", DOWN, "HF_ENDPOINT", environment={"HF_ENDPOINT": "{dead_url}"}),
    "dead proxy": Row(
        "Push failed: Connection refused",
        DOWN,
        "proxy",
        environment={"HTTP_PROXY": "{dead_url}", "HF_ENDPOINT": "http://hub.example", "NO_PROXY": ""},
    ),
    "proxy wants a password": Row(
        "Push failed: TLS or proxy trouble", DOWN, "HTTPS_PROXY", failing("GET", "whoami", status=407)
    ),
    "silence": Row(
        "Push failed: Connection timeout",
        DOWN,
        "check the network, or try a proxy",
        failing("GET", "whoami", delay=math.inf),
        (*CHECK, "--timeout", "0.1"),
    ),
    "deadline": Row(
        "Push failed: Deadline passed",
        DOWN,
        "--deadline",
        failing("GET", "whoami", delay=math.inf),
        (*CHECK, "--deadline", "0.4"),
    ),
    "connection lost": Row("Push failed: Connection lost", DOWN, "push again", failing("GET", "whoami", drop="before")),
    "offline": Row("Push failed: offline mode", DOWN, "unset HF_HUB_OFFLINE", environment={"HF_HUB_OFFLINE": "1"}),
}
NEW = ("--no_verify",)
WITH_FILES_IN_HAND = {
    "413": Row("File too large", ExitCode.TOO_LARGE, "Git LFS", failing("POST", "/commit/", status=413), NEW),
    "storage says 413": Row(
        "File too large",
        ExitCode.TOO_LARGE,
        "make the model smaller",
        failing("PUT", "/lfs/", status=413),
        NEW,
        environment=LFS_ONLY,
    ),
    "storage says 403": Row(
        "Push failed: HTTP 403 Forbidden", DENIED, "account", failing("PUT", "/lfs/", status=403), NEW, WRITE, LFS_ONLY
    ),
    "quota": Row(
        "Push failed: storage limit reached (HTTP 403 Forbidden)",
        ExitCode.TOO_LARGE,
        "delete what is no longer needed",
        failing("POST", "/commit/", status=403, message="Private repository storage limit reached, please upgrade"),
        NEW,
    ),
    "rejected card": Row(
        "Push failed: model card rejected",
        ExitCode.BAD_DATA,
        "correct it in the README.md",
        failing("POST", "validate-yaml", status=400, body=b'{"errors": [{"message": "no"}], "warnings": []}'),
        NEW,
    ),
    "rejected commit": Row(
        "Push failed: HTTP 400 Bad Request",
        ExitCode.BAD_DATA,
        "read what it says",
        failing("POST", "/commit/", status=400, message="an LFS pointer pointed to a file that does not exist"),
        NEW,
    ),
    "a card check that is down": Row(
        "Push failed: ", DOWN, "push again", failing("POST", "validate-yaml", status=502, headers=HTML, body=b"<"), NEW
    ),
    "another commit for ever": Row(
        "Push failed: somebody else is pushing (HTTP 409 Conflict)",
        BUSY,
        "push again",
        failing("POST", "/commit/", status=409, message="Another commit operation is in progress"),
        NEW,
    ),
    "no right to create": Row(
        "Push failed: no right on this namespace (HTTP 403 Forbidden)",
        DENIED,
        "--username",
        failing(
            "POST",
            "/repos/create",
            status=403,
            message="You don't have the rights to create a model under the namespace",
        ),
        NEW,
    ),
    "dropped for ever": Row(
        "Push failed: Connection lost", DOWN, "push again", failing("POST", "/commit/", drop="before"), NEW
    ),
    "made, then trouble": Row(
        "Push failed: sent, but not confirmed", ExitCode.UNCONFIRMED, "look", hide_what_was_made, NEW
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository folder of a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("built") / "folder"
    build_folder(tiny_checkpoint(), folder, REPO)
    return folder


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A Hub with people and with Xet."""
    with hub_with_people() as server:
        yield server


def see(hub: HubServer, home: Path, row: Row, *more: str) -> None:
    """Let the row happen and check what the user sees."""
    user = Publisher(hub, home)
    row.arrange(hub)
    heads = {name: hub.repo(name).head for name in hub.repos}
    environment = {name: value.format(dead_url=hub.dead_url) for name, value in row.environment.items()}
    done = user.push(*row.arguments, *more, "--json", token=row.token, **environment)
    assert done.code == row.code, done.log
    assert f"❌ {row.headline}" in done.log and row.remedy in done.log, done.log
    facts = json.loads(done.out)
    assert (facts["ok"], facts["exit_code"]) == (False, row.code)
    assert facts["message"].startswith(row.headline) and row.remedy in facts["remedy"]
    if row.code != ExitCode.UNCONFIRMED:
        for name in hub.repos:
            assert hub.repo(name).head == heads.get(name, hub.repo(name).commits[-1].id), "nothing is half-published"


@pytest.fixture(scope="module")
def cases(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[None]]]:
    """All rows, each with a Hub of its own, a few at a time: they mostly wait."""

    def play(row: Row, *more: str) -> None:
        with hub_with_people() as hub:
            see(hub, tmp_path_factory.mktemp("user"), row, *more)

    with ThreadPoolExecutor(4) as pool:
        early = {case: pool.submit(play, row) for case, row in BEFORE_ANYTHING_SLOW.items()}
        late = {case: pool.submit(play, row, "--from_dir", str(folder)) for case, row in WITH_FILES_IN_HAND.items()}
        yield early | late


@pytest.mark.parametrize("case", BEFORE_ANYTHING_SLOW)
def test_what_cannot_work_is_refused_before_anything_slow(case: str, cases: dict[str, Future[None]]) -> None:
    cases[case].result()


@pytest.mark.parametrize("case", WITH_FILES_IN_HAND)
def test_what_goes_wrong_later_is_told_and_publishes_nothing(case: str, cases: dict[str, Future[None]]) -> None:
    cases[case].result()


def test_an_unknown_certificate_is_told(tmp_path: Path) -> None:
    with hub_with_people(tls=True) as hub:
        unset = {"SSL_CERT_FILE": ""}
        see(hub, tmp_path / "user", Row("Push failed: TLS or proxy trouble", DOWN, "SSL_CERT_FILE", environment=unset))
        bad = Row("Push failed: HTTP 401 Unauthorized", DENIED, '"Write" permission', token=fake_token("nobody"))
        see(hub, tmp_path / "user", bad)


def test_over_https_a_repository_hidden_by_a_401_is_still_a_401(tmp_path: Path) -> None:
    with hub_with_people(tls=True) as hub:
        hub.fail("GET", "/api/models/", status=401, message="Invalid username or password.")
        done = Publisher(hub, tmp_path / "user").push("--check")
    assert done.code == DENIED and "❌ Push failed: HTTP 401 Unauthorized" in done.log


def test_passing_trouble_is_waited_out(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    hub.fail("GET", "whoami", status=429, headers={"Retry-After": "1"}, times=1)
    hub.fail("GET", "/api/models/", status=503, times=2)
    hub.fail("GET", "/refs", drop="before", times=1)
    done = Publisher(hub, tmp_path / "user").push("--check")
    assert done.code == 0 and done.log.count("trying again") == 4


def test_a_servers_request_id_is_printed_and_an_echoed_token_is_not(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("GET", "/api/models/", status=403, message=f"token {WRITE} is out", headers={"X-Request-Id": "Root=1-abc"})
    done = Publisher(hub, tmp_path / "user").push("--check", "--json")
    assert "request id: Root=1-abc" in done.log and done.json["request_id"] == "Root=1-abc"
    assert "token … is out" in done.log


def test_a_library_that_waits_as_long_as_it_is_told_is_kept_from_it(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo(REPO)
    hub.fail("POST", "preupload", status=429, headers={"RateLimit": '"api";r=0;t=90000'}, times=1)
    assert Publisher(hub, tmp_path / "user").push("--check").code == 0


def test_a_token_goes_to_the_endpoint_only(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    address = f"{hub.storage_url}/elsewhere"
    hub.fail("GET", "/api/models/[^/]+/[^/]+$", status=302, headers={"Location": address})
    Publisher(hub, tmp_path / "user").push("--check")
    assert {one.token for one in hub.requests if one.listener == "storage"} == {None}
    assert hub.calls("GET", "/elsewhere")


def test_a_server_cannot_have_the_token_sent_elsewhere(hub: HubServer, tmp_path: Path, folder: Path) -> None:
    objects = [
        {
            "oid": hashlib.sha256(path.read_bytes()).hexdigest(),
            "size": path.stat().st_size,
            "actions": {
                "upload": {"href": f"{hub.storage_url}/sink"},
                "verify": {"href": f"{hub.storage_url}/verify"},
            },
        }
        for path in folder.iterdir()
        if path.suffix in (".bin", ".safetensors", ".png")
    ]
    answer = json.dumps({"transfer": "basic", "objects": objects}).encode()
    hub.fail("POST", "/objects/batch", status=200, body=answer)
    hub.fail(path="^/(sink|verify)", status=200)
    Publisher(hub, tmp_path / "user").push("--from_dir", str(folder), **LFS_ONLY)
    assert hub.calls("POST", "^/verify")
    assert {one.token for one in hub.requests if one.listener == "storage"} == {None}


def test_a_secret_in_the_folder_is_never_sent(hub: HubServer, tmp_path: Path) -> None:
    checkpoint = dataclasses.replace(tiny_checkpoint(), environment={"note": f"run with {WRITE}"})
    done = Publisher(hub, tmp_path / "user", checkpoint).push()
    assert done.code == ExitCode.BAD_DATA and "❌ Push failed: the folder holds a secret" in done.log
    assert "the token in use, in README.md" in done.log
    assert not hub.calls("POST", "") and hub.repos == []


def test_a_model_that_is_not_there_or_not_one_is_refused(hub: HubServer, tmp_path: Path) -> None:
    user = Publisher(hub, tmp_path / "user")
    assert user.push("--model_path", "absent.pth").code == ExitCode.NO_INPUT
    (user.home / "transformer_model.pth").write_bytes(b"not a model")
    done = user.push("--json")
    assert done.code == ExitCode.BAD_DATA and done.json["ok"] is False
    assert "transformer_model.pth cannot be used" in done.json["message"]
    assert hub.repos == []


def test_every_row_of_the_table_has_a_case_somewhere() -> None:
    """A row that nothing can provoke would be a promise nobody keeps."""
    tests = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    unseen = [
        kind
        for kind, failure in FAILURES.items()
        if kind not in ("server", "forbidden", "rate_limit", "bad_token", "rejected")  # their headline is the status
        and failure.headline.replace(" ({status})", "") not in tests
    ]
    assert not unseen


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (httpx.ConnectTimeout("timed out"), "timeout"),
        (httpx.WriteTimeout("timed out"), "timeout"),
        (httpx.ConnectError("[Errno 11001] getaddrinfo failed"), "dns"),
        (httpx.ConnectError("[Errno 111] Connection refused"), "refused"),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed"), "tls"),
        (httpx.ProxyError("403 Forbidden"), "tls"),
        (httpx.ReadError("reset"), "dropped"),
        (ConnectionError("Network error: HTTP status client error (413 Payload Too Large), domain: x"), "too_large"),
        (ConnectionError("Network error: HTTP status server error (503 Service Unavailable)"), "server"),
        (ValueError("LFS batch API returned errors:\nfile larger than 5GB"), "too_large"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "server"),
        (PublishError("offline"), "offline"),
        (KeyError("a defect of ours"), None),
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
