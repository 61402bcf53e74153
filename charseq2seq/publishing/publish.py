"""A push, step by step: preflight (checks), folder, proof (a fresh process tries it), commit, verification.

`preflight` checks what it can before anything slow, and is called before training; `publish` does it all. Both
raise `PublishError`, a `SuiteError`, with the remedy in its message.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from charseq2seq import __version__
from charseq2seq.console import log
from charseq2seq.errors import SuiteError
from charseq2seq.options import PushOptions
from charseq2seq.publishing.failures import PublishError, explain
from charseq2seq.publishing.folder import build_folder
from charseq2seq.publishing.hub import CARD, Hub, Remote, retrying, when_visible
from charseq2seq.publishing.merge import merge_cards
from charseq2seq.publishing.preflight import (
    PreflightResult,
    check_remote,
    preflight,
    published_record,
    target,
    user_errors,
)
from charseq2seq.publishing.proof import prove_folder, run_alone
from charseq2seq.publishing.secrets import refuse_secrets

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.hf_api import RepoFile

_LOST = ("dropped", "timeout", "server")  # failures after which a commit may have been made all the same


@dataclass(frozen=True)
class Change:
    """One file, compared with what is published; `size` in bytes."""

    name: str
    state: Literal["new", "changed", "same", "removed"]
    size: int


@dataclass(frozen=True)
class Outcome:
    """How a push ended, and where.

    Attributes:
        url: address of the model, or of the pull request that proposes it.
        commit: id of the new commit, or of the newest one if nothing was sent; None after `check` and `dry_run`.
    """

    state: Literal["pushed", "proposed", "up to date", "not better", "planned", "checked"]
    url: str
    repo_id: str
    commit: str | None = None
    changes: tuple[Change, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The result for programs, printed as JSON."""
        files = {change.name: change.state for change in self.changes}
        facts = {"ok": True, "state": self.state, "url": self.url, "repo_id": self.repo_id}
        return {**facts, "commit": self.commit, "files": files}

    def describe_changes(self) -> str:
        """The changes as a person reads them, a line a file."""
        return "".join(f"{change.state:8} {change.size:>12,} bytes  {change.name}\n" for change in self.changes)


def publish(request: PushOptions) -> Outcome:
    """Publish a checkpoint, whole and verified, in one commit or not at all; with `check` or `dry_run`, only try.

    Raises:
        PublishError, SuiteError: nothing was published. Two kinds of `PublishError` tell of a commit that was made:
            "unconfirmed" and "visibility".
    """
    try:
        found = preflight(request)
    except PublishError as error:
        if not request.dry_run or error.kind != "no_token":
            raise
        log("no token: the folder is built and tested, but what the Hub already has is not known.")
        found = PreflightResult(Hub("", request.timeout), "", target(request, "username"), None)
    if request.check:
        return Outcome("checked", found.url, found.repo_id)
    from charseq2seq.checkpoint import load_checkpoint

    with user_errors(found.token), contextlib.ExitStack() as stack:
        path = request.output_dir or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = load_checkpoint(request.model_path)
        record = build_folder(checkpoint, path, found.repo_id)
        log(f"folder: built from {request.model_path.name}{f' in {path}' if request.output_dir else ''}")
        refuse_secrets(path, record["files"], found.token)
        push = Push(request, found, path, record)
        if request.dry_run or (push.has_changes and push.is_better):
            log("proof: a fresh process loads the folder and runs its example")
            prove_folder(path)
        if request.dry_run:
            return Outcome("planned", found.url, found.repo_id, changes=push.changes)
        outcome = push.commit()
        if outcome.state in ("pushed", "proposed"):
            with _unconfirmed(outcome.url, found.token):
                push.verify(outcome.commit or "")
                push.make_tag(outcome.commit or "")
        elif outcome.state == "up to date":
            push.make_tag(outcome.commit or "")
    return outcome


