"""A push, step by step: preflight (checks), folder, proof (a fresh process tries it), commit, verification.

`publish` does all of it. Before training, train_transformer.py calls `preflight` alone.
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
    options_of_space,
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
        space: address of the Space, if there is one.
    """

    state: str
    url: str
    repo_id: str
    commit: str | None = None
    changes: tuple[Change, ...] = ()
    space: str | None = None

    def facts(self) -> dict[str, Any]:
        """What `--json` prints."""
        files = {change.name: change.state for change in self.changes}
        where = {"url": self.url, "repo_id": self.repo_id, "space": self.space}
        return {"ok": True, "state": self.state, **where, "commit": self.commit, "files": files}

    def describe_changes(self) -> str:
        """A line for each file."""
        return "".join(f"{change.state:8} {change.size:>12,} bytes  {change.name}\n" for change in self.changes)


def publish(request: PushOptions) -> Outcome:
    """Publish a checkpoint in one commit or not at all, and verify it; with `check` or `dry_run`, only try.

    Raises:
        SuiteError: nothing was published, except that the kinds "unconfirmed" and "visibility" may follow a commit.
    """
    if request.with_runs:
        require_packages("--with_runs", "tensorboard", pip="tensorboard")
    try:
        found = preflight(request)
    except PublishError as error:
        if not request.dry_run or error.kind != "no_token":
            raise
        log("no token: the folder is built and tested, but what the Hub already has is not known.")
        repo_id = target(request, account="username")
        space = PreflightResult(Hub("", request.timeout, "space"), space_of(repo_id)) if request.with_space else None
        found = PreflightResult(Hub("", request.timeout), repo_id, space=space, has_page=request.with_space)
    if request.check:
        return Outcome("checked", found.url, found.repo_id, space=found.space.url if found.space else None)
    from charseq2seq.checkpoint import load_checkpoint

    with user_errors(found.hub.token), contextlib.ExitStack() as stack:
        path = request.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = load_checkpoint(request.model_path)
        record = build_folder(checkpoint, path, found.repo_id, has_page=found.has_page, with_runs=request.with_runs)
        log(f"folder: built from {request.model_path.name}{f' in {path}' if request.output_dir else ''}")
        model = Push(request, found, path, record)
        page = None
        if found.space is not None:
            page_path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            page_record = build_space(page_path, path, found.repo_id, record)
            page = Push(options_of_space(request, found), found.space, page_path, page_record)
        has_changes = model.has_changes or (page is not None and page.has_changes)
        if request.dry_run or (model.is_better and has_changes):
            log("proof: a fresh process loads the folder, runs its example and its notebook")
            prove_folder(path)
        if request.dry_run:
            changes = list(model.changes)
            if page is not None:
                changes += [replace(change, name=f"{page.found.repo_id}/{change.name}") for change in page.changes]
            return replace(model.outcome("planned"), changes=tuple(changes))
        if page is not None and model.is_better:
            page.send()  # first, because the model's card links to it
        return model.send()


