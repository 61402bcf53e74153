"""Can this push work? Whatever can be checked before slow work is checked here, and nothing is changed."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError, lacks_temporary_folder, require_packages
from charseq2seq.options import PushOptions
from charseq2seq.publishing.card import sample_card, space_of
from charseq2seq.publishing.failures import PublishError, explain, hint_for
from charseq2seq.publishing.folder import parse_record
from charseq2seq.publishing.hub import CARD, MAIN, RECORD, Account, Hub, Remote, limit_client
from charseq2seq.publishing.merge import is_our_card, merge_cards
from charseq2seq.publishing.secrets import KEYLESS, find_token
from charseq2seq.publishing.space import space_card
from charseq2seq.publishing.surroundings import check_surroundings

# What `git check-ref-format` refuses, and what the Hub takes for a commit or a reference of its own.
_NO_REF = re.compile(
    r"[\0-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|^@?$|^[-/]|[/.]$|(^|/)\.|\.lock(/|$)|^HEAD$|^refs/|^[0-9a-f]{40}$"
)
# The website makes these in a new repository, so a push over them destroys nobody's work.
_NOBODYS_WORK = {".gitattributes", ".gitignore", CARD, "LICENSE", "LICENSE.md", "LICENSE.txt"}


@dataclass(frozen=True)
class PreflightResult:
    """What the preflight found out about a repository."""

    hub: Hub
    repo_id: str
    remote: Remote | None = None  # None if the repository does not exist, or nobody asked
    space: PreflightResult | None = None  # of the model's Space, with --with_space
    has_page: bool = False  # whether the model's card links to a Space

    @property
    def url(self) -> str:
        """Address of the repository."""
        prefix = "spaces/" if self.hub.repo_type == "space" else ""
        return f"{self.hub.api.endpoint}/{prefix}{self.repo_id}"


def preflight(request: PushOptions) -> PreflightResult:
    """Find out whether this push can work, and log what matters; raise SuiteError with the remedy if it cannot."""
    require_libraries()
    with user_errors(None):
        check_surroundings()
        check_name(f"owner/{request.repo_name}")
        check_ref("--revision", request.revision)
        check_ref("--tag", request.tag)
        limit_client(request.timeout)  # keyless sign-in is the first request
        token, source, others = find_token(request.token, request.token_file)
    with user_errors(token):
        hub = Hub(token, request.timeout)
        log(f"token: from {source}")
        unused = "".join(f"; {other} was not used" for other in others)
        with hint_for("bad_token", f"it is from {source}{unused}", token):
            account = trusted_publisher() if source == KEYLESS else hub.whoami()
        repo_id = target(request, account.name)
        found = _look(hub, account, repo_id, request, sample_card(repo_id))
        space_id, spaces = space_of(found.repo_id), Hub(token, request.timeout, "space")
        if request.with_space:
            space = _look(spaces, account, space_id, options_of_space(request, found), space_card(found.repo_id))
            return replace(found, space=space, has_page=True)
        # An earlier push may have made a Space; if it still exists, the card keeps its link.
        is_linked = found.remote is not None and f"spaces/{space_id}" in found.remote.texts.get(CARD, "")
        return replace(found, has_page=is_linked and spaces.read(space_id) is not None)


def options_of_space(request: PushOptions, model: PreflightResult) -> PushOptions:
    """The options for pushing the model's Space: private if the model is, with no tag and no comparison."""
    private = request.private or (model.remote is not None and model.remote.private)
    return replace(request, private=private, tag=None, only_if_better=None)


def _look(hub: Hub, account: Account, repo_id: str, request: PushOptions, card: str) -> PreflightResult:
    """Read a repository, and check that it may be written to and that the Hub would take the card."""
    kind = "repository" if hub.repo_type == "model" else hub.repo_type
    check_name(repo_id)
    if account.token_role == KEYLESS and repo_id not in account.scopes:
        raise PublishError("keyless", f"it is {' '.join(account.scopes)}, and the push goes to {repo_id}")
    found = PreflightResult(hub, repo_id, hub.read(repo_id, request.revision))
    log(f"target: {found.url}")
    remote = found.remote
    if remote is not None and remote.repo_id != repo_id:
        repo_id = remote.repo_id
        log(f"note: that is {repo_id} by now; the push goes there. Name it so from now on.")
    namespace = repo_id.partition("/")[0]
    if hub.repo_type == "model":
        log(f"account: {_describe(account, namespace)}")
    _check_rights(account, repo_id, remote, request)
    check_remote(remote, request)
    card = card.replace(found.repo_id, repo_id)
    hub.check_card(merge_cards(card, remote.texts[CARD])[0] if remote and CARD in remote.texts else card)
    if remote is None:
        log(f"{kind}: new, to be made {'private' if request.private else 'public'}")
    else:
        role = f"the role of {account.name} there is {account.roles.get(namespace, 'none')}"
        with hint_for("namespace", role, hub.token):
            hub.check_write(repo_id, request.revision if remote.has_branch else MAIN, request.create_pr)
        may = "a pull request may be made" if request.create_pr else "may be pushed to"
        log(f"{kind}: exists, {'private' if remote.private else 'public'}, {may}")
    return replace(found, repo_id=repo_id)