@contextlib.contextmanager
def _unconfirmed(url: str, token: str) -> Iterator[None]:
    """Say of whatever goes wrong here that the commit is made."""
    try:
        with user_errors(token):
            yield
    except SuiteError as error:
        if isinstance(error, PublishError) and error.kind in ("visibility", "unconfirmed"):
            raise
        why = f"{error.what}: {error.cause}" if isinstance(error, PublishError) else str(error)
        raise PublishError("unconfirmed", f"{url}: {why}") from error


def _change(name: str, file: CommitOperationAdd, there: RepoFile | None) -> Change:
    same: Literal["same", "changed"] = "same" if is_same(file, there) else "changed"
    return Change(name, same if there else "new", file.upload_info.size)


def is_same(file: CommitOperationAdd, there: RepoFile | None) -> bool:
    """Whether a published file has this content."""
    info = file.upload_info
    if there is None or info.size != there.size:
        return False
    if there.lfs:
        return info.sha256.hex() == there.lfs.sha256
    with file.as_file() as content:
        return hashlib.sha1(b"blob %d\0" % info.size + content.read()).hexdigest() == there.blob_id  # git's blob id


class Push:
    """One push: what it would change, the commit, and whether that arrived.

    Of the published files it removes only those that their record lists and the folder lacks.

    Attributes:
        remote: what is published; this and the others here are made anew whenever the Hub is read.
        files: name -> huggingface_hub's object for the file, which computes its hash once.
        changes: every file, compared with what is published.
        is_better: see the function.
    """

    def __init__(self, request: PushOptions, found: PreflightResult, folder: Path, record: Mapping[str, Any]) -> None:
        from huggingface_hub import CommitOperationAdd

        self.request, self.found, self.record = request, found, record
        self.must_be_private = request.private or (found.remote is not None and found.remote.private)
        self.has_sent = self.may_have_arrived = False
        self.files = {name: CommitOperationAdd(name, folder / name) for name in record["files"]}
        self._card = (folder / CARD).read_text(encoding="utf-8")
        self._compare(found.remote)
        self._find_proposal()

    def _compare(self, remote: Remote | None) -> None:
        from huggingface_hub import CommitOperationAdd

        check_remote(remote, self.request)
        self.remote = remote
        published = remote.files if remote else {}
        if remote is not None and CARD in remote.texts:
            card, lost = merge_cards(self._card, remote.texts[CARD])
            self.files[CARD] = CommitOperationAdd(CARD, card.encode("utf-8"))
            for what in lost:
                log(f"note: {CARD} on the Hub: {what}. Commit {remote.head[:8]} keeps what was there.")
        record = published_record(remote)
        gone = set(record["files"]) & set(published) - set(self.files) if record else set()
        self.changes = (
            *(_change(name, file, published.get(name)) for name, file in sorted(self.files.items())),
            *(Change(name, "removed", published[name].size) for name in sorted(gone)),
        )
        self.has_changes = any(change.state != "same" for change in self.changes)
        if remote and self.request.tag in remote.tags and self.has_changes:
            raise PublishError("tag_taken", f"{self.request.tag} is commit {remote.head[:8]}")
        theirs = record if self.has_changes else None
        self.is_better = is_better(self.record, theirs, self.request.only_if_better)

    def _look_again(self) -> None:
        try:
            self._read()
        except Exception as error:
            if not self.may_have_arrived or explain(error) is None:
                raise
            raise PublishError("unconfirmed", "the answer was lost, and now the Hub is silent") from error

    def _read(self) -> None:
        self._compare(self.found.hub.read(self.found.repo_id, self.request.revision))
        self._find_proposal()

    def _find_proposal(self) -> None:
        """With `create_pr` compare with our open pull request, if there is one, and update that."""
        self.proposal = ""
        if self.request.create_pr and self.has_changes and self.remote is not None:
            found = self.found.hub.find_proposal(self.remote)
            if found is not None:
                self.proposal, remote = found
                self._compare(remote)

    def commit(self) -> Outcome:
        """Make one commit on top of what is there; retried after a transient failure.

        Before each retry the Hub is read again. If only the answer was lost, the commit is found there; if somebody
        else committed meanwhile, ours goes on top of theirs.
        """
        try:
            return retrying(self._try_to_commit, self._look_again)
        except Exception:
            if not self.may_have_arrived:
                raise
            self._look_again()
            if self.has_changes:
                raise
            return self._try_to_commit()

    def _try_to_commit(self) -> Outcome:
        request, repo_id, url, api = self.request, self.found.repo_id, self.found.url, self.found.hub.api
        if self.remote is None:
            retrying(lambda: api.create_repo(repo_id, private=request.private, exist_ok=True))
            when_visible(self._look_at_the_new_one)
        remote = self.remote
        assert remote is not None, "it was made just now"
        if not self.is_better:
            return Outcome("not better", url, repo_id, remote.head, self.changes)
        if not remote.has_branch:  # it begins at the head of main
            retrying(lambda: api.create_branch(repo_id, branch=request.revision, exist_ok=True))
        commit, proposal = self._send(remote) if self.has_changes else (remote.head, self.proposal)
        state: Literal["proposed", "pushed", "up to date"] = "proposed" if request.create_pr else "pushed"
        return Outcome(state if self.has_sent else "up to date", proposal or url, repo_id, commit, self.changes)

    def _look_at_the_new_one(self) -> None:
        self._look_again()
        if self.remote is None:
            raise PublishError("not_found", f"{self.found.repo_id} was made, but is not there")

    def _send(self, remote: Remote) -> tuple[str, str | None]:
        """Make the commit; return its id, and the address of its pull request if there is one."""
        loss, step = _loss(self.record), self.record["metrics"].get("step", "?")
        usual = f"{loss:.4f} nats per character, step {step} (charseq2seq {__version__})"
        title, _, description = ((self.request.commit_message or "").strip() or usual).partition("\n")
        self.has_sent = True
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
        return made.oid, made.pr_url or self.proposal

    def verify(self, commit: str) -> None:
        """Compare every published file with what was sent, then run the example from a fresh download.

        Raises:
            PublishError: something is not as it should be.
        """
        hub, repo_id, files = self.found.hub, self.found.repo_id, self.files
        published = when_visible(lambda: hub.files(repo_id, commit))
        wrong = [name for name, file in files.items() if not is_same(file, published.get(name))]
        if wrong:
            raise PublishError("unconfirmed", f"{', '.join(wrong)} on the Hub is not what was sent")
        private = retrying(lambda: hub.api.model_info(repo_id)).private
        if self.must_be_private and not private:
            raise PublishError("visibility", "it has become so while this push was made")
        log(f"verified: the {len(files)} files of commit {commit[:8]} are what was sent")
        log(f"verified: the repository is {'private' if private else 'public'}")
        if not self.request.no_verify:
            with tempfile.TemporaryDirectory() as folder:
                when_visible(lambda: hub.download(repo_id, commit, list(files), Path(folder)))
                run_alone(Path(folder), "usage_example.py")
            log("verified: a fresh download generates text")

    def make_tag(self, commit: str) -> None:
        """Name the commit, if asked to and not yet done."""
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
    measured = _how_measured(theirs)
    different = [name for name, value in _how_measured(ours).items() if value is None or value != measured[name]]
    if different:
        raise PublishError("not_comparable", f"different or not stated: {', '.join(different)}")
    if _loss(ours) < _loss(theirs) - margin:
        return True
    log(f"the published loss is {_loss(theirs):.4f}, this one {_loss(ours):.4f} nats per character")
    return False


def _loss(record: Mapping[str, Any]) -> float:
    loss = record["metrics"].get("nats_per_char")
    return float(loss) if isinstance(loss, (int, float)) else math.nan


def _how_measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal, and known, for two losses to be comparable."""
    corpus = record.get("corpus")
    sha256 = corpus.get("sha256") if isinstance(corpus, Mapping) else None
    measure = {name: record["metrics"].get(name) for name in ("protocol", "max_context", "characters")}
    return {"corpus sha256": sha256, **measure}
