"""Preflight -> folder -> proof -> commit -> verify.

`preflight` (which see) asks what can be known before anything slow, and is called before training; `publish` does
it all. Both raise `PublishError`, a `SuiteError`, with the remedy in its message.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from charseq2seq import __version__
from charseq2seq.console import log
from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.hub import Remote
from charseq2seq.publishing.hub_errors import explain
from charseq2seq.publishing.network import retrying
from charseq2seq.publishing.plan import Change, Contents, Local, changes_anything, is_same, published_record
from charseq2seq.publishing.preflight import Standing, check_remote, explained, preflight, target
from charseq2seq.publishing.proof import prove_folder, run_example
from charseq2seq.publishing.repository_folder import build_folder
from charseq2seq.publishing.request import Outcome, PublishRequest

__all__ = ["Outcome", "PublishRequest", "plan_push", "preflight", "publish"]


def publish(
    model_path: Path, request: PublishRequest, *, from_dir: Path | None = None, output_dir: Path | None = None
) -> Outcome:
    """Publish a checkpoint, whole and verified, in one commit or not at all.

    Args:
        model_path: the checkpoint.
        request: what to publish it as.
        from_dir: a repository folder that was built before, instead of the checkpoint.
        output_dir: where to build the folder and leave it; None: a temporary one, kept only if the push fails.

    Raises:
        PublishError, SuiteError: it was not published; only kind "unconfirmed" leaves that open.
    """
    standing = preflight(request)
    with explained(standing.credentials.token), _folder(model_path, standing.repo_id, from_dir, output_dir) as folder:
        local = Local(folder, standing.repo_id)
        local.check(standing.credentials.token)
        if changes_anything(local.plan(standing.remote)) and is_better(local, standing.remote, request):
            log("proof: a fresh process loads the folder and runs its example")
            prove_folder(folder)
        outcome, sent = commit_folder(standing, request, local)
        if outcome.state in ("pushed", "proposed"):
            _verify(standing, request, sent, outcome)
    return outcome


def plan_push(
    model_path: Path, request: PublishRequest, *, from_dir: Path | None = None, output_dir: Path | None = None
) -> Outcome:
    """Do everything that `publish` does before it sends anything; without a token, without asking the Hub.

    Raises:
        PublishError, SuiteError: as `publish`.
    """
    try:
        standing = preflight(request)
    except PublishError as error:
        if error.kind != "no_token":
            raise
        log("no token: the folder is built and proved, but what the Hub already has is not known.")
        standing = None
    repo_id = standing.repo_id if standing else target(request, "username")
    token = standing.credentials.token if standing else None
    with explained(token), _folder(model_path, repo_id, from_dir, output_dir) as folder:
        local = Local(folder, repo_id)
        local.check(token)
        prove_folder(folder)
        plan = local.plan(standing.remote if standing else None)
    return Outcome("planned", standing.url if standing else repo_id, repo_id, plan=tuple(plan))


@contextlib.contextmanager
def _folder(model_path: Path, repo_id: str, from_dir: Path | None, output_dir: Path | None) -> Iterator[Path]:
    """The complete repository folder; a temporary one stays only if the push fails."""
    if from_dir is not None:
        yield from_dir
        return
    from charseq2seq.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(model_path)
    folder = output_dir or Path(tempfile.mkdtemp(prefix=f"{repo_id.rpartition('/')[2]}-"))
    try:
        build_folder(checkpoint, folder, repo_id)
    except BaseException:
        if output_dir is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    log(f"folder: built from {model_path.name}" + (f" in {output_dir}" if output_dir else ""))
    try:
        yield folder
    except BaseException:
        log(f"the folder is kept; push it later with --from_dir {folder}")
        raise
    if output_dir is None:
        shutil.rmtree(folder, ignore_errors=True)


def commit_folder(standing: Standing, request: PublishRequest, local: Local) -> tuple[Outcome, Contents]:
    """Make one commit on top of what was there, tried again where something passing came between.

    Every further try looks anew. So an answer that got lost does no harm: what was committed is found to be there; nor
    does a commit of somebody else: ours is made on top of it.
    """
    tries = itertools.count()
    return retrying(standing.hub.deadline, lambda: _try_to_commit(standing, request, local, again=next(tries) > 0))


def _try_to_commit(standing: Standing, request: PublishRequest, local: Local, again: bool) -> tuple[Outcome, Contents]:
    hub, repo_id = standing.hub, standing.repo_id
    remote = _repository(standing, request, again)
    contents, plan = local.contents(remote), local.plan(remote)
    up_to_date = not changes_anything(plan)
    _check_tag(remote, request, up_to_date)
    if not up_to_date and not is_better(local, remote, request):
        theirs, ours = _loss(published_record(remote)), _loss(local.record)
        log(f"the published loss is {theirs:.4f}, this one {ours:.4f} nats per character")
        return Outcome("not better", standing.url, repo_id, remote.head, tuple(plan)), contents
    if not remote.has_branch:
        hub.create_branch(repo_id, request.revision)
    if up_to_date:
        commit, state, url = remote.head, "pushed" if again else "up to date", standing.url
    else:
        commit, proposal = _send(standing, request, local, remote, contents, plan)
        state, url = ("proposed", proposal or standing.url) if request.create_pr else ("pushed", standing.url)
    if request.tag is not None and request.tag not in remote.tags:
        hub.create_tag(repo_id, request.tag, commit)
    return Outcome(state, url, repo_id, commit, tuple(plan)), contents


def _send(
    standing: Standing, request: PublishRequest, local: Local, remote: Remote, contents: Contents, plan: list[Change]
) -> tuple[str, str | None]:
    """Make the commit; its id and, of a proposal, the address."""
    try:
        made = standing.hub.commit(
            standing.repo_id,
            {change.name: contents[change.name] for change in plan if change.state in ("new", "changed")},
            [change.name for change in plan if change.state == "removed"],
            message=request.commit_message or _message(local),
            parent=remote.head,
            revision=request.revision,
            create_pr=request.create_pr,
        )
    except Exception as error:
        failure = explain(error, standing.credentials.token)
        if failure is None or failure.kind not in ("dropped", "timeout", "server"):
            raise
        arrived = _find_lost_commit(standing, request, local, failure)
        if arrived is None:
            raise
        return arrived, None
    return made.oid, made.pr_url


def _find_lost_commit(standing: Standing, request: PublishRequest, local: Local, failure: PublishError) -> str | None:
    """The id of the commit whose answer was lost; None where it was not made.

    Raises:
        PublishError: "unconfirmed": it cannot be told.
    """
    try:
        remote = standing.hub.read(standing.repo_id, request.revision)
    except Exception as error:
        if explain(error) is None:
            raise
        raise PublishError("unconfirmed", f"{failure.headline} at the commit, and now the Hub is silent") from error
    if request.create_pr:  # main does not tell, and a second try could propose the same a second time
        raise PublishError("unconfirmed", f"{failure.headline}; see the pull requests there")
    return remote.head if remote and not changes_anything(local.plan(remote)) else None


def _repository(standing: Standing, request: PublishRequest, again: bool) -> Remote:
    """What was there at the start, or is there now; made first where nothing is. The preflight's rules still hold."""
    hub = standing.hub
    remote = hub.read(standing.repo_id, request.revision) if again else standing.remote
    if remote is None:
        hub.create(standing.repo_id, request.private)
        remote = hub.read(standing.repo_id, request.revision)
    if remote is None:
        raise PublishError("not_found", f"{standing.repo_id} was made, but is not there")
    check_remote(remote, request)
    return remote