def state_of(file: CommitOperationAdd, there: RepoFile | None) -> str:
    """How a file differs from the published one: "new", "same" or "changed"."""
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

    Attributes:
        files: name -> huggingface_hub's object for the file, which computes its hash once.
        remote: what is published. This and the next three change whenever the Hub is read again.
        proposal: address of our open pull request, or ""; if there is one, `remote` is its content.
        changes: every file, compared with what is published.
        is_better: whether `only_if_better` lets the push go on.
        may_have_arrived: whether our commit was sent, and was not refused.
    """

    def __init__(self, request: PushOptions, found: PreflightResult, folder: Path, record: Mapping[str, Any]) -> None:
        from huggingface_hub import CommitOperationAdd

        refuse_secrets(folder, record["files"], found.hub.token)
        self.request, self.found, self.record, self.may_have_arrived = request, found, record, False
        self.files = {name: CommitOperationAdd(name, folder / name) for name in record["files"]}
        self._card = (folder / CARD).read_text(encoding="utf-8")
        self._compare(found.remote)

    def _compare(self, remote: Remote | None, proposal: str = "") -> None:
        from huggingface_hub import CommitOperationAdd

        check_remote(remote, self.request)
        self.remote, self.proposal = remote, proposal
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
        # A published file is deleted only if an earlier push made it.
        gone = set(record["files"]) & set(published) - set(self.files) if record else set()
        changes += [Change(name, "removed", published[name].size) for name in sorted(gone)]
        self.changes = tuple(changes)
        self.has_changes = any(change.state != "same" for change in self.changes)
        if remote and self.request.tag in remote.tags and self.has_changes:
            raise PublishError("tag_taken", f"{self.request.tag} is commit {remote.head[:8]}")
        self.is_better = not self.has_changes or is_better(self.record, record, self.request.only_if_better)
        needs_proposal = self.request.create_pr and self.has_changes and not proposal
        if needs_proposal and remote and (earlier := self.found.hub.find_proposal(remote)):
            self._compare(*earlier)

    def _read(self) -> None:
        self._compare(self.found.hub.read(self.found.repo_id, self.request.revision))

    def send(self) -> Outcome:
        """Make one commit, verify and tag it. A failure after the commit may have arrived becomes "unconfirmed"."""
        try:
            with user_errors(self.found.hub.token):
                commit = self._commit()
                if self.may_have_arrived:
                    self._verify(commit)
                if self.is_better:
                    self._make_tag(commit)
        except SuiteError as error:
            if not self.may_have_arrived or error.facts["error"] in ("visibility", "unconfirmed"):
                raise
            why = f"{error.what}: {error.cause}" if isinstance(error, PublishError) else str(error)
            raise PublishError("unconfirmed", f"{self.proposal or self.found.url}: {why}") from error
        if self.may_have_arrived:
            return self.outcome("proposed" if self.request.create_pr else "pushed", commit)
        return self.outcome("up to date" if self.is_better else "not better", commit)

    def outcome(self, state: str, commit: str | None = None) -> Outcome:
        """The result of this push, given how it ended."""
        url, space = self.proposal or self.found.url, self.found.space
        return Outcome(state, url, self.found.repo_id, commit, self.changes, space.url if space else None)

    def _commit(self) -> str:
        """Make the commit and return its id, or that of the newest commit if there is nothing to send.

        After a transient failure the Hub is read before the next try. If only the answer was lost, nothing is left to
        send; if somebody else committed meanwhile, ours goes on top of theirs.
        """
        try:
            return retrying(self._try_to_commit, self._read)
        except Exception:
            if self.may_have_arrived:  # the last try; a look at the Hub decides
                self._read()
                self.may_have_arrived = not self.has_changes
            if not self.may_have_arrived:
                raise
            return self._try_to_commit()

    def _try_to_commit(self) -> str:
        hub, repo_id, branch = self.found.hub, self.found.repo_id, self.request.revision
        if self.remote is None:
            sdk = "static" if hub.repo_type == "space" else None
            options: dict[str, Any] = {"repo_type": hub.repo_type, "space_sdk": sdk, "private": self.request.private}
            retrying(lambda: hub.api.create_repo(repo_id, exist_ok=True, **options))
            when_visible(self._read_new_repository)
        remote = self.remote
        assert remote is not None, "it was made just now"
        if not remote.has_branch and self.is_better:  # it begins at the head of main
            retrying(lambda: hub.api.create_branch(repo_id, branch=branch, exist_ok=True))
        return self._send(remote) if self.has_changes and self.is_better else remote.head

    def _read_new_repository(self) -> None:
        self._read()
        if self.remote is None:
            raise PublishError("not_found", f"{self.found.repo_id} was made, but is not there")

    def _send(self, remote: Remote) -> str:
        loss, step = _loss(self.record), self.record["metrics"].get("step", "?")
        usual = f"{loss:.4f} nats per character, step {step} (charseq2seq {__version__})"
        title, _, description = ((self.request.commit_message or "").strip() or usual).partition("\n")
        self.may_have_arrived = True
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
            self.may_have_arrived = failure is not None and failure.kind in _LOST
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
    """Whether our model's loss is lower by `margin` nats per character, as the two records have it.

    True without a margin, or if nothing is published. Losses that cannot be compared are refused.
    """
    if margin is None or theirs is None:
        return True
    mine, published = ({"corpus sha256": one["corpus"].get("sha256"), **one["metrics"]} for one in (ours, theirs))
    names = ("corpus sha256", "protocol", "max_context", "characters")
    if different := [name for name in names if mine.get(name) is None or mine[name] != published.get(name)]:
        raise PublishError("not_comparable", f"different or not stated: {', '.join(different)}")
    if _loss(ours) < _loss(theirs) - margin:
        return True
    log(f"the published loss is {_loss(theirs):.4f}, this one {_loss(ours):.4f} nats per character")
    return False


def _loss(record: Mapping[str, Any]) -> float:
    loss = record["metrics"].get("nats_per_char")
    return float(loss) if isinstance(loss, (int, float)) else math.nan
