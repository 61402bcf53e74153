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
from charseq2seq.publishing.failures import PublishError, explain, is_xet_failure, knowing

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

MAIN, PROPOSALS = "main", "refs/pr/"  # of a pull request the number follows
CARD, RECORD = "README.md", "training_args.json"  # the two files that a push reads before it writes
CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 300.0  # seconds: the Hub counts requests over so long; a longer pause ends the push
LONGEST_LAG = 20.0  # seconds for which the Hub may not show what was written
PAUSES = (0.5, 1.0, 2.0)  # seconds between tries, before jitter
LONG_SILENCE = 20.0  # seconds; a server that was silent for so long is not asked again

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

    repo_id: str  # its true name: the Hub answers to earlier names and to other capitals too
    head: str  # commit id of the revision that a push goes to
    private: bool
    revision: str  # the branch, or the pull request
    has_branch: bool  # False where that revision is still to be made, from main
    tags: Mapping[str, str]  # name -> commit id
    files: Mapping[str, RepoFile]
    texts: Mapping[str, str]  # content of `CARD` and `RECORD`, where they are there


class Hub:
    """The Hub, seen with one token; a request waits `timeout` seconds for an answer.

    Attributes:
        api: huggingface_hub's client. Callers use it for single requests, each within `retrying`.
        repo_type: of the repositories that are meant, "model" or "space".
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
        """What is there, at the head of a branch; None where there is no such repository.

        Raises:
            PublishError: `revision` is a tag or commit, to which nothing can be pushed.
        """
        from huggingface_hub.errors import HfHubHTTPError

        taken_off = "it accepted this token a moment ago, so something in between, a mirror say, takes it off"
        try:
            with knowing("bad_token", taken_off, self.token):
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
        for one in branches:  # git keeps them as files and folders
            if one.startswith(f"{revision}/") or revision.startswith(f"{one}/"):
                raise PublishError("bad_ref", f"--revision {revision}, where there is a branch {one}")
        head = branches.get(revision) or str(info.sha)
        files = self.files(repo_id, head)
        if self.repo_type == "space" and len(self.api.list_repo_commits(repo_id, repo_type="space")) == 1:
            files = {}  # the Hub puts a page of its own into a new one
        texts = {name: self._text(repo_id, head, name) for name in (CARD, RECORD) if name in files}
        return Remote(repo_id, head, bool(info.private), revision, revision in branches, tags, files, texts)

    def _other_capitals(self, repo_id: str) -> str | None:
        """The name of a repository that differs in capitals only: the Hub makes no second one beside it."""
        from huggingface_hub.errors import HfHubHTTPError

        owner, _, name = repo_id.partition("/")
        with contextlib.suppress(HfHubHTTPError):  # a mirror may not know how to search
            names = self.api.list_models if self.repo_type == "model" else self.api.list_spaces
            found = [one.id for one in names(author=owner, search=name)]
            return next((one for one in found if one != repo_id and one.lower() == repo_id.lower()), None)
        return None

    def find_proposal(self, main: Remote) -> tuple[str, Remote] | None:
        """An open pull request in which this user proposes another model of this suite: its address and content."""
        from huggingface_hub.errors import HfHubHTTPError

        mine: list[Any] = []
        if not self._user:  # of a keyless job the Hub does not say which proposals are its own
            return None
        asked: dict[str, Any] = {"discussion_type": "pull_request", "discussion_status": "open"}
        with contextlib.suppress(HfHubHTTPError):  # discussions can be switched off
            mine += self.api.get_repo_discussions(main.repo_id, author=self._user, **asked)
        for one in mine:
            proposed = self.read(main.repo_id, f"{PROPOSALS}{one.num}")
            if proposed and proposed.texts.get(RECORD) not in (None, main.texts.get(RECORD)):
                return one.url, proposed
        return None

    def files(self, repo_id: str, commit: str) -> dict[str, RepoFile]:
        """Every file of a commit, by its path."""
        from huggingface_hub.hf_api import RepoFile

        # Not `retrying`: the library itself repeats listings, for some 20 seconds.
        listing = self.api.list_repo_tree(repo_id, recursive=True, revision=commit, repo_type=self.repo_type)
        return {one.path: one for one in listing if isinstance(one, RepoFile)}

    def check_write(self, repo_id: str, revision: str, create_pr: bool) -> None:
        """Ask the Hub how it would take a file: it answers only those who may write, and nothing is written."""
        from huggingface_hub import CommitOperationAdd

        options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "repo_type": self.repo_type}
        self.api.preupload_lfs_files(repo_id, [CommitOperationAdd(CARD, b"x")], **options)

    def check_card(self, card: str) -> None:
        """Ask the Hub whether it takes the metadata of a README.md; what it does not take is the failure "card"."""
        from huggingface_hub.utils import get_session, hf_raise_for_status

        # Not `ModelCard.validate`, which sends the metadata as it would write them itself.
        address, body = f"{self.api.endpoint}/api/validate-yaml", {"repoType": self.repo_type, "content": card}
        retrying(lambda: hf_raise_for_status(get_session().post(address, json=body)))

    def commit(
        self, repo_id: str, additions: Sequence[CommitOperationAdd], deletions: Sequence[str], **options: Any
    ) -> CommitInfo:
        """Send files and make one commit of them, on top of its parent or not at all.

        Large files go by Xet; where its servers cannot be reached or do not exist, by plain LFS. The `options` are
        those of `HfApi.create_commit`.
        """
        from huggingface_hub import CommitOperationDelete, constants
        from huggingface_hub.utils._runtime import is_xet_available

        operations: list[Any] = [*additions, *map(CommitOperationDelete, deletions)]
        options["repo_type"] = self.repo_type
        with knowing("forbidden", "it allowed this token to write a moment ago", self.token, transient=True):
            try:
                return self.api.create_commit(repo_id, operations, **options)
            except (OSError, RuntimeError) as error:
                if not is_xet_available() or not is_xet_failure(error):
                    raise
                log("the Hub's Xet storage cannot be reached; sending by LFS instead.")
                constants.HF_HUB_DISABLE_XET = True
                return self.api.create_commit(repo_id, operations, **options)

    def download(self, repo_id: str, commit: str, names: Sequence[str], folder: Path) -> None:
        """Download files of a commit into a folder, past any cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # its bars would be drawn over the lines that follow
        options: dict[str, Any] = {"allow_patterns": list(names), "local_dir": folder, "token": self.token}
        retrying(lambda: snapshot_download(repo_id, revision=commit, **options))

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
            return ""  # a record, but none of ours


