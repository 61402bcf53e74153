"""Are the libraries there that publishing needs? Asked first, answered in one sentence, and nothing is imported."""

from __future__ import annotations

import re
from importlib import metadata
from importlib.util import find_spec

from charseq2seq.errors import ExitCode, SuiteError

_NEEDED = ("torch", "numpy", "safetensors", "matplotlib", "yaml", "huggingface_hub")
_OLDEST_CLIENT = 1  # huggingface_hub 1.0 brought the client factory, by which requests get time limits


def require_libraries() -> None:
    """Refuse to start without a library, or with a huggingface_hub that is too old.

    Raises:
        SuiteError: which one, and how to install it.
    """
    problem = ""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        problem = f"publishing needs {', '.join(missing)}, and this Python does not have it"
    elif _major(version := metadata.version("huggingface_hub")) < _OLDEST_CLIENT:
        problem = f"publishing needs huggingface_hub {_OLDEST_CLIENT}.0 or newer, and this one is {version}"
    if problem:
        raise SuiteError(f"{problem}; run `pip install -r requirements_transformer.txt`.", ExitCode.UNAVAILABLE)


def _major(version: str) -> int:
    return int(re.match(r"\d*", version)[0] or 0)  # type: ignore[index] # it always matches
