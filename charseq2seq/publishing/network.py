"""How long the network may take: time limits, retries, and where the token may go.

huggingface_hub waits for ever by default, and sleeps as long as a server tells it to. A client factory of our own
(its documented hook) gives every request a time limit that ends with the deadline of the whole push.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from charseq2seq.console import log
from charseq2seq.publishing.failures import FAILURES, PublishError
from charseq2seq.publishing.hub_errors import explain

CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 60.0  # seconds; a server's Retry-After is obeyed up to this
PAUSES = (0.5, 1.0, 2.0)  # seconds between tries, before jitter
LONG_SILENCE = 20.0  # seconds; a server that was silent for so long is not asked again

T = TypeVar("T")


class Deadline:
    """The end of a push's time.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds left, at least 0."""
        return max(0.0, self._end - time.monotonic())

    def remaining(self) -> float:
        """Seconds left.

        Raises:
            PublishError: none are.
        """
        if not self.left:
            raise PublishError("deadline", f"{self.seconds:g} seconds")
        return self.left


def configure_client(token: str, timeout: float, deadline: Deadline) -> None:
    """Give huggingface_hub, for the rest of this process, time limits and a guard on the token.

    Args:
        token: may go to the endpoint's own origin only.
        timeout: seconds without an answer after which a request fails.
        deadline: no request starts, or waits, beyond it.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    patience = min(timeout, deadline.seconds / 8)  # Xet waits some six times before it gives up on silent servers
    for name, value in {
        "CONNECT_TIMEOUT": f"{min(CONNECT_SECONDS, patience) * 1000:.0f}ms",
        "READ_TIMEOUT": f"{patience * 1000:.0f}ms",
        "RETRY_MAX_ATTEMPTS": "2",  # then the LFS path is tried
        "RETRY_BASE_DELAY": "500ms",
        "RETRY_MAX_DURATION": f"{patience * 1000:.0f}ms",
    }.items():
        os.environ.setdefault(f"HF_XET_CLIENT_{name}", value)  # read by Xet's own client
    origin = _origin(constants.ENDPOINT)

    def before(request: Any) -> None:
        wait = min(timeout, deadline.remaining())
        request.extensions["timeout"] = {
            "connect": min(CONNECT_SECONDS, wait),
            "read": wait,
            "write": wait,
            "pool": wait,
        }
        if token in request.headers.get("Authorization", "") and _origin(str(request.url)) != origin:
            del request.headers["Authorization"]

    def after(response: Any) -> None:
        # The library sleeps as long as these say, without a limit.
        asked = response.headers.get("Retry-After", "")
        longest = min(LONGEST_PAUSE, deadline.left)
        if asked.isdigit() and int(asked) > longest:
            response.headers["Retry-After"] = f"{longest:.0f}"
        response.headers.pop("RateLimit", None)
        creating = response.status_code == 409 and response.url.path.endswith("/api/repos/create")
        if creating and b"another conflicting operation" in response.read():
            raise PublishError(
                "moved", "another repository is being made", status=409
            )  # the library would ask for ever

    def factory() -> Any:
        client = default_client_factory()
        client.event_hooks = {
            "request": [*client.event_hooks["request"], before],
            "response": [*client.event_hooks["response"], after],
        }
        return client

    set_client_factory(factory)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def retrying(deadline: Deadline, work: Callable[[], T]) -> T:
    """Do what may be done more than once, again where it fails in passing."""
    for pause in PAUSES:
        begin = time.monotonic()
        try:
            return work()
        except Exception as error:
            failure = explain(error)
            if failure is None or not FAILURES[failure.kind].passing:
                raise
            if failure.kind == "timeout" and time.monotonic() - begin > LONG_SILENCE:
                raise
            seconds = max(pause * random.uniform(0.75, 1.5), _retry_after(error))
            if seconds >= deadline.remaining():
                raise
            log(f"{failure.headline}; trying again in {seconds:.1f} s.")
            time.sleep(seconds)
    return work()


def _retry_after(error: Exception) -> float:
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), LONGEST_PAUSE) if asked.isdigit() else 0.0
