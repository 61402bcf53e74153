"""Checks what surrounds a push: the Hub's address, proxies, certificates, caches.

huggingface_hub reads the environment when it is imported, and fails long afterwards, without naming the variable. So
this comes before the import.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from charseq2seq.console import log
from charseq2seq.publishing.failures import PublishError, hide_password

_READ_BY_THE_CLIENT = re.compile(r"^(HF_|HUGGING_FACE_|SSL_CERT_)|_PROXY$", re.IGNORECASE)


def check_surroundings() -> None:
    """Make the environment fit for the Hub's client, or raise PublishError that names the wrong variables."""
    for name in filter(_READ_BY_THE_CLIENT.search, list(os.environ)):
        os.environ[name] = os.environ[name].strip()
        if not os.environ[name]:  # set to nothing means not set
            del os.environ[name]
    _move_caches()
    try:
        _make_client()
    except Exception:
        wrong = []
        with without_variables(_READ_BY_THE_CLIENT) as variables:
            for name, value in variables.items():  # each alone, to find the wrong ones
                os.environ[name] = value
                try:
                    _make_client()
                except Exception as error:
                    wrong.append(f"{name}={value} ({error})")
                del os.environ[name]
        if not wrong:
            raise
        raise PublishError("environment", hide_password("; ".join(wrong))) from None


@contextlib.contextmanager
def without_variables(names: re.Pattern[str]) -> Iterator[dict[str, str]]:
    """Take variables out of the environment for a while."""
    taken = {name: os.environ.pop(name) for name in filter(names.search, list(os.environ))}
    try:
        yield taken
    finally:
        os.environ.update(taken)


def _make_client() -> None:
    """Raise what the environment will make the client raise."""
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    if address.scheme not in ("http", "https") or not address.hostname or address.port == 0:
        raise ValueError("an address is https://HOST or http://HOST:PORT")
    for name in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
        int(os.environ.get(name, "1"))
    from huggingface_hub.utils._http import default_client_factory

    default_client_factory().close()


def _move_caches() -> None:
    """Move the client's caches to a temporary folder if the user's cannot be written: Xet's client would fail."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.path.expandvars(os.environ.get("HF_HOME", f"{caches}/huggingface")))
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: this user has no home
        home = home.expanduser()
        home.mkdir(parents=True, exist_ok=True)
    if os.access(home, os.W_OK | os.X_OK):
        return
    folder = tempfile.mkdtemp(prefix="charseq2seq-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    log(f"note: {home} cannot be written, so the Hub's client keeps its caches in {folder} for now.")
    os.environ.setdefault("HF_TOKEN_PATH", str(home / "token"))
    os.environ["HF_HOME"] = folder