def _check_tag(remote: Remote, request: PublishRequest, up_to_date: bool) -> None:
    tagged = remote.tags.get(request.tag or "")
    if tagged is not None and not (up_to_date and tagged == remote.head):
        raise PublishError("tag_taken", f"{request.tag} is commit {tagged[:8]}")


def _message(local: Local) -> str:
    step = local.record["metrics"].get("step", "?")
    return f"{_loss(local.record):.4f} nats per character, step {step} (charseq2seq {__version__})"


def is_better(local: Local, remote: Remote | None, request: PublishRequest) -> bool:
    """Whether the model may be published under `only_if_better`: always without it, or where nothing is published.

    Raises:
        PublishError: the two losses cannot be compared.
    """
    published = published_record(remote)
    if request.only_if_better is None or published is None:
        return True
    ours, theirs = _yardstick(local.record), _yardstick(published)
    different = ", ".join(name for name, value in ours.items() if value is None or value != theirs[name])
    if different:
        raise PublishError("not_comparable", f"different or not stated: {different}")
    return _loss(local.record) < _loss(published) - request.only_if_better


def _loss(record: dict[str, Any] | None) -> float:
    """The validation loss in nats per character, NaN where a record does not tell."""
    loss = record["metrics"].get("nats_per_char") if record else None
    return float(loss) if isinstance(loss, (int, float)) else math.nan


def _yardstick(record: dict[str, Any]) -> dict[str, Any]:
    """What must be equal, and known, for two losses to be comparable."""
    corpus, metrics = record.get("corpus"), record["metrics"]
    sha256 = corpus.get("sha256") if isinstance(corpus, dict) else None
    return {"corpus sha256": sha256} | {name: metrics.get(name) for name in ("protocol", "max_context", "characters")}


def _verify(standing: Standing, request: PublishRequest, sent: Contents, outcome: Outcome) -> None:
    """Compare every published file with what was sent, then run the example from a fresh download.

    Raises:
        PublishError: "unconfirmed": the commit is made, but something is not as it should be.
    """
    hub, repo_id, commit = standing.hub, standing.repo_id, outcome.commit or ""
    try:
        published = hub.files(repo_id, commit)
        wrong = [name for name, content in sent.items() if not is_same(content, published.get(name))]
        if wrong:
            raise PublishError("unconfirmed", f"{', '.join(wrong)} on the Hub is not what was sent")
        private = hub.is_private(repo_id)
        if not private and (request.private or (standing.remote is not None and standing.remote.private)):
            raise PublishError("visibility", "it has become so while this push was made")
        log(f"verified: the {len(sent)} files of commit {commit[:8]} are what was sent")
        log(f"verified: the repository is {'private' if private else 'public'}")
        if request.verify:
            with tempfile.TemporaryDirectory() as folder:
                hub.download(repo_id, commit, list(sent), Path(folder))
                run_example(Path(folder))
            log("verified: a fresh download writes text")
    except Exception as error:
        failure = explain(error, standing.credentials.token)
        if failure is None and not isinstance(error, OSError):
            raise
        if failure is not None and failure.kind in ("visibility", "unconfirmed"):
            raise
        why = f"{failure.headline}: {failure.cause}" if failure else str(error)
        raise PublishError("unconfirmed", f"{outcome.url}: {why}") from error