def when_visible(work: Callable[[], T]) -> T:
    """Do what needs something that was just written: the Hub's reads may lag behind its writes."""
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
            is_silent = failure is not None and failure.kind == "timeout" and time.monotonic() - begin > LONG_SILENCE
            if failure is None or not failure.transient or is_silent:
                raise
            asked = _seconds_asked(getattr(getattr(error, "response", None), "headers", {}))
        seconds = max(pause * random.uniform(0.75, 1.5), asked)
        log(f"{failure.what}; trying again in {seconds:.1f} s.")
        time.sleep(seconds)
        between()
    return work()


# --- what every request of the client goes through


def limit_client(timeout: float, token: str | None = None) -> None:
    """Give huggingface_hub, for the rest of this process, time limits and a guard on the token."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import httpx
    from huggingface_hub.utils._http import default_client_factory

    _limit_xet(timeout)
    hub = httpx.URL(constants.ENDPOINT)

    def guard_token(request: Any) -> None:
        """Take the token from a request that goes anywhere but to the Hub itself."""
        is_elsewhere = (request.url.scheme, request.url.netloc) != (hub.scheme, hub.netloc)
        if token and is_elsewhere and token in request.headers.get("Authorization", ""):
            del request.headers["Authorization"]

    def factory() -> Any:
        client = default_client_factory()
        client.timeout = httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout))
        client.event_hooks = {
            "request": [*client.event_hooks["request"], guard_token],
            "response": [*client.event_hooks["response"], _check_answer],
        }
        return client

    set_client_factory(factory)  # a factory, because the library makes a new client after a lost connection


def _limit_xet(timeout: float) -> None:
    """Xet's own client reads its limits from the environment; it tries twice, then the LFS path is taken."""
    limits = {"CONNECT_TIMEOUT": min(CONNECT_SECONDS, timeout), "READ_TIMEOUT": timeout, "RETRY_MAX_DURATION": timeout}
    for name, seconds in limits.items():
        os.environ.setdefault(f"HF_XET_CLIENT_{name}", f"{seconds * 1000:.0f}ms")
    os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")


def _check_answer(response: Any) -> None:
    """Catch what the library would obey, repeat or read without end: long pauses, some conflicts, web pages.

    Raises:
        PublishError: the answer, explained.
    """
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
    # Two pushes create it at once: the library would ask again without a pause, or for an address that is not there.
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
