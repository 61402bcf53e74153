"""The Hub as a push sees it: who we are, what is there, may we write, one commit; and how long the network may take.

huggingface_hub waits for ever by default, and sleeps as long as a server tells it to. A client factory, its
documented hook, gives every request a time limit, shortens those sleeps and keeps the token from other hosts.
"""

from __future__ import annotations

import contextlib
import email.utils
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from charseq2seq.console import is_terminal, log
from charseq2seq.publishing.failures import PublishError, explain, hint_for, is_xet_failure

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

MAIN, PROPOSALS = "main", "refs/pr/"  # the number of a pull request follows
CARD, RECORD = "README.md", "training_args.json"  # the two files that a push reads before it writes
CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 300.0  # seconds, the period of the Hub's rate limits; a push that should wait longer fails
LONGEST_LAG = 20.0  # seconds until the Hub must show what was written
PAUSES = (0.5, 1.0, 2.0)  # seconds between tries, before jitter
LONG_SILENCE = 20.0  # seconds; after a timeout as long as this there is no other try

T = TypeVar("T")


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to."""

    name: str
    roles: Mapping[str, str]  # namespace -> the role there, or "not stated"
    token_role: str  # "write", "read", "fineGrained", or "not stated"
    scopes: frozenset[str]  # namespaces and repositories that a fine-grained token may write to


@dataclass(frozen=True)
class Remote:
    """A repository at one moment."""

    repo_id: str  # its name now: the Hub finds it by earlier names and other capitals too
    head: str  # commit id of the revision that a push goes to
    private: bool
    revision: str  # the branch, or the pull request
    has_branch: bool  # False where that revision is still to be made, from main
    tags: Mapping[str, str]  # name -> commit id
    files: Mapping[str, RepoFile]
    texts: Mapping[str, str]  # content of `CARD` and `RECORD`, if they exist


class Hub:
    """The Hub, seen with one token; a request waits `timeout` seconds for an answer.

    Callers use `api`, huggingface_hub's client, for single requests, each within `retrying`.
    """

    def __init__(self, token: str, timeout: float, repo_type: str = "model") -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        # The library's warnings show signed addresses; what else they say, the suite says itself.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        limit_client(timeout, token)
        if not is_terminal():
            disable_progress_bars()
        self.token, self._user, self.repo_type = token, "", repo_type
        self.api = HfApi(token=token)

    def whoami(self) -> Account:
        """Ask the Hub whose token this is."""
        answer = retrying(self.api.whoami)
        access = answer.get("auth", {}).get("accessToken", {})
        scoped = access.get("fineGrained", {}).get("scoped", [])
        writable = {one["entity"]["name"] for one in scoped if "repo.write" in one.get("permissions", [])}
        roles = {one["name"]: one.get("roleInOrg") or "not stated" for one in answer.get("orgs", [])}
        self._user = answer["name"]
        roles[self._user] = "admin"
        return Account(self._user, roles, access.get("role") or "not stated", frozenset(writable))

    def read(self, repo_id: str, revision: str = MAIN) -> Remote | None:
        """What is at the head of a branch; None if there is no such repository. A tag is refused."""
        from huggingface_hub.errors import HfHubHTTPError

        lost = "it accepted this token a moment ago, so something in between, a mirror say, takes it off"
        try:
            with hint_for("bad_token", lost, self.token):
                info = retrying(lambda: self.api.repo_info(repo_id, repo_type=self.repo_type))
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            other = self._other_capitals(repo_id)
            return self.read(other, revision) if other else None
        repo_id = info.id
        refs = retrying(lambda: self.api.list_repo_refs(repo_id, repo_type=self.repo_type))
        branches = {one.name: one.target_commit for one in refs.branches}
        tags = {one.name: one.target_commit for one in refs.tags}
        if revision in tags:
            raise PublishError("not_found", f"{revision} is a tag; a push goes to a branch")
        if revision.startswith(PROPOSALS):
            branches[revision] = str(retrying(lambda: self.api.model_info(repo_id, revision=revision)).sha)
        for one in branches:  # git stores a branch as a file: a/b cannot stand beside a
            if one.startswith(f"{revision}/") or revision.startswith(f"{one}/"):
                raise PublishError("bad_ref", f"--revision {revision}, where there is a branch {one}")
        head = branches.get(revision) or str(info.sha)
        files = self.files(repo_id, head)
        if self.repo_type == "space" and len(self.api.list_repo_commits(repo_id, repo_type="space")) == 1:
            files = {}  # the first commit of a Space is a page by the Hub
        texts = {name: self._text(repo_id, head, name) for name in (CARD, RECORD) if name in files}
        return Remote(repo_id, head, bool(info.private), revision, revision in branches, tags, files, texts)

    def _other_capitals(self, repo_id: str) -> str | None:
        """The name of a repository that differs in capitals only; the Hub makes no second one beside it."""
        from huggingface_hub.errors import HfHubHTTPError

        owner, _, name = repo_id.partition("/")
        with contextlib.suppress(HfHubHTTPError):  # a mirror may not know how to search
            names = self.api.list_models if self.repo_type == "model" else self.api.list_spaces
            found = (one.id for one in names(author=owner, search=name))
            return next((one for one in found if one != repo_id and one.lower() == repo_id.lower()), None)
        return None

    def find_proposal(self, main: Remote) -> tuple[Remote, str] | None:
        """An open pull request in which this user proposes another model of this suite: its content and address."""
        from huggingface_hub.errors import HfHubHTTPError

        if not self._user:  # a keyless job; the Hub does not say which proposals are its own
            return None
        options: dict[str, Any] = {"discussion_type": "pull_request", "discussion_status": "open"}
        try:
            proposals = list(self.api.get_repo_discussions(main.repo_id, author=self._user, **options))
        except HfHubHTTPError:  # discussions can be switched off
            return None
        for one in proposals:
            proposed = self.read(main.repo_id, f"{PROPOSALS}{one.num}")
            if proposed and proposed.texts.get(RECORD) not in (None, main.texts.get(RECORD)):
                return proposed, one.url
        return None

    def files(self, repo_id: str, commit: str) -> dict[str, RepoFile]:
        """Every file of a commit, by its path."""
        from huggingface_hub.hf_api import RepoFile

        # Without `retrying`: the library itself repeats listings, for some 20 seconds.
        listing = self.api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=self.repo_type)
        return {one.path: one for one in listing if isinstance(one, RepoFile)}

    def check_write(self, repo_id: str, revision: str, create_pr: bool) -> None:
        """Ask the Hub how it would store a file. It answers only those who may write, and nothing is written."""
        from huggingface_hub import CommitOperationAdd

        file = CommitOperationAdd(CARD, b"x")
        self.api.preupload_lfs_files(repo_id, [file], revision=revision, create_pr=create_pr, repo_type=self.repo_type)

    def check_card(self, card: str) -> None:
        """Ask the Hub whether the metadata of a README.md is valid; if not, that is the failure "card"."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        # Not `ModelCard.validate`, which rewrites the metadata before it sends them.
        address, body = f"{self.api.endpoint}/api/validate-yaml", {"repoType": self.repo_type, "content": card}
        retrying(lambda: hf_raise_for_status(get_session().post(address, json=body)))

    def commit(
        self, repo_id: str, additions: Sequence[CommitOperationAdd], deletions: Sequence[str], **options: Any
    ) -> CommitInfo:
        """Send files and make one commit of them, with the options of `HfApi.create_commit`.

        Large files go by Xet, or by plain LFS if Xet's servers cannot be reached.
        """
        from huggingface_hub import CommitOperationDelete, constants
        from huggingface_hub.utils._runtime import is_xet_available

        operations: list[Any] = [*additions, *map(CommitOperationDelete, deletions)]
        options["repo_type"] = self.repo_type
        with hint_for("forbidden", "it allowed this token to write a moment ago", self.token, transient=True):
            try:
                return self.api.create_commit(repo_id, operations, **options)
            except (OSError, RuntimeError) as error:
                if not is_xet_available() or not is_xet_failure(error):
                    raise
                log("the Hub's Xet storage cannot be reached; sending by LFS instead.")
                constants.HF_HUB_DISABLE_XET = True
                return self.api.create_commit(repo_id, operations, **options)

    def download(self, repo_id: str, commit: str, names: Sequence[str], folder: Path) -> None:
        """Download files of a commit into a folder, without any cache."""
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # its bars would be drawn over the lines that follow
        download = self.api.snapshot_download
        retrying(lambda: download(repo_id, revision=commit, allow_patterns=list(names), local_dir=folder))

    def _text(self, repo_id: str, commit: str, name: str) -> str:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        # One request instead of hf_hub_download's two, and nothing of a cache that may be stale.
        url = hf_hub_url(repo_id, name, repo_type=self.repo_type, revision=commit, endpoint=self.api.endpoint)

        def get() -> bytes:
            response = get_session().get(url, headers=build_hf_headers(token=self.token))
            hf_raise_for_status(response)
            return response.content

        try:
            return retrying(get).decode("utf-8")
        except UnicodeDecodeError as error:
            if name == CARD:
                raise PublishError("card", f"byte {error.start:,} is not UTF-8; save it as UTF-8") from error
            return ""  # some other program's file


