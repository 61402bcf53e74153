"""How long the network may take: time limits, retries, and where the token may go.

huggingface_hub waits for ever by default, and sleeps as long as a server tells it to. A client factory of our own
(its documented hook) gives every request a time limit that ends with the deadline of the whole push.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from charseq2seq.console import log
from charseq2seq.publishing.failures import FAILURES, PublishError
from charseq2seq.publishing.hub_errors import explain

CONNECT_SECONDS = 10.0
LONGEST_PAUSE = 60.0  # seconds; a server's Retry-After is obeyed up to this
PAUSES = (0.5, 1.0, 2.0)  # seconds between tries, before jitter

T = TypeVar("T")


class Deadline:
    """The end of a push's time.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left.

        Raises:
            PublishError: none are.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise PublishError("deadline", f"{self.seconds:g} seconds")
        return left


def configure_client(token: str, timeout: float, deadline: Deadline) -> None:
    """Give huggingface_hub, for the rest of this process, time limits and a guard on the token.

    Args:
        token: may go to the endpoint's own origin only.
        timeout: seconds without an answer after which a request fails.
        deadline: no request starts, or waits, beyond it.
    """
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    limit = f"{max(1, round(timeout))}s"
    for name, value in {
        "CONNECT_TIMEOUT": f"{min(CONNECT_SECONDS, max(1, round(timeout))):.0f}s",
        "READ_TIMEOUT": limit,
        "RETRY_MAX_ATTEMPTS": "2",  # then the LFS path is tried
        "RETRY_BASE_DELAY": "500ms",
        "RETRY_MAX_DURATION": limit,
    }.items():
        os.environ.setdefault(f"HF_XET_CLIENT_{name}", value)  # read by Xet's own client
    origin = _origin(constants.ENDPOINT)

    def before(request: Any) -> None:
        left = deadline.remaining()
        wait = min(timeout, left)
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
        if asked.isdigit() and int(asked) > LONGEST_PAUSE:
            response.headers["Retry-After"] = f"{LONGEST_PAUSE:.0f}"
        response.headers.pop("RateLimit", None)

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


def tries(deadline: Deadline) -> Iterator[Callable[[Exception], None]]:
    """The tries of something that may fail in passing; each yields what to call with its exception.

    The call sleeps before the next try, or raises the exception again: it will not pass, or there is no try left.

        for failed in tries(deadline):
            try:
                return work()
            except Exception as error:
                failed(error)
    """
    for pause in (*PAUSES, None):

        def failed(error: Exception, pause: float | None = pause) -> None:
            failure = explain(error)
            if pause is None or failure is None or not FAILURES[failure.kind].passing:
                raise error
            seconds = max(pause * random.uniform(0.75, 1.5), _retry_after(error))
            if seconds >= deadline.remaining():
                raise error
            log(f"{failure.headline}; trying again in {seconds:.1f} s.")
            time.sleep(seconds)

        yield failed
    raise AssertionError("the last try returns or raises")


def retrying(deadline: Deadline, work: Callable[[], T]) -> T:
    """Do what may be done more than once, again where it fails in passing."""
    for failed in tries(deadline):
        try:
            return work()
        except Exception as error:
            failed(error)
    raise AssertionError("the last try returns or raises")


def _retry_after(error: Exception) -> float:
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    return min(float(asked), LONGEST_PAUSE) if asked.isdigit() else 0.0
