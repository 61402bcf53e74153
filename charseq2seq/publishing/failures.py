"""What can go wrong with a push: the table of failures, and which exception is which row.

A new failure is a row of `FAILURES` (headline, cause, remedy, exit code); a new HTTP status is an entry of `_STATUS`,
a new exception class one of `_CLASS`. What `explain` does not know is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from charseq2seq.errors import ExitCode, SuiteError

_TOKENS_PAGE = "huggingface.co/settings/tokens"
_FLAG = re.compile(r"(?<![\w-])--(\w+)")
_ALSO_OF_TRAINING = ("repo_name", "username", "token", "token_file", "private")  # there --hf_repo_name etc.
_OF_THE_NETWORK = re.compile(r"HF_ENDPOINT|\w+_PROXY|\w+_OFFLINE|SSL_CERT_\w+", re.IGNORECASE)  # variables


@dataclass(frozen=True)
class Failure:
    """A row of the table."""

    headline: str  # what went wrong, in the guide's words; `{status}` is e.g. "HTTP 401 Unauthorized"
    exit_code: ExitCode
    cause: str
    remedy: str
    transient: bool = False  # whether trying again may help


# fmt: off
FAILURES = {
    "no_token": Failure("no token", ExitCode.NO_PERMISSION,
        "no token was given and none is stored on this machine",
        f"make one with Write permission at {_TOKENS_PAGE} and set HF_TOKEN, run `hf auth login`, or use --token_file"),
    "environment": Failure("a variable of the environment cannot be used", ExitCode.UNAVAILABLE,
        "the Hub's client cannot work with it",
        "correct or unset it: HF_ENDPOINT is https://HOST, a proxy http://HOST:PORT or (`pip install socksio`) "
        "socks5://HOST:PORT, SSL_CERT_FILE a file of certificates"),
    "not_the_hub": Failure("this is not the Hub ({status})", ExitCode.UNAVAILABLE,
        "what answers is a mirror that is only read from, or something between here and the Hub",
        "check HF_ENDPOINT (unset it for huggingface.co) and the network: open the address in a browser, where a login "
        "page of the network or a proxy shows itself"),
    "keyless": Failure("keyless sign-in failed ({status})", ExitCode.NO_PERMISSION,
        "HF_OIDC_RESOURCE is set, but this job gets no token with which it could push",
        "set it to the OWNER/NAME of the push, make the job a trusted publisher in the settings of that repository, "
        "which must be there, give it `id-token: write`, or unset HF_OIDC_RESOURCE to use a token"),
    "bad_token": Failure("{status}", ExitCode.NO_PERMISSION,
        "the Hub does not accept the token: it is mistyped, revoked or expired",
        f'check that the token is right and has "Write" permission ({_TOKENS_PAGE})'),
    "forbidden": Failure("no right to write here ({status})", ExitCode.NO_PERMISSION,
        "the Hub does not let this token write",
        f'check that the token has "Write" permission for this repository ({_TOKENS_PAGE}), and its account access'),
    "namespace": Failure("no right on this namespace ({status})", ExitCode.NO_PERMISSION,
        "the account that the token belongs to may not create models there",
        "correct --username, have an organisation's admin give you the write role, or propose with --create_pr"),
    "quota": Failure("storage limit reached ({status})", ExitCode.TOO_LARGE,
        "the account's storage is used up",
        "delete what is no longer needed (huggingface.co/settings/storage), publish without --private, or upgrade"),
    "exists": Failure("Repository already exists", ExitCode.CONFLICT,
        "the name is taken",
        "choose another --repo_name, add a version number (my-model-v2), or push over it with --overwrite; to others' "
        "repositories changes are proposed with --create_pr"),
    "visibility": Failure("the repository is public", ExitCode.CONFLICT,
        "--private was asked for, but the repository exists and everybody can see it",
        "make it private in its settings on the Hub first, choose another --repo_name, or leave out --private"),
    "tag_taken": Failure("the tag exists", ExitCode.CONFLICT,
        "it names another commit, and a published tag is not moved",
        "choose another --tag"),
    "moved": Failure("somebody else is pushing ({status})", ExitCode.LOCKED,
        "the repository kept changing while this push was made",
        "wait a moment and push again", transient=True),
    "invalid_name": Failure("invalid repository name", ExitCode.USAGE,
        "the Hub takes letters, digits, '-', '_' and '.', at most 96 of them, without '--' or '..' and no '.git' end",
        "choose another --repo_name, e.g. shakespeare-transformer-v2"),
    "bad_ref": Failure("impossible name of a branch or tag", ExitCode.USAGE,
        "git takes no spaces, none of ~ ^ : ? * [ \\ .. @{ //, no - . / first, no . / .lock last, and no "
        "path through another branch; refs/... and commits cannot be pushed to",
        "choose another --revision or --tag, e.g. v1.0; a pull request is updated by --create_pr"),
    "card": Failure("the published README.md cannot be kept", ExitCode.BAD_DATA,
        "a push keeps what people wrote in it, but not this",
        "correct it on the Hub and push again"),
    "not_found": Failure("not found ({status})", ExitCode.NO_INPUT,
        "there is no such repository or revision, or the token may not see it",
        "check --username, --repo_name and --revision"),
    "too_large": Failure("File too large", ExitCode.TOO_LARGE,
        "a file is over the Hub's limit",
        "store it with Git LFS (add its pattern to the repository's .gitattributes), or make the model smaller"),
    "rate_limit": Failure("{status}", ExitCode.LOCKED,
        "too many requests from this account or address",
        "wait and push again", transient=True),
    "server": Failure("{status}", ExitCode.UNAVAILABLE,
        "the Hub has trouble of its own",
        "push again later; status.huggingface.co says what is going on", transient=True),
    "storage": Failure("the storage refused a file ({status})", ExitCode.UNAVAILABLE,
        "the Hub took the push, but its storage did not take what the Hub had signed",
        "push again; set this machine's clock right, because signed addresses expire", transient=True),
    "rejected": Failure("rejected ({status})", ExitCode.BAD_DATA,
        "the Hub rejects what was sent",
        "read what it says and change that"),
    "timeout": Failure("Connection timeout", ExitCode.UNAVAILABLE,
        "the Hub did not answer in time",
        "check the network, or try a proxy (HTTPS_PROXY); a slow line may need a longer --timeout", transient=True),
    "unreachable": Failure("the Hub cannot be reached ({status})", ExitCode.UNAVAILABLE,
        "no connection can be made",
        "check the network, HF_ENDPOINT and HF_HUB_OFFLINE; behind a company's proxy set HTTPS_PROXY, and "
        "SSL_CERT_FILE to its certificate"),
    "dropped": Failure("Connection lost", ExitCode.UNAVAILABLE,
        "the connection broke off before the Hub had answered",
        "check the network and push again: what is already there is not sent twice", transient=True),
    "unconfirmed": Failure("sent, but not confirmed", ExitCode.UNCONFIRMED,
        "the commit was sent, but what the Hub has now could not be confirmed",
        "look at the repository and push again: nothing is sent twice"),
    "not_comparable": Failure("the models cannot be compared", ExitCode.CONFLICT,
        "their losses were measured on different texts or by different protocols",
        "leave out --only_if_better to publish anyway"),
    "secret": Failure("the folder holds a secret", ExitCode.BAD_DATA,
        "something that looks like a token or a path of this machine is in a file to be published",
        "remove it from the training arguments or the text and push again"),
    "proof": Failure("the folder does not work", ExitCode.BAD_DATA,
        "a fresh process could not use it as a stranger would",
        "train again or restore a good checkpoint; --output_dir keeps the folder to look into"),
}
# fmt: on


class PublishError(SuiteError):
    """A push that failed: a row of `FAILURES`, and what exactly happened, e.g. in the Hub's own sentence.

    The Hub's support finds a request by its `request_id`.
    """

    def __init__(
        self, kind: str, detail: str = "", *, status: int | None = None, request_id: str | None = None
    ) -> None:
        failure = FAILURES[kind]
        self.kind, self.detail, self.transient = kind, detail, failure.transient
        self.status, self.request_id = status, request_id
        line = f"HTTP {status} {http.client.responses.get(status, '')}".strip() if status else ""
        what = failure.headline.format(status=line).replace(" ()", "")
        self.what = what or failure.cause.partition(":")[0]  # if the headline is the status, and there is none
        self.cause = f"{failure.cause}: {detail}" if detail else failure.cause
        headline = self.what if kind in ("exists", "too_large") else f"Push failed: {self.what}"  # the guide's words
        lines = [f"❌ {headline}", f"   why: {self.cause}", f"   what to do: {failure.remedy}"]
        lines += [f"   request id: {request_id}"] if request_id else []
        super().__init__("\n".join(lines), failure.exit_code)
        self.facts = {"error": kind, "message": headline, "cause": self.cause, "remedy": failure.remedy}
        self.facts |= {"status": status, "request_id": request_id}


@contextlib.contextmanager
def hint_for(kind: str, hint: str, token: str, *, transient: bool = False) -> Iterator[None]:
    """Add a hint to a failure of one kind; with `transient`, trying again may help."""
    try:
        yield
    except Exception as error:
        failure = explain(error, token)
        if failure is None or failure.kind != kind:
            raise
        detail = "; ".join(filter(None, (failure.detail, hint)))
        failure = PublishError(kind, detail, status=failure.status, request_id=failure.request_id)
        failure.transient |= transient
        raise failure from error


@contextlib.contextmanager
def flags_of_training() -> Iterator[None]:
    """Write flags as train_transformer.py has them; one that it lacks gets `push_to_huggingface.py` before it."""

    def rename(flag: re.Match[str]) -> str:
        return f"--hf_{flag[1]}" if flag[1] in _ALSO_OF_TRAINING else f"push_to_huggingface.py {flag[0]}"

    try:
        yield
    except SuiteError as error:
        error.facts |= {name: _FLAG.sub(rename, text) for name, text in error.facts.items() if isinstance(text, str)}
        error.args = (_FLAG.sub(rename, str(error)),)
        raise


def explain(error: BaseException, token: str | None = None) -> PublishError | None:
    """The row of the table that an exception belongs to, filled in; None for a defect of ours.

    The client raises its own errors, those of its HTTP library and builtin ones (Xet), and may wrap them. So all causes
    are searched for an HTTP status, else for a known class or text. The Hub may repeat the token, so it is hidden.
    """
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, PublishError):
            return cause
    response = _first(causes, "response")
    if response is None:
        found = ((kind, str(cause)) for cause in causes if (kind := _kind_of_exception(cause)))
        kind, said = next(found, (None, ""))
    else:
        said = _first(causes, "server_message") or ""
        kind = _kind_of_response(response, said)
    if kind is None:
        return None
    said = textwrap.shorten(said.replace(token or "\0", "…"), 300, placeholder=" …")
    detail = "; ".join(filter(None, (said, _settings(kind))))
    status = response.status_code if response is not None else None
    return PublishError(kind, detail, status=status, request_id=_first(causes, "request_id"))


def is_xet_failure(error: BaseException) -> bool:
    """Whether Xet's own client failed, so that plain LFS may still work; its errors are builtin ones."""
    causes = list(_causes(error))
    builtin = (ConnectionError, RuntimeError, TimeoutError, OSError)
    return _first(causes, "response") is None and any(type(cause) in builtin for cause in causes)