def when_visible(work: Callable[[], T]) -> T:
    """Do what needs something just written, again and again: the Hub's reads may lag behind its writes."""
    begin = time.monotonic()
    while True:
        try:
            return work()
        except Exception as error:
            failure = explain(error)
            if failure is None or failure.kind != "not_found" or time.monotonic() - begin > LONGEST_LAG:
                raise
        log("the Hub does not show yet what was written; looking again.")
        time.sleep(PAUSES[-1])


def retrying(work: Callable[[], T], between: Callable[[], None] = lambda: None) -> T:
    """Call `work`; after a failure that may pass, call `between` and `work` again, up to three times."""
    for pause in PAUSES:
        begin = time.monotonic()
        try:
            return work()
        except Exception as error:
            failure = explain(error)
            took_long = time.monotonic() - begin > LONG_SILENCE
            if failure is None or not failure.transient or (failure.kind == "timeout" and took_long):
                raise
            asked = _seconds_asked(getattr(getattr(error, "response", None), "headers", {}))
        seconds = max(pause * random.uniform(0.75, 1.5), asked)
        log(f"{failure.what}; trying again in {seconds:.1f} s.")
        time.sleep(seconds)
        between()
    return work()


# --- what every request of the client goes through


def limit_client(timeout: float, token: str | None = None) -> None:
    """Give huggingface_hub time limits and a guard on the token, for the rest of this process."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import httpx
    from huggingface_hub.utils._http import default_client_factory

    connect = min(CONNECT_SECONDS, timeout)
    # Xet has a client of its own, which reads these. After two tries of it `commit` sends by LFS.
    for name, seconds in {"CONNECT_TIMEOUT": connect, "READ_TIMEOUT": timeout, "RETRY_MAX_DURATION": timeout}.items():
        os.environ.setdefault(f"HF_XET_CLIENT_{name}", f"{seconds * 1000:.0f}ms")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")
    hub = httpx.URL(constants.ENDPOINT)

    def guard_token(request: Any) -> None:
        """Take the token from a request that goes anywhere but to the Hub itself."""
        is_elsewhere = (request.url.scheme, request.url.netloc) != (hub.scheme, hub.netloc)
        if token and is_elsewhere and token in request.headers.get("Authorization", ""):
            del request.headers["Authorization"]

    def factory() -> Any:
        client = default_client_factory()
        client.timeout = httpx.Timeout(timeout, connect=connect)
        client.event_hooks = {
            "request": [*client.event_hooks["request"], guard_token],
            "response": [*client.event_hooks["response"], _check_answer],
        }
        return client

    set_client_factory(factory)  # a factory, because the library makes a new client after a lost connection


def _check_answer(response: Any) -> None:
    """Raise PublishError for what the library would misread: very long pauses, web pages, some conflicts."""
    status, asked = response.status_code, _seconds_asked(response.headers)
    response.headers.pop("RateLimit", None)
    if status in (429, 503) and asked > LONGEST_PAUSE:
        kind, when = "rate_limit" if status == 429 else "server", f"{asked / 60:.0f} minutes"
        failure = PublishError(kind, f"it asks to come back in {when}, which is too long to wait", status=status)
        failure.transient = False
        raise failure
    if asked:
        response.headers["Retry-After"] = f"{min(asked, LONGEST_PAUSE):.0f}"
    if response.is_success and response.headers.get("Content-Type", "").startswith("text/html"):
        page = f"{response.url.host} answered with a web page, as login pages of networks do"
        raise PublishError("not_the_hub", page, status=status)
    # Another push is creating it. The library would ask again at once, or look for an address that the answer lacks.
    if status == 409 and response.url.path.endswith("/api/repos/create") and b'"url"' not in response.read():
        raise PublishError("moved", "another repository is being made", status=status)


def _seconds_asked(headers: Any) -> float:
    """How long the Hub asks to wait: a number of seconds, a date, or its own `RateLimit: "api";r=0;t=N`."""
    own, usual = headers.get("RateLimit", ""), headers.get("Retry-After", "")
    if found := re.search(r"\bt=(\d+)", own) or re.fullmatch(r"(\d+)", usual):
        return float(found[1])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(usual).timestamp() - time.time())
    except ValueError:
        return 0.0
