"""Everything that can go wrong with a push: how a Hub on loopback brings it about, and what the user must see."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from charseq2seq.errors import ExitCode
from tests.hub.client import LFS_ONLY, ONE_REPO, READ, STRANGER, WRITE
from tests.hub.server import HubServer, fake_token
from tests.push_client import REPO

CHECK = ("--check",)


@dataclass(frozen=True)
class Row:
    """A case: how it comes about, and what the user must see.

    A `note` stands in the checkpoint; `{names}` in arguments and environment are filled in.
    """

    kind: str
    headline: str
    code: ExitCode
    remedy: str
    arrange: Callable[[HubServer], object] = lambda hub: None
    arguments: tuple[str, ...] = CHECK
    token: str | None = WRITE
    note: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


def failing(method: str, path: str, **how: Any) -> Callable[[HubServer], object]:
    """Plan a fault."""
    return lambda hub: hub.fail(method, path, **how)


def with_repo(files: Mapping[str, bytes] | None = None, **fault: Any) -> Callable[[HubServer], object]:
    """Let the repository exist already; with a fault, at the probe for the right to write."""

    def arrange(hub: HubServer) -> None:
        hub.add_repo(REPO, files)
        if fault:
            hub.fail(path="preupload", **fault)

    return arrange


def tagged(hub: HubServer) -> None:
    """Let the repository have a tag."""
    repository = hub.add_repo(REPO)
    repository.refs["refs/tags/v1"] = repository.head


def published(hub: HubServer) -> None:
    """Let another model of this suite's be published, measured on another text."""
    record = {"made_by": "charseq2seq", "files": [], "metrics": {"nats_per_char": 9.0}, "corpus": {"sha256": "cd" * 32}}
    hub.add_repo(REPO, {"training_args.json": json.dumps(record).encode()})


def hide_what_was_made(hub: HubServer) -> None:
    """Play a Hub that no longer lists files once it has made a commit."""
    hub.fail("POST", "/commit/", call=lambda: hub.fail("GET", "/tree/", status=403), times=1)


def fall_silent_after_the_commit(hub: HubServer) -> None:
    """Play a line that breaks for good while the commit's answer travels."""
    hub.fail("POST", "/commit/", drop="after", call=lambda: hub.fail("GET", "/api/models/", status=403), times=1)


