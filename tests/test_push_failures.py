"""Everything that can go wrong with a push, provoked by a Hub on loopback and seen at the command line.

Each row must give its message, its remedy and its exit code, the same as JSON, no traceback, no token, and must leave
nothing half-published. `Publisher.push` checks for tracebacks and tokens.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from charseq2seq.errors import ExitCode
from charseq2seq.publishing.failures import FAILURES
from tests.hub.server import LFS_ONLY, ONE_REPO, READ, STRANGER, WRITE, HubServer, fake_token, hub_with_people
from tests.hub.state import Blob
from tests.push_client import REPO, Publisher, tiny_checkpoint

CODES = {
    ExitCode.USAGE: "invalid_name bad_ref",
    ExitCode.BAD_DATA: "card rejected secret proof",
    ExitCode.NO_INPUT: "not_found",
    ExitCode.UNAVAILABLE: "environment not_the_hub storage server timeout unreachable dropped",
    ExitCode.LOCKED: "moved rate_limit",
    ExitCode.UNCONFIRMED: "unconfirmed",
    ExitCode.NO_PERMISSION: "no_token keyless bad_token forbidden namespace",
    ExitCode.CONFLICT: "exists visibility tag_taken not_comparable",
    ExitCode.TOO_LARGE: "quota too_large",
}
CODE_OF = {kind: code for code, kinds in CODES.items() for kind in kinds.split()}
CHECK, NEW = ("--check",), ("--no_verify",)
HTML = {"Content-Type": "text/html"}
REJECTED = b'{"errors": [{"message": "no"}], "warnings": []}'


@dataclass(frozen=True)
class Row:
    """A case: how it comes about; `{broken}` in an argument is a folder that does not work."""

    kind: str
    arrange: Callable[[HubServer], object] = lambda hub: None  # what is done with the Hub before
    arguments: tuple[str, ...] = CHECK
    token: str | None = WRITE
    said: str = ""  # a part of the cause that the user is told
    headline: str = ""  # where more is looked at than the beginning of its kind's
    note: str = ""  # stands in the checkpoint
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


def alter_what_was_made(hub: HubServer) -> None:
    """Play a Hub that stores something else than what was sent."""

    def alter() -> None:
        repository = hub.repo(REPO)
        made = repository.resolve("main")
        files = {**made.files, "config.json": Blob.regular(b"{}")}
        repository.history[made.id] = dataclasses.replace(made, files=files)

    hub.fail("POST", "/commit/", call=lambda: hub.fail("GET", "/tree/", call=alter, times=1), times=1)


def fall_silent_after_the_commit(hub: HubServer) -> None:
    """Play a line that breaks for good while the commit's answer travels."""
    hub.fail("POST", "/commit/", drop="after", call=lambda: hub.fail("GET", "/api/models/", status=403), times=1)


def refused(path: str, message: str, status: int = 403) -> Callable[[HubServer], object]:
    """Let the Hub refuse a POST with one of its sentences."""
    return failing("POST", path, status=status, message=message)


