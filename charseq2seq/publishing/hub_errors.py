"""Which exception belongs to which row of the table of failures.

The client raises its own errors, those of its HTTP library, builtin ones (Xet), and some of them only as the cause of
another: the classifier walks all causes and looks for an HTTP status first, then at class names, then at texts. What
it does not know is a defect of ours and is not dressed up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from charseq2seq.publishing.failures import PublishError

_REQUEST_IDS = ("X-Request-Id", "X-Amzn-Trace-Id", "X-Amz-Cf-Id")


def explain(error: BaseException, token: str | None = None) -> PublishError | None:
    """The row of the table that an exception belongs to, filled in; None for a defect of ours.

    Args:
        error: what was raised.
        token: the token in use, which is blotted out wherever the Hub may have repeated it.
    """
    chain = list(_causes(error))
    for one in chain:
        if isinstance(one, PublishError):
            return one
    response = _response(chain)
    if any("Invalid metadata in README.md" in str(one) for one in chain):  # the library's words for a rejected card
        return PublishError("card", _clean(chain[0], token))
    if response is not None:
        said = next((text for one in chain if (text := getattr(one, "server_message", None))), "")
        kind = kind_of_status(response.status_code, said)
        request_id = next((response.headers[name] for name in _REQUEST_IDS if name in response.headers), None)
        return PublishError(kind, _clean(said, token), status=response.status_code, request_id=request_id)
    for one in chain:
        kind_found = _kind_of_class(one)
        if kind_found is not None:
            return PublishError(kind_found, _clean(str(one), token))
    return None


def is_xet_failure(error: BaseException) -> bool:
    """Whether Xet's own client failed, which has no HTTP response to show; plain LFS may still work."""
    chain = list(_causes(error))
    if _response(chain) is not None:
        return False
    return any(type(one) in (ConnectionError, RuntimeError, TimeoutError, OSError) for one in chain)


def _response(chain: list[BaseException]) -> Any:
    """The HTTP response that an exception or one of its causes carries."""
    return next((found for one in chain if (found := getattr(one, "response", None)) is not None), None)


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


# 403 and 400 mean many things; what the Hub says besides tells them apart.
_SAID = (
    ("write token", "read_only_token"),
    ("storage limit", "quota"),
    ("quota", "quota"),
    ("namespace", "namespace"),
    ("create_pr", "foreign"),
    ("required permissions", "scope"),
    ("larger than", "too_large"),
    ("too large", "too_large"),
)
_STATUS = {401: "bad_token", 402: "quota", 403: "forbidden", 404: "not_found", 407: "tls", 408: "timeout"}
_STATUS |= {412: "moved", 413: "too_large", 429: "rate_limit"}


def kind_of_status(status: int, said: str) -> str:
    """The row for an HTTP status and the sentence that came with it."""
    said = said.lower()
    if status in (400, 403):
        for phrase, kind in _SAID:
            if phrase in said:
                return kind
    if status == 409:
        return "moved" if "progress" in said else "exists"
    return _STATUS.get(status, "server" if status >= 500 else "rejected")


# By the class's name: the HTTP library is httpx or httpx2, depending on the version of huggingface_hub.
_CLASS = {
    "LocalTokenNotFoundError": "no_token",
    "OfflineModeIsEnabled": "offline",
    "HFValidationError": "invalid_name",
    "ProxyError": "tls",
    "JSONDecodeError": "server",  # a gateway's HTML page where the Hub answers JSON
    **dict.fromkeys(("ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout", "TimeoutError"), "timeout"),
    **dict.fromkeys(("RemoteProtocolError", "ReadError", "WriteError", "CloseError"), "dropped"),
}


def _kind_of_class(error: BaseException) -> str | None:
    name, text = type(error).__name__, str(error)
    kind = _CLASS.get(name)
    if name == "ConnectError":
        kind = _kind_of_connect_error(text)
    elif found := re.search(r"HTTP status (?:client|server) error \((\d{3})", text):  # Xet's words
        kind = kind_of_status(int(found[1]), text)
    elif "LFS batch API returned errors" in text:
        kind = kind_of_status(400, text)
    return kind or ("refused" if type(error) in (ConnectionError, ConnectionRefusedError) else None)


def _kind_of_connect_error(text: str) -> str:
    if re.search(r"certificate|ssl|tls", text, re.IGNORECASE):
        return "tls"
    if re.search(r"Errno -\d|Errno 8|Errno 11001|getaddrinfo|name or service|nodename", text, re.IGNORECASE):
        return "dns"
    return "refused"


def _clean(said: Any, token: str | None) -> str:
    """One line, not too long, without the token."""
    text = " ".join(str(said).split())
    text = text.replace(token, "…") if token else text
    return text if len(text) <= 300 else text[:299] + "…"