DENIED, DOWN, BUSY, LARGE = ExitCode.NO_PERMISSION, ExitCode.UNAVAILABLE, ExitCode.LOCKED, ExitCode.TOO_LARGE
CONFLICT, BAD_DATA = ExitCode.CONFLICT, ExitCode.BAD_DATA
MAY_WRITE = '"Write" permission'
HTML = {"Content-Type": "text/html"}
NO_RIGHT, NAMESPACE = "no right to write here", "no right on this namespace"
UNREACHABLE = "Push failed: the Hub cannot be reached"
BEFORE_ANYTHING_SLOW = {
    "bad token": Row("bad_token", "Push failed: HTTP 401 Unauthorized", DENIED, MAY_WRITE, token=fake_token("nobody")),
    "no token at all": Row(
        "bad_token", "Push failed: the Hub does not accept the token", DENIED, MAY_WRITE, token="hf_sp\u00e9cial"
    ),
    "no token": Row("no_token", "Push failed: no token", DENIED, "HF_TOKEN", token=None),
    "read-only token": Row("forbidden", f"Push failed: {NO_RIGHT}", DENIED, MAY_WRITE, token=READ),
    "read-only on an existing repository": Row(
        "forbidden", f"Push failed: {NO_RIGHT}", DENIED, MAY_WRITE, with_repo(), token=READ
    ),
    "the Hub says read-only": Row(
        "forbidden",
        f"Push failed: {NO_RIGHT} (HTTP 403 Forbidden)",
        DENIED,
        MAY_WRITE,
        with_repo(status=403, message="you must use a write token to upload to a repository."),
    ),
    "somebody else's namespace": Row(
        "namespace", f"Push failed: {NAMESPACE}", DENIED, "--username", arguments=(*CHECK, "--username", "mallory")
    ),
    "an organisation to look at": Row(
        "namespace", f"Push failed: {NAMESPACE}", DENIED, "--username", arguments=(*CHECK, "--username", "museum")
    ),
    "token for another repository": Row("forbidden", f"Push failed: {NO_RIGHT}", DENIED, MAY_WRITE, token=ONE_REPO),
    "token for another repository, this one exists": Row(
        "forbidden", f"Push failed: {NO_RIGHT} (HTTP 403 Forbidden)", DENIED, MAY_WRITE, with_repo(), token=ONE_REPO
    ),
    "the Hub says it is somebody else's": Row(
        "exists",
        "Repository already exists",
        CONFLICT,
        "--create_pr",
        with_repo(status=403, message="pass `create_pr=1` as a query parameter"),
    ),
    "any other refusal": Row(
        "forbidden",
        f"Push failed: {NO_RIGHT} (HTTP 403 Forbidden)",
        DENIED,
        "account access",
        failing("GET", "whoami", status=403),
    ),
    "somebody else's repository": Row(
        "exists",
        "Repository already exists",
        CONFLICT,
        "add a version number",
        with_repo(),
        (*CHECK, "--username", "alice"),
        STRANGER,
    ),
    "somebody's work": Row("exists", "Repository already exists", CONFLICT, "--overwrite", with_repo({"a.py": b"1"})),
    "public, not private": Row(
        "visibility",
        "Push failed: the repository is public",
        CONFLICT,
        "leave out --private",
        with_repo(),
        (*CHECK, "--private"),
    ),
    "invalid name": Row(
        "invalid_name",
        "Push failed: invalid repository name",
        ExitCode.USAGE,
        "choose another --repo_name",
        arguments=(*CHECK, "--repo_name", "a--b"),
    ),
    "owner in the name": Row(
        "invalid_name",
        "Push failed: invalid repository name",
        ExitCode.USAGE,
        "choose another --repo_name",
        arguments=(*CHECK, "--repo_name", "alice/m"),
    ),
    "not the Hub": Row(
        "not_found",
        "Push failed: not found (HTTP 404 Not Found)",
        ExitCode.NO_INPUT,
        "check",
        failing("GET", "whoami", status=404),
    ),
    "host not found": Row(
        "unreachable",
        UNREACHABLE,
        DOWN,
        "HTTPS_PROXY",
        environment={"HF_ENDPOINT": "http://nowhere.invalid"},
    ),
    "refused": Row("unreachable", UNREACHABLE, DOWN, "HF_ENDPOINT", environment={"HF_ENDPOINT": "{dead_url}"}),
    "dead proxy": Row(
        "unreachable",
        UNREACHABLE,
        DOWN,
        "proxy",
        environment={"HTTP_PROXY": "{dead_url}", "HF_ENDPOINT": "http://hub.example", "NO_PROXY": ""},
    ),
    "proxy wants a password": Row(
        "unreachable", UNREACHABLE, DOWN, "HTTPS_PROXY", failing("GET", "whoami", status=407)
    ),
    "offline": Row(
        "unreachable",
        UNREACHABLE,
        DOWN,
        "HF_HUB_OFFLINE",
        environment={"HF_HUB_OFFLINE": "1"},
    ),
}
NEW = ("--no_verify",)
WITH_FILES_IN_HAND = {
    "413": Row("too_large", "File too large", LARGE, "Git LFS", failing("POST", "/commit/", status=413), NEW),
    "storage says 413": Row(
        "too_large",
        "File too large",
        LARGE,
        "make the model smaller",
        failing("PUT", "/lfs/", status=413),
        NEW,
        environment=LFS_ONLY,
    ),
    "storage says 403": Row(
        "forbidden",
        f"Push failed: {NO_RIGHT} (HTTP 403 Forbidden)",
        DENIED,
        "account",
        failing("PUT", "/lfs/", status=403),
        NEW,
        environment=LFS_ONLY,
    ),
    "quota": Row(
        "quota",
        "Push failed: storage limit reached (HTTP 403 Forbidden)",
        LARGE,
        "delete what is no longer needed",
        failing("POST", "/commit/", status=403, message="Private repository storage limit reached, please upgrade"),
        NEW,
    ),
    "rejected card": Row(
        "card",
        "Push failed: model card rejected",
        BAD_DATA,
        "correct it in the README.md",
        failing("POST", "validate-yaml", status=400, body=b'{"errors": [{"message": "no"}], "warnings": []}'),
        NEW,
    ),
    "rejected commit": Row(
        "rejected",
        "Push failed: HTTP 400 Bad Request",
        BAD_DATA,
        "read what it says",
        failing("POST", "/commit/", status=400, message="an LFS pointer pointed to a file that does not exist"),
        NEW,
    ),
    "no right to create": Row(
        "namespace",
        f"Push failed: {NAMESPACE} (HTTP 403 Forbidden)",
        DENIED,
        "--username",
        failing("POST", "/repos/create", status=403, message="You don't have the rights under the namespace"),
        NEW,
    ),
    "tag": Row(
        "tag_taken", "Push failed: the tag exists", CONFLICT, "choose another --tag", tagged, (*NEW, "--tag", "v1")
    ),
    "another yardstick": Row(
        "not_comparable",
        "Push failed: the models cannot be compared",
        CONFLICT,
        "leave out --only_if_better",
        published,
        (*NEW, "--only_if_better"),
    ),
    "a secret": Row(
        "secret", "Push failed: the folder holds a secret", BAD_DATA, "build", arguments=NEW, note=fake_token("planted")
    ),
    "a broken folder": Row(
        "proof",
        "Push failed: the folder does not work",
        BAD_DATA,
        "train again",
        arguments=(*NEW, "--output_dir", "{broken}"),
    ),
    "made, then trouble": Row(
        "unconfirmed",
        "Push failed: sent, but not confirmed",
        ExitCode.UNCONFIRMED,
        "look",
        hide_what_was_made,
        NEW,
    ),
    "dropped after the commit": Row(
        "unconfirmed",
        "Push failed: sent, but not confirmed",
        ExitCode.UNCONFIRMED,
        "push again",
        fall_silent_after_the_commit,
        NEW,
    ),
}
TRIED_AGAIN_IN_VAIN = {
    "rate limit": Row(
        "rate_limit",
        "Push failed: HTTP 429 Too Many Requests",
        BUSY,
        "wait a few minutes",
        failing("GET", "whoami", status=429, headers={"Retry-After": "7200"}),
    ),
    "gateway": Row(
        "server",
        "Push failed: HTTP 502 Bad Gateway",
        DOWN,
        "status.huggingface.co",
        failing("GET", "whoami", status=502, headers=HTML, body=b"<html>"),
    ),
    "silence": Row(
        "timeout",
        "Push failed: Connection timeout",
        DOWN,
        "check the network, or try a proxy",
        failing("GET", "whoami", delay=math.inf),
        (*CHECK, "--timeout", "0.1"),
    ),
    "storage that is silent": Row(
        "timeout",
        "Push failed: Connection timeout",
        DOWN,
        "check the network",
        failing("PUT", "/lfs/", delay=math.inf),
        (*NEW, "--timeout", "0.5"),
        environment=LFS_ONLY,
    ),
    "connection lost": Row(
        "dropped", "Push failed: Connection lost", DOWN, "push again", failing("GET", "whoami", drop="before")
    ),
    "a card check that is down": Row(
        "server",
        "Push failed: the Hub has trouble of its own",
        DOWN,
        "push again",
        failing("POST", "validate-yaml", status=502, headers=HTML, body=b"<"),
        NEW,
    ),
    "another commit for ever": Row(
        "moved",
        "Push failed: somebody else is pushing (HTTP 409 Conflict)",
        BUSY,
        "push again",
        failing("POST", "/commit/", status=409, message="Another commit operation is in progress"),
        NEW,
    ),
    "another creation for ever": Row(
        "moved",
        "Push failed: somebody else is pushing (HTTP 409 Conflict)",
        BUSY,
        "push again",
        failing(
            "POST",
            "/repos/create",
            status=409,
            message="Cannot create repo: another conflicting operation is in progress",
        ),
        NEW,
    ),
    "commits dropped for ever": Row(
        "dropped", "Push failed: Connection lost", DOWN, "push again", failing("POST", "/commit/", drop="before"), NEW
    ),
}
