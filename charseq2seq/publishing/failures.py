"""The table of everything that can go wrong with a push: headline, cause, remedy, exit code.

Which exception belongs to which row: hub_errors.py.
"""

from __future__ import annotations

import http
import json
from dataclasses import dataclass

from charseq2seq.errors import ExitCode, SuiteError

TOKENS_PAGE = "huggingface.co/settings/tokens"


@dataclass(frozen=True)
class Failure:
    """A row of the table.

    Attributes:
        headline: what went wrong, in the guide's words; `{status}` is e.g. "HTTP 401 Unauthorized".
        cause: why, in one line.
        remedy: what to do.
        exit_code: what the program ends with.
        passing: whether trying again later may help.
    """

    headline: str
    cause: str
    remedy: str
    exit_code: ExitCode
    passing: bool = False


NO_PERMISSION, UNAVAILABLE = ExitCode.NO_PERMISSION, ExitCode.UNAVAILABLE
FAILURES = {
    "no_token": Failure(
        "no token",
        "no token was given and none is stored on this machine",
        f"make one with Write permission at {TOKENS_PAGE} and set HF_TOKEN, run `hf auth login`, or use --token_file",
        NO_PERMISSION,
    ),
    "bad_token": Failure(
        "{status}",
        "the Hub does not accept the token: it is mistyped, revoked or expired",
        f'check that the token is right and has "Write" permission ({TOKENS_PAGE})',
        NO_PERMISSION,
    ),
    "read_only_token": Failure(
        "read-only token ({status})",
        "the token may read but not write",
        f'make a token with "Write" permission at {TOKENS_PAGE}',
        NO_PERMISSION,
    ),
    "scope": Failure(
        "token without the right to write here ({status})",
        "the fine-grained token does not cover writing to this repository",
        f"give it write access to the repository or its owner's account at {TOKENS_PAGE}",
        NO_PERMISSION,
    ),
    "namespace": Failure(
        "no right on this namespace ({status})",
        "the account that the token belongs to may not create models there",
        "correct --username, or have an organisation's admin give you the write role",
        NO_PERMISSION,
    ),
    "foreign": Failure(
        "no right on this repository ({status})",
        "it belongs to somebody else",
        "choose another --repo_name under your own account, or propose the change with --create_pr",
        NO_PERMISSION,
    ),
    "forbidden": Failure(
        "{status}",
        "the Hub refuses this to the token's account",
        f'check that the token has "Write" permission ({TOKENS_PAGE}) and the account access to the repository',
        NO_PERMISSION,
    ),
    "quota": Failure(
        "storage limit reached ({status})",
        "the account's storage is used up",
        "delete what is no longer needed (huggingface.co/settings/storage), publish without --private, or upgrade",
        ExitCode.TOO_LARGE,
    ),
    "exists": Failure(
        "Repository already exists",
        "the name is taken",
        "choose another --repo_name or add a version number (my-model-v2)",
        ExitCode.CONFLICT,
    ),
    "visibility": Failure(
        "the repository is public",
        "--private was asked for, but the repository exists and everybody can see it",
        "make it private in its settings on the Hub first, choose another --repo_name, or leave out --private",
        ExitCode.CONFLICT,
    ),
    "tag_taken": Failure(
        "the tag exists",
        "it names another commit, and a published tag is not moved",
        "choose another --tag",
        ExitCode.CONFLICT,
    ),
    "moved": Failure(
        "somebody else is pushing ({status})",
        "the repository kept changing while this push was made",
        "wait a moment and push again",
        ExitCode.LOCKED,
        passing=True,
    ),
    "invalid_name": Failure(
        "invalid repository name",
        "the Hub takes letters, digits, '-', '_' and '.', at most 96 of them, without '--' or '..' and no '.git' end",
        "choose another --repo_name, e.g. shakespeare-transformer-v2",
        ExitCode.USAGE,
    ),
    "not_found": Failure(
        "not found ({status})",
        "there is no such repository or revision, or the token may not see it",
        "check --username, --repo_name and --revision",
        ExitCode.NO_INPUT,
    ),
    "too_large": Failure(
        "File too large",
        "a file is over the Hub's limit",
        "store it with Git LFS (add its pattern to the repository's .gitattributes), or make the model smaller",
        ExitCode.TOO_LARGE,
    ),
    "rate_limit": Failure(
        "{status}",
        "too many requests from this account or address",
        "wait a few minutes and push again",
        ExitCode.LOCKED,
        passing=True,
    ),
    "server": Failure(
        "{status}",
        "the Hub has trouble of its own",
        "push again later; status.huggingface.co says what is going on",
        UNAVAILABLE,
        passing=True,
    ),
    "rejected": Failure(
        "{status}", "the Hub rejects the request", "read what it says and change that", ExitCode.BAD_DATA
    ),
    "card": Failure(
        "model card rejected",
        "the metadata at the head of README.md is not valid",
        "correct it in the README.md on the Hub (or in the folder, with --from_dir) and push again",
        ExitCode.BAD_DATA,
    ),
    "timeout": Failure(
        "Connection timeout",
        "the Hub did not answer in time",
        "check the network, or try a proxy (HTTPS_PROXY); a slow line may need a longer --timeout",
        UNAVAILABLE,
        passing=True,
    ),
    "deadline": Failure(
        "Deadline passed",
        "the push took longer than --deadline allows",
        "push again, with a longer --deadline if the line is slow",
        UNAVAILABLE,
    ),
    "dns": Failure(
        "host not found",
        "the name of the Hub's host cannot be resolved",
        "check the network and its DNS, HF_ENDPOINT, or try a proxy (HTTPS_PROXY)",
        UNAVAILABLE,
    ),
    "refused": Failure(
        "Connection refused",
        "nobody answers at the Hub's address",
        "check the network, HF_ENDPOINT and proxy settings",
        UNAVAILABLE,
    ),
    "tls": Failure(
        "TLS or proxy trouble",
        "no trusted connection to the Hub can be made",
        "behind a company's proxy set HTTPS_PROXY, and SSL_CERT_FILE to its certificate",
        UNAVAILABLE,
    ),
    "dropped": Failure(
        "Connection lost",
        "the connection broke off before the Hub had answered",
        "check the network and push again: what is already there is not sent twice",
        UNAVAILABLE,
        passing=True,
    ),
    "offline": Failure(
        "offline mode",
        "HF_HUB_OFFLINE is set, so that nothing may use the network",
        "unset HF_HUB_OFFLINE and push again",
        UNAVAILABLE,
    ),
    "unconfirmed": Failure(
        "sent, but not confirmed",
        "the commit was sent, but what the Hub has now could not be confirmed",
        "look at the repository and push again: nothing is sent twice",
        ExitCode.UNCONFIRMED,
    ),
    "not_comparable": Failure(
        "the models cannot be compared",
        "their losses were measured on different texts or by different protocols",
        "leave out --only_if_better to publish anyway",
        ExitCode.CONFLICT,
    ),
    "secret": Failure(
        "the folder holds a secret",
        "something that looks like a token or a path of this machine is in a file to be published",
        "remove it from the training arguments or the text and build the folder again",
        ExitCode.BAD_DATA,
    ),
    "proof": Failure(
        "the folder does not work",
        "a fresh process could not use it as a stranger would",
        "train again or restore a good checkpoint; --output_dir keeps the folder to look into",
        ExitCode.BAD_DATA,
    ),
}