BEFORE_ANYTHING_SLOW = {
    "bad token": Row("bad_token", token=fake_token("nobody"), headline="Push failed: HTTP 401 Unauthorized"),
    "no token at all": Row("bad_token", token="hf_sp\u00e9cial", headline="Push failed: the Hub does not accept"),
    "no token": Row("no_token", token=None),
    "read-only token": Row("forbidden", token=READ, said="it is a read-only token"),
    "somebody else's namespace": Row("namespace", arguments=(*CHECK, "--username", "mallory"), said="not mallory"),
    "an organisation to look at": Row("namespace", arguments=(*CHECK, "--username", "museum"), said="the read role"),
    "token for another repository": Row("forbidden", token=ONE_REPO, said="does not name alice"),
    "the Hub says it is somebody else's": Row("namespace", with_repo(status=403, message="pass `create_pr=1` as")),
    "any other refusal": Row("forbidden", failing("GET", "whoami", status=403, message="Forbidden")),
    "somebody else's repository": Row(
        "exists", with_repo(), (*CHECK, "--username", "alice"), STRANGER, said="belongs to somebody else"
    ),
    "somebody's work": Row("exists", with_repo({"a.py": b"1"}), said="did not make (a.py"),
    "public, not private": Row("visibility", with_repo(), (*CHECK, "--private")),
    "invalid name": Row("invalid_name", arguments=(*CHECK, "--repo_name", "a--b")),
    "owner in the name": Row("invalid_name", arguments=(*CHECK, "--repo_name", "alice/m")),
    "a tag with a space": Row("bad_ref", arguments=(*CHECK, "--tag", "v1 beta"), said="'v1 beta'"),
    "a card in Latin-1": Row("card", with_repo({"README.md": b"f\xfcr"}), said="not UTF-8"),
    "a new card that the Hub rejects": Row(
        "card", failing("POST", "validate", status=400, body=REJECTED), said="not this: no"
    ),
    "a mirror to read from": Row("not_the_hub", failing("GET", "whoami", status=404), said="HF_ENDPOINT=http"),
    "a variable that is wrong": Row("environment", environment={"HF_ENDPOINT": "hf-mirror.com"}, said="=hf-mirror"),
    "no token for this job": Row("keyless", token=None, environment={"HF_OIDC_RESOURCE": "alice/m"}, said="id token"),
    "no such revision": Row("not_found", with_repo(status=404, message="Invalid rev id: main")),
    "host not found": Row("unreachable", environment={"HF_ENDPOINT": "http://nowhere.invalid"}),
    "proxy wants a password": Row(
        "unreachable", failing("GET", "whoami", status=407), headline="Push failed: the Hub cannot be reached (HTTP 407"
    ),
    "offline": Row("unreachable", environment={"HF_HUB_OFFLINE": "1"}, said="HF_HUB_OFFLINE"),
}
WITH_FILES_IN_HAND = {
    "tag": Row("tag_taken", tagged, (*NEW, "--tag", "v1")),
    "a secret": Row("secret", arguments=NEW, note=f"run with {WRITE}", said="the token in use, in README.md"),
    "a broken folder": Row("proof", arguments=(*NEW, "--output_dir", "{broken}"), said="this is not PyTorch"),
    "made otherwise": Row("unconfirmed", alter_what_was_made, NEW, said="config.json on the Hub is not what was sent"),
    "dropped after the commit": Row("unconfirmed", fall_silent_after_the_commit, NEW),
}
# A few seconds each, in which the folder is proven; these differ from others in the Hub's answer only.
SLOW = {
    "413": Row("too_large", failing("POST", "/commit/", status=413), NEW),
    "storage says 413": Row("too_large", failing("PUT", "/lfs/", status=413), NEW, environment=LFS_ONLY),
    "quota": Row("quota", refused("/commit/", "Private repository storage limit reached, please upgrade"), NEW),
    "rejected commit": Row(
        "rejected",
        refused("/commit/", "an LFS pointer pointed to a file that does not exist", 400),
        NEW,
        said="LFS pointer",
        headline="Push failed: rejected (HTTP 400 Bad Request)",
    ),
    "no right to create": Row(
        "namespace",
        refused("/repos/create", "You don't have the rights under the namespace"),
        NEW,
        headline="Push failed: no right on this namespace (HTTP 403 Forbidden)",
    ),
    "another measure": Row("not_comparable", published, (*NEW, "--only_if_better")),
    "made, then trouble": Row("unconfirmed", hide_what_was_made, NEW),
}
TRIED_AGAIN_IN_VAIN = {
    "rate limit": Row("rate_limit", failing("GET", "whoami", status=429), headline="Push failed: HTTP 429 Too Many"),
    "gateway": Row(
        "server",
        failing("GET", "whoami", status=502, headers=HTML, body=b"<html>"),
        headline="Push failed: HTTP 502 Bad Gateway",
    ),
    "storage says 403": Row("storage", failing("PUT", "/lfs/", status=403), NEW, environment=LFS_ONLY),
    "no longer allowed": Row("forbidden", failing("POST", "/commit/", status=403), NEW, said="allowed this token"),
    "silence": Row("timeout", failing("GET", "whoami", delay=math.inf), (*CHECK, "--timeout", "0.1")),
    "storage that is silent": Row(
        "timeout", failing("PUT", "/lfs/", delay=math.inf), (*NEW, "--timeout", "0.5"), environment=LFS_ONLY
    ),
    "another commit for ever": Row("moved", refused("/commit/", "Another commit operation is in progress", 409), NEW),
    "another creation for ever": Row(
        "moved", refused("/repos/create", "Cannot create repo: another conflicting operation is in progress", 409), NEW
    ),
    "commits dropped for ever": Row("dropped", failing("POST", "/commit/", drop="before"), NEW),
}


