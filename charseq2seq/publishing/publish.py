"""A push, step by step: preflight (checks), folder, proof (a fresh process tries it), commit, verification.

`preflight` checks what it can before anything slow, and is called before training; `publish` does it all. Both
raise `PublishError`, a `SuiteError`, with the remedy in its message.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charseq2seq import __version__
from charseq2seq.console import log
from charseq2seq.errors import SuiteError, require_packages
from charseq2seq.options import PushOptions
from charseq2seq.publishing.card import space_of
from charseq2seq.publishing.failures import PublishError, explain
from charseq2seq.publishing.folder import build_folder
from charseq2seq.publishing.hub import CARD, Hub, Remote, retrying, when_visible
from charseq2seq.publishing.merge import merge_cards
from charseq2seq.publishing.preflight import (
    PreflightResult,
    check_remote,
    of_space,
    preflight,
    published_record,
    target,
    user_errors,
)
from charseq2seq.publishing.proof import prove_folder, run_alone
from charseq2seq.publishing.secrets import refuse_secrets
from charseq2seq.publishing.space import build_space

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

_LOST = ("dropped", "timeout", "server")  # failures after which a commit may have been made all the same


@dataclass(frozen=True)
class Change:
    """One file, compared with what is published; `size` in bytes."""

    name: str
    state: str  # "new", "changed", "same" or "removed"
    size: int


@dataclass(frozen=True)
class Outcome:
    """How a push ended, and where.

    Attributes:
        state: "pushed", "proposed", "up to date", "not better", "planned" or "checked".
        url: address of the model, or of the pull request that proposes it.
        commit: id of the new commit, or of the newest one if nothing was sent; None after `check` and `dry_run`.
        space: address of the Space, with `with_space`.
    """

    state: str
    url: str
    repo_id: str
    commit: str | None = None
    changes: tuple[Change, ...] = ()
    space: str | None = None

    def facts(self) -> dict[str, Any]:
        """The result for programs, printed as JSON."""
        files = {change.name: change.state for change in self.changes}
        where = {"url": self.url, "repo_id": self.repo_id, "space": self.space}
        return {"ok": True, "state": self.state, **where, "commit": self.commit, "files": files}

    def describe_changes(self) -> str:
        """The changes as a person reads them, a line a file."""
        return "".join(f"{change.state:8} {change.size:>12,} bytes  {change.name}\n" for change in self.changes)


def publish(request: PushOptions) -> Outcome:
    """Publish a checkpoint, whole and verified, in one commit or not at all; with `check` or `dry_run`, only try.

    Raises:
        PublishError, SuiteError: nothing was published. Two kinds of `PublishError` tell of a commit that was made:
            "unconfirmed" and "visibility".
    """
    if request.with_runs:
        require_packages("--with_runs", "tensorboard", pip="tensorboard")
    try:
        found = preflight(request)
    except PublishError as error:
        if not request.dry_run or error.kind != "no_token":
            raise
        log("no token: the folder is built and tested, but what the Hub already has is not known.")
        found = PreflightResult(Hub("", request.timeout), target(request, "username"), None)
        space = PreflightResult(Hub("", request.timeout, "space"), space_of(found.repo_id), None)
        found = replace(found, space=space, has_page=True) if request.with_space else found
    if request.check:
        return Outcome("checked", found.url, found.repo_id, space=found.space.url if found.space else None)
    from charseq2seq.checkpoint import load_checkpoint

    with user_errors(found.hub.token), contextlib.ExitStack() as stack:
        path = request.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = load_checkpoint(request.model_path)
        record = build_folder(checkpoint, path, found.repo_id, has_page=found.has_page, with_runs=request.with_runs)
        log(f"folder: built from {request.model_path.name}{f' in {path}' if request.output_dir else ''}")
        push = Push(request, found, path, record)
        pushes = [push]
        if found.space is not None:  # the first to go: the card must not link to what is not there
            path_of_space = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            files = build_space(path_of_space, path, found.repo_id, record)
            pushes.insert(0, Push(of_space(request, found), found.space, path_of_space, files))
        if request.dry_run or (push.is_better and any(one.has_changes for one in pushes)):
            log("proof: a fresh process loads the folder and runs its example")
            prove_folder(path)
        if request.dry_run:
            of_page = pushes[0].changes if found.space else ()
            named = [replace(change, name=f"{pushes[0].found.repo_id}/{change.name}") for change in of_page]
            return replace(push.outcome("planned"), changes=(*push.changes, *named))
        return [one.send() for one in pushes if push.is_better or one is push][-1]


def state_of(file: CommitOperationAdd, there: RepoFile | None) -> str:
    """What a file is beside the published one: "new", "same" or "changed"."""
    from huggingface_hub.utils.sha import git_hash

    if there is None:
        return "new"
    if there.lfs:
        is_same = file.upload_info.sha256.hex() == there.lfs.sha256
    else:
        with file.as_file() as content:
            is_same = git_hash(content.read()) == there.blob_id
    return "same" if is_same else "changed"


class Push:
    """One push: what it would change, the commit, and whether that arrived.

    Of the published files it removes only those that their record lists and the folder lacks.

    Attributes:
        remote: what is published; this and the others here are made anew whenever the Hub is read.
        proposal: address of our open pull request, which is then what is compared and updated, or "".
        files: name -> huggingface_hub's object for the file, which computes its hash once.
        changes: every file, compared with what is published.
        is_better: see the function.
    """

    def __init__(self, request: PushOptions, found: PreflightResult, folder: Path, record: Mapping[str, Any]) -> None:
        from huggingface_hub import CommitOperationAdd

        refuse_secrets(folder, record["files"], found.hub.token)
        self.request, self.found, self.record = request, found, record
        self.may_be_made = False  # our commit: it was sent, and not refused
        self.files = {name: CommitOperationAdd(name, folder / name) for name in record["files"]}
        self._card = (folder / CARD).read_text(encoding="utf-8")
        self._compare("", found.remote)

    def _compare(self, proposal: str, remote: Remote | None) -> None:
        from huggingface_hub import CommitOperationAdd

        check_remote(remote, self.request)
        self.proposal, self.remote = proposal, remote
        published = remote.files if remote else {}
        if remote is not None and CARD in remote.texts:
            card, lost = merge_cards(self._card, remote.texts[CARD])
            self.files[CARD] = CommitOperationAdd(CARD, card.encode("utf-8"))
            for what in lost:
                log(f"note: {CARD} on the Hub: {what}. Commit {remote.head[:8]} keeps what was there.")
        record = published_record(remote)
        changes = [
            Change(name, state_of(file, published.get(name)), file.upload_info.size)
            for name, file in sorted(self.files.items())
        ]
        gone = set(record["files"]) & set(published) - set(self.files) if record else set()
        changes += [Change(name, "removed", published[name].size) for name in sorted(gone)]
        self.changes = tuple(changes)
        self.has_changes = any(change.state != "same" for change in self.changes)
        if remote and self.request.tag in remote.tags and self.has_changes:
            raise PublishError("tag_taken", f"{self.request.tag} is commit {remote.head[:8]}")
        theirs = record if self.has_changes else None
        self.is_better = is_better(self.record, theirs, self.request.only_if_better)
        is_new = self.request.create_pr and self.has_changes and not proposal
        if is_new and remote and (earlier := self.found.hub.find_proposal(remote)):
            self._compare(*earlier)

    def _read(self) -> None:
        self._compare("", self.found.hub.read(self.found.repo_id, self.request.revision))

    def send(self) -> Outcome:
        """Make one commit on top of what is there, verify and tag it.

        Once our commit may be made, whatever goes wrong says so.
        """
        try:
            with user_errors(self.found.hub.token):
                commit = self._commit()
                if self.may_be_made:
                    self._verify(commit)
                if self.is_better:
                    self._make_tag(commit)
        except SuiteError as error:
            told = error if isinstance(error, PublishError) else None
            if not self.may_be_made or (told and told.kind in ("visibility", "unconfirmed")):
                raise
            why = f"{told.what}: {told.cause}" if told else str(error)
            raise PublishError("unconfirmed", f"{self.proposal or self.found.url}: {why}") from error
        if self.may_be_made:
            return self.outcome("proposed" if self.request.create_pr else "pushed", commit)
        return self.outcome("up to date" if self.is_better else "not better", commit)

    def outcome(self, state: str, commit: str | None = None) -> Outcome:
        """How this push ended."""
        url, found = self.proposal or self.found.url, self.found
        return Outcome(state, url, found.repo_id, commit, self.changes, found.space.url if found.space else None)

    def _commit(self) -> str:
        """Make the commit and return its id, or that of the newest one where there is nothing to send.

        After a transient failure it is tried again. Before that the Hub is read again: if only the answer was lost,
        the commit is found there; if somebody else committed meanwhile, ours goes on top of theirs.
        """
        try:
            return retrying(self._try_to_commit, self._read)
        except Exception:
            if not self.may_be_made:
                raise
            self._read()
            if self.has_changes:
                self.may_be_made = False
                raise
            return self._try_to_commit()

    def _try_to_commit(self) -> str:
        hub, repo_id, branch = self.found.hub, self.found.repo_id, self.request.revision
        if self.remote is None:
            sdk = "static" if hub.repo_type == "space" else None
            kind: dict[str, Any] = {"repo_type": hub.repo_type, "space_sdk": sdk}
            retrying(lambda: hub.api.create_repo(repo_id, private=self.request.private, exist_ok=True, **kind))
            when_visible(self._read_what_was_made)
        remote = self.remote
        assert remote is not None, "it was made just now"
        if not remote.has_branch and self.is_better:  # it begins at the head of main
            retrying(lambda: hub.api.create_branch(repo_id, branch=branch, exist_ok=True))
        return self._send(remote) if self.has_changes and self.is_better else remote.head

    def _read_what_was_made(self) -> None:
        self._read()
        if self.remote is None:
            raise PublishError("not_found", f"{self.found.repo_id} was made, but is not there")

    def _send(self, remote: Remote) -> str:
        """Make the commit, and return its id."""
        loss, step = _loss(self.record), self.record["metrics"].get("step", "?")
        usual = f"{loss:.4f} nats per character, step {step} (charseq2seq {__version__})"
        title, _, description = ((self.request.commit_message or "").strip() or usual).partition("\n")
        self.may_be_made = True
        try:
            made = self.found.hub.commit(
                self.found.repo_id,
                [self.files[change.name] for change in self.changes if change.state in ("new", "changed")],
                [change.name for change in self.changes if change.state == "removed"],
                commit_message=title,
                commit_description=description.strip(),
                parent_commit=remote.head,
                revision=remote.revision,
                create_pr=self.request.create_pr and not self.proposal,
            )
        except Exception as error:
            failure = explain(error)
            self.may_be_made = failure is not None and failure.kind in _LOST
            raise
        self.proposal = made.pr_url or self.proposal
        return made.oid

    def _verify(self, commit: str) -> None:
        """Compare every published file with what was sent, then run the example from a fresh download."""
        hub, repo_id = self.found.hub, self.found.repo_id
        published = when_visible(lambda: hub.files(repo_id, commit))
        wrong = [name for name, file in self.files.items() if state_of(file, published.get(name)) != "same"]
        if wrong:
            raise PublishError("unconfirmed", f"{', '.join(wrong)} on the Hub is not what was sent")
        private = retrying(lambda: hub.api.repo_info(repo_id, repo_type=hub.repo_type)).private
        was_private = self.found.remote is not None and self.found.remote.private
        if (self.request.private or was_private) and not private:
            raise PublishError("visibility", "it has become so while this push was made")
        log(f"verified: the {len(self.files)} files of commit {commit[:8]} are what was sent")
        log(f"verified: the repository is {'private' if private else 'public'}")
        if not self.request.no_verify and hub.repo_type == "model":
            with tempfile.TemporaryDirectory() as folder:
                when_visible(lambda: hub.download(repo_id, commit, list(self.files), Path(folder)))
                run_alone(Path(folder), "usage_example.py")
            log("verified: a fresh download generates text")

    def _make_tag(self, commit: str) -> None:
        tag, repo_id, api = self.request.tag, self.found.repo_id, self.found.hub.api
        if tag is not None and self.remote is not None and tag not in self.remote.tags:
            when_visible(lambda: retrying(lambda: api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)))
            log(f"tag: {tag} is commit {commit[:8]}")


def is_better(ours: Mapping[str, Any], theirs: Mapping[str, Any] | None, margin: float | None) -> bool:
    """Whether a model may be published under `only_if_better`: always without it, or where nothing is published.

    Args:
        ours, theirs: the records of the two models.
        margin: nats per character by which the loss has to be lower.

    Raises:
        PublishError: the two losses cannot be compared.
    """
    if margin is None or theirs is None:
        return True
    measured = [{"corpus sha256": record["corpus"].get("sha256"), **record["metrics"]} for record in (ours, theirs)]
    names = ("corpus sha256", "protocol", "max_context", "characters")
    if different := [name for name in names if len({None, *(one.get(name) for one in measured)}) != 2]:
        raise PublishError("not_comparable", f"different or not stated: {', '.join(different)}")
    if _loss(ours) < _loss(theirs) - margin:
        return True
    log(f"the published loss is {_loss(theirs):.4f}, this one {_loss(ours):.4f} nats per character")
    return False


def _loss(record: Mapping[str, Any]) -> float:
    loss = record["metrics"].get("nats_per_char")
    return float(loss) if isinstance(loss, (int, float)) else math.nan