class PublishError(SuiteError):
    """A push that failed.

    Args:
        kind: a key of `FAILURES`.
        detail: what exactly, e.g. the Hub's own sentence.
        status: the HTTP status, where there is one.
        request_id: by which the Hub's support finds the request.
        remedy: instead of the table's.
    """

    def __init__(
        self,
        kind: str,
        detail: str = "",
        *,
        status: int | None = None,
        request_id: str | None = None,
        remedy: str | None = None,
    ) -> None:
        failure = FAILURES[kind]
        self.kind, self.status, self.request_id = kind, status, request_id
        headline = failure.headline.format(status=_status_line(status)).replace(" ()", "")
        self.headline = headline or failure.cause.partition(":")[0]  # not every trouble has a status
        self.cause = f"{failure.cause}: {detail}" if detail else failure.cause
        self.remedy = remedy or failure.remedy
        lines = [f"❌ {_opening(kind)}{self.headline}", f"   why: {self.cause}", f"   what to do: {self.remedy}"]
        if request_id:
            lines.append(f"   request id: {request_id}")
        super().__init__("\n".join(lines), failure.exit_code)


def failure_as_json(error: SuiteError) -> str:
    """What went wrong, on one line, for programs."""
    facts: dict[str, object] = {"ok": False, "error": "refused", "message": str(error)}
    if isinstance(error, PublishError):
        facts |= {"error": error.kind, "message": f"{_opening(error.kind)}{error.headline}", "cause": error.cause}
        facts |= {"remedy": error.remedy, "status": error.status, "request_id": error.request_id}
    return json.dumps(facts | {"exit_code": int(error.exit_code)})


def _opening(kind: str) -> str:
    return "" if kind in ("exists", "too_large") else "Push failed: "  # as the guide has it


def _status_line(status: int | None) -> str:
    if status is None:
        return ""
    try:
        return f"HTTP {status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP {status}"