def see(hub: HubServer, home: Path, row: Row, broken: Path | None = None) -> None:
    """Let the row happen and check what the user sees."""
    noted = dataclasses.replace(tiny_checkpoint(), environment={"note": row.note})
    user = Publisher(hub, home, noted if row.note else None)
    row.arrange(hub)
    heads = {name: hub.repo(name).head for name in hub.repos}
    arguments = [argument.format(broken=broken) for argument in row.arguments]
    done = user.push(*arguments, "--json", token=row.token, **row.environment)
    expected, code = FAILURES[row.kind], CODE_OF[row.kind]
    usual, remedy = expected.headline.partition("{")[0].rstrip(" ("), expected.remedy
    headline = row.headline or (usual if row.kind in ("exists", "too_large") else f"Push failed: {usual}")
    assert done.code == code, done.log
    assert f"❌ {headline}" in done.log and row.said in done.log and remedy in done.log, done.log
    facts = done.json
    assert (facts["ok"], facts["error"], facts["exit_code"]) == (False, row.kind, code)
    assert facts["message"].startswith(headline) and row.said in facts["cause"] and remedy in facts["remedy"]
    if code != ExitCode.UNCONFIRMED:
        for name in hub.repos:
            assert hub.repo(name).head == heads.get(name, hub.repo(name).commits[-1].id), "nothing is half-published"


@pytest.mark.parametrize("case", BEFORE_ANYTHING_SLOW)
def test_what_cannot_work_is_refused_before_anything_slow(case: str, hub: HubServer, tmp_path: Path) -> None:
    see(hub, tmp_path / "user", BEFORE_ANYTHING_SLOW[case])
    assert not hub.calls("POST", "/commit/|/repos/create")


@pytest.mark.parametrize("case", [*WITH_FILES_IN_HAND, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)])
def test_what_goes_wrong_later_is_told_and_publishes_nothing(
    case: str, hub: HubServer, tmp_path: Path, folder: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "torch.py").write_text("raise SystemExit('this is not PyTorch')")
    see(hub, tmp_path / "user", (WITH_FILES_IN_HAND | SLOW)[case], broken)
    assert case not in ("a secret", "a broken folder") or not hub.calls("POST", "/commit/|/repos/create")


@pytest.mark.slow
def test_what_is_tried_again_in_vain_is_told_in_the_end(tmp_path: Path) -> None:
    def play(number: int, row: Row) -> None:
        with hub_with_people() as hub:
            see(hub, tmp_path / str(number), row)

    with ThreadPoolExecutor(4) as pool:  # they mostly wait
        for played in [pool.submit(play, number, row) for number, row in enumerate(TRIED_AGAIN_IN_VAIN.values())]:
            played.result()


def test_every_row_of_the_table_is_provoked() -> None:
    provoked = BEFORE_ANYTHING_SLOW | WITH_FILES_IN_HAND | SLOW | TRIED_AGAIN_IN_VAIN
    assert {row.kind for row in provoked.values()} == set(FAILURES) == set(CODE_OF)


def test_an_unknown_certificate_is_told(tmp_path: Path) -> None:
    with hub_with_people(tls=True) as hub:
        see(hub, tmp_path / "user", Row("unreachable", environment={"SSL_CERT_FILE": ""}, said="certificate"))
        see(hub, tmp_path / "user", BEFORE_ANYTHING_SLOW["bad token"])


def test_over_https_a_repository_hidden_by_a_401_is_still_a_401(tmp_path: Path) -> None:
    with hub_with_people(tls=True) as hub:
        hub.fail("GET", "/api/models/", status=401, message="Invalid username or password.")
        done = Publisher(hub, tmp_path / "user").push("--check")
    assert done.code == ExitCode.NO_PERMISSION and "❌ Push failed: HTTP 401 Unauthorized" in done.log