def _first(causes: list[BaseException], name: str) -> Any:
    """An attribute of the first exception that has it."""
    return next((found for cause in causes if (found := getattr(cause, name, None)) is not None), None)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, its cause, the cause's cause and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


_STATUS = {401: "bad_token", 402: "quota", 403: "forbidden", 404: "not_found", 407: "unreachable", 408: "timeout"}
_STATUS |= {405: "not_the_hub", 511: "not_the_hub", 412: "moved", 413: "too_large", 429: "rate_limit", 409: "exists"}
# 400, 403 and 409 mean many things; the Hub's sentence tells them apart.
_SAID = {"storage limit": "quota", "quota": "quota", "namespace": "namespace", "create_pr": "namespace"}
_SAID |= {"larger than": "too_large", "too large": "too_large", "in progress": "moved"}


def _kind_of_response(response: Any, said: str) -> str:
    from huggingface_hub import constants

    status, address = response.status_code, response.request.url
    is_page = response.headers.get("Content-Type", "").startswith("text/html")  # where the Hub answers JSON
    has_no_whoami = status in (404, 501) and address.path.endswith("/api/whoami-v2")  # as mirrors answer
    if has_no_whoami or (is_page and status in (400, 403, 404)):
        return "not_the_hub"
    if status == 400 and address.path.endswith("/api/validate-yaml"):
        return "card"
    if not str(address).startswith(f"{constants.ENDPOINT}/") and status in (400, 401, 403, 404):
        return "storage"
    return _kind_of_status(status, said)


