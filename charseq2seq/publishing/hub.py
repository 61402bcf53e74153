"""The Hub as a push sees it: who we are, what is there, may we write, one commit, is it what we sent."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from charseq2seq.console import is_terminal, log
from charseq2seq.publishing.credentials import Credentials
from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.hub_errors import is_xet_failure
from charseq2seq.publishing.network import Deadline, configure_client, retrying

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete

MAIN = "main"
SMALL_FILES = ("README.md", "training_args.json")  # those that a push reads before it writes


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to.

    Attributes:
        name: of the user.
        roles: namespace -> the role there; None where the Hub does not say.
        token_role: "write", "read", "fineGrained", or None where the Hub does not say.
        scopes: for a fine-grained token, what it may write to: namespaces and repositories.
    """

    name: str
    roles: Mapping[str, str | None]
    token_role: str | None
    scopes: frozenset[str]


@dataclass(frozen=True)
class RemoteFile:
    """A published file: its size and the sha256 of its content, or git's sha1 for a small text."""

    size: int
    digest: str
    is_large: bool


@dataclass(frozen=True)
class Remote:
    """A repository at one moment.

    Attributes:
        head: commit id of the revision that a push goes to.
        has_branch: False where that revision is still to be made, from main.
        tags: name -> commit id.
        texts: content of the small files that a push reads, where they are there.
    """

    head: str
    private: bool
    has_branch: bool
    tags: Mapping[str, str]
    files: Mapping[str, RemoteFile]
    texts: Mapping[str, str]


class Hub:
    """One repository on the Hub, seen with one token.

    Args:
        repo_id: `owner/name`.
        credentials: the token.
        timeout: seconds that a request may wait for an answer.
        deadline: the end of all waiting.
    """

    def __init__(self, credentials: Credentials, timeout: float, deadline: Deadline) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars

        # Its warnings tell signed addresses, and nothing that we do not tell.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        configure_client(credentials.token, timeout, deadline)
        if not is_terminal():
            disable_progress_bars()
        self.deadline = deadline
        self._token = credentials.token
        self._api = HfApi(token=credentials.token)
        self.endpoint = self._api.endpoint

    def whoami(self) -> Account:
        """Ask the Hub whose token this is."""
        answer = retrying(self.deadline, self._api.whoami)
        access = answer.get("auth", {}).get("accessToken", {})
        scoped = access.get("fineGrained", {}).get("scoped", [])
        writable = {one["entity"]["name"] for one in scoped if "repo.write" in one.get("permissions", [])}
        roles = {answer["name"]: "admin", **{one["name"]: one.get("roleInOrg") for one in answer.get("orgs", [])}}
        return Account(answer["name"], roles, access.get("role"), frozenset(writable))

    def read(self, repo_id: str, revision: str = MAIN) -> Remote | None:
        """What is there, at the head of a branch; None where there is no such repository.

        Raises:
            PublishError: `revision` is a tag or commit, to which nothing can be pushed.
        """
        from huggingface_hub.errors import HfHubHTTPError

        try:
            info = retrying(self.deadline, lambda: self._api.model_info(repo_id))
        except HfHubHTTPError as error:
            if error.response.status_code == 404:
                return None
            raise
        refs = retrying(self.deadline, lambda: self._api.list_repo_refs(repo_id))
        branches = {one.name: one.target_commit for one in refs.branches}
        tags = {one.name: one.target_commit for one in refs.tags}
        if revision in tags:
            raise PublishError("not_found", f"{revision} is a tag; a push goes to a branch")
        head = branches.get(revision) or str(info.sha)
        files = self.files(repo_id, head)
        texts = {name: self._text(repo_id, head, name) for name in SMALL_FILES if name in files}
        return Remote(head, bool(info.private), revision in branches, tags, files, texts)

    def files(self, repo_id: str, commit: str) -> dict[str, RemoteFile]:
        """Every file of a commit: path -> size and digest."""
        from huggingface_hub.hf_api import RepoFile

        # No `retrying` around listings: the library itself tries those again, for some 20 seconds.
        return {
            one.path: RemoteFile(one.size, one.lfs.sha256 if one.lfs else one.blob_id, one.lfs is not None)
            for one in self._api.list_repo_tree(repo_id, recursive=True, revision=commit)
            if isinstance(one, RepoFile)
        }

    def is_private(self, repo_id: str) -> bool:
        """Whether only its owner sees it."""
        return bool(retrying(self.deadline, lambda: self._api.model_info(repo_id)).private)

    def check_write(self, repo_id: str, revision: str, create_pr: bool) -> None:
        """Ask the Hub how it would take a file: an answer only to those who may write, and nothing is written."""
        from huggingface_hub import CommitOperationAdd

        probe = [CommitOperationAdd("README.md", b"x")]
        self._api.preupload_lfs_files(repo_id, probe, revision=revision, create_pr=create_pr)

    def create(self, repo_id: str, private: bool) -> None:
        """Make the repository."""
        retrying(self.deadline, lambda: self._api.create_repo(repo_id, private=private, exist_ok=True))

    def create_branch(self, repo_id: str, branch: str) -> None:
        """Make a branch at the head of main."""
        retrying(self.deadline, lambda: self._api.create_branch(repo_id, branch=branch, exist_ok=True))

    def create_tag(self, repo_id: str, tag: str, commit: str) -> None:
        """Name a commit."""
        retrying(self.deadline, lambda: self._api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True))

    def commit(
        self,
        repo_id: str,
        additions: Mapping[str, Path | bytes],
        deletions: Sequence[str],
        *,
        message: str,
        parent: str,
        revision: str,
        create_pr: bool,
    ) -> CommitInfo:
        """Send files and make one commit of them, on top of `parent` or not at all.

        Large files go by Xet; where its servers cannot be reached or do not exist, by plain LFS.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
        from huggingface_hub.utils._runtime import is_xet_available

        def send() -> CommitInfo:
            operations: list[CommitOperationAdd | CommitOperationDelete] = [
                CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
                for name, content in additions.items()
            ]
            operations += [CommitOperationDelete(name) for name in deletions]
            return self._api.create_commit(
                repo_id,
                operations,
                commit_message=message,
                parent_commit=parent,
                revision=revision,
                create_pr=create_pr,
            )

        try:
            return send()
        except (OSError, RuntimeError) as error:
            if not is_xet_available() or not is_xet_failure(error):
                raise
            log("the Hub's Xet storage cannot be reached; sending by LFS instead.")
            constants.HF_HUB_DISABLE_XET = True
            return send()

    def download(self, repo_id: str, commit: str, names: Sequence[str], folder: Path) -> None:
        """Fetch files of a commit into a folder, past any cache."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()  # its bars would be drawn over the lines that follow
        retrying(
            self.deadline,
            lambda: snapshot_download(
                repo_id, revision=commit, allow_patterns=list(names), local_dir=folder, token=self._token
            ),
        )

    def _text(self, repo_id: str, commit: str, name: str) -> str:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        def fetched() -> str:
            # One request instead of hf_hub_download's two, and nothing of a cache that may be stale.
            response = get_session().get(
                hf_hub_url(repo_id, name, revision=quote(commit, safe=""), endpoint=self.endpoint),
                headers=build_hf_headers(token=self._token),
            )
            hf_raise_for_status(response)
            return response.content.decode("utf-8", errors="replace")

        return retrying(self.deadline, fetched)