def require_libraries() -> None:
    """Refuse a missing library and an old huggingface_hub, without importing any."""
    libraries = ("torch", "numpy", "safetensors", "matplotlib", "yaml", "jinja2", "huggingface_hub")
    require_packages("publishing", *libraries)
    if (version := metadata.version("huggingface_hub")).startswith("0."):  # 1.0 brought the factory
        said = f"publishing needs huggingface_hub 1.0 or newer, and this one is {version}"
        raise SuiteError(f"{said}; run `pip install -r requirements_transformer.txt`.", ExitCode.UNAVAILABLE)


def trusted_publisher() -> Account:
    """The account of a keyless job. Its token opens one repository, and the Hub does not say whose it is."""
    resource = os.environ["HF_OIDC_RESOURCE"]
    return Account(resource.partition("/")[0], {}, KEYLESS, frozenset([resource]))


def _describe(account: Account, namespace: str) -> str:
    """The account's name, the rights of its token and its role in the namespace."""
    if account.token_role == KEYLESS:
        return f"none; this job is a trusted publisher and may write to {' '.join(account.scopes)} alone, for an hour"
    scopes = f" for {', '.join(sorted(account.scopes))}" if account.token_role == "fineGrained" else ""
    relation = "their own" if namespace == account.name else f"role {account.roles.get(namespace, 'none')}"
    return f"{account.name}, token role {account.token_role}{scopes}; namespace {namespace}: {relation}"


@contextlib.contextmanager
def user_errors(token: str | None) -> Iterator[None]:
    """Turn errors of the client and of the disk into `SuiteError`; other exceptions pass unchanged."""
    try:
        yield
    except SuiteError:
        raise
    except Exception as error:
        if failure := explain(error, token):
            raise failure from None
        if not isinstance(error, OSError) or lacks_temporary_folder(error):
            raise
        what = f"{error.filename or 'the disk'}: {error.strerror or error}"
        raise SuiteError(f"{what}; check the disk and its permissions.", ExitCode.IO_ERROR) from None


def target(request: PushOptions, account: str) -> str:
    """`owner/name` of the repository to push to."""
    owner = (request.username or os.environ.get("HF_USERNAME") or "").strip().removeprefix("@") or account
    return f"{account if owner.lower() == account.lower() else owner}/{request.repo_name}"


def check_name(repo_id: str) -> None:
    """Refuse a name that the Hub would refuse."""
    from huggingface_hub.utils import validate_repo_id

    if repo_id.count("/") != 1:
        raise PublishError("invalid_name", f"{repo_id!r}: the owner is named by --username, not in --repo_name")
    validate_repo_id(repo_id)


def check_ref(flag: str, name: str | None) -> None:
    """Refuse an impossible name of a branch or tag."""
    if name is not None and _NO_REF.search(name):
        raise PublishError("bad_ref", f"{flag} {name!r}")


def check_remote(remote: Remote | None, request: PushOptions) -> None:
    """Refuse to move a tag, to publish what shall be private, and to push over the work of others."""
    if remote is None:
        return
    if (tagged := remote.tags.get(request.tag or "", remote.head)) != remote.head:
        raise PublishError("tag_taken", f"{request.tag} is commit {tagged[:8]}")
    if request.private and not remote.private:
        raise PublishError("visibility")
    is_ours = published_record(remote) is not None or is_our_card(remote.texts.get(CARD, ""))
    foreign = sorted(set(remote.files) - _NOBODYS_WORK)
    if foreign and not is_ours and not request.overwrite:
        raise PublishError("exists", f"it holds what this suite did not make ({', '.join(foreign[:3])} …)")


def published_record(remote: Remote | None) -> dict[str, Any] | None:
    """The record of the published model, if this suite published it."""
    return parse_record(remote.texts.get(RECORD, "")) if remote else None


def _check_rights(account: Account, repo_id: str, remote: Remote | None, request: PushOptions) -> None:
    """Refuse what the token may not do, as far as the Hub tells beforehand."""
    namespace = repo_id.partition("/")[0]
    if account.token_role == "read":
        raise PublishError("forbidden", "it is a read-only token")
    if request.create_pr and remote is not None:
        return
    may_write = {namespace, repo_id} & account.scopes
    if namespace not in account.roles and not may_write:
        if remote is not None:
            raise PublishError("exists", f"and {repo_id} belongs to somebody else")
        raise PublishError("namespace", f"{account.name} is not {namespace}, nor a member of it")
    if account.roles.get(namespace) == "read":
        raise PublishError("namespace", f"{account.name} has the read role in {namespace}")
    if remote is None and account.token_role == "fineGrained" and not may_write:
        raise PublishError("forbidden", f"it is a fine-grained token that does not name {namespace}")