def _settings(kind: str) -> str:
    """The variables that may be the cause: HF_ENDPOINT, and for failures of the network the proxies and the like."""
    is_network = FAILURES[kind].exit_code == ExitCode.UNAVAILABLE
    used = (name for name in os.environ if name == "HF_ENDPOINT" or (is_network and _OF_THE_NETWORK.fullmatch(name)))
    return hide_password(", ".join(f"{name}={os.environ[name]}" for name in used))


def hide_password(text: str) -> str:
    """A text without the user and password in its addresses."""
    return re.sub(r"(?<=[=/])[^/@\s]*@", "…@", text)


def _kind_of_status(status: int, said: str) -> str:
    said_so = (kind for phrase, kind in _SAID.items() if phrase in said.lower() and status in (400, 403, 409))
    return next(said_so, _STATUS.get(status, "server" if status >= 500 else "rejected"))


# By the class's name: the HTTP library is httpx or httpx2, depending on the version of huggingface_hub.
_CLASS = {
    "LocalTokenNotFoundError": "no_token",
    "HFValidationError": "invalid_name",
    "JSONDecodeError": "server",  # a gateway's HTML page where the Hub answers JSON
    "ConnectionError": "unreachable",  # Xet's
    **dict.fromkeys(("ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout", "TimeoutError"), "timeout"),
    **dict.fromkeys(("RemoteProtocolError", "ReadError", "WriteError", "CloseError"), "dropped"),
    **dict.fromkeys(("ConnectError", "ProxyError", "OfflineModeIsEnabled", "ConnectionRefusedError"), "unreachable"),
}


def _kind_of_exception(error: BaseException) -> str | None:
    text = str(error)
    if found := re.search(r"HTTP status (?:client|server) error \((\d{3})", text):  # Xet's words
        return _kind_of_status(int(found[1]), text)
    if "LFS batch API returned errors" in text:
        return _kind_of_status(400, text)
    return _CLASS.get(type(error).__name__)
