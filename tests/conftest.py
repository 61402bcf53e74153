"""What all tests share."""

import signal
import sys
from collections.abc import Iterator

import pytest

# A runner started in the background ignores Ctrl-C, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Training in a test's own process turns tiny numbers into zeros from then on; Hypothesis refuses to do without."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
