"""Where a token comes from, and the guard that nothing secret leaves.

What a token looks like stands in errors.py, because messages must not repeat one either.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from charseq2seq.console import log
from charseq2seq.errors import TOKEN, TOKEN_VARIABLES, ExitCode, SuiteError
from charseq2seq.publishing.failures import PublishError, explain
from charseq2seq.publishing.hub import retrying
from charseq2seq.publishing.surroundings import without_variables

KEYLESS = "keyless sign-in (HF_OIDC_RESOURCE)"  # the library exchanges the identity of a CI job for a token
_STORED = "the stored login"
# Secrets, and this user's settings of Python and of the Hub's client.
_NOT_FOR_STRANGERS = re.compile("TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL|^(HF_|HUGGING|PYTHON)", re.IGNORECASE)
_HOME = r"(?:/home|/Users|C:\\+Users)[/\\]+[\w.-]+|/root/[\w.-]+"
_SHORTEST_PATH = 6  # shorter ones ("/", "/root") occur in ordinary text
_SUITE = Path(__file__).resolve().parents[2]


def find_token(token: str | None, token_file: Path | None) -> tuple[str, str, list[str]]:
    """The first token of command line, file, keyless sign-in, environment and stored login; or raise PublishError.

    Returns:
        The token, where it is from, and which other places have something too.
    """
    from huggingface_hub import constants

    sources: dict[str, Callable[[], str]] = {}  # the first is read, the others are only named
    if token is not None:
        _warn_of_the_command_line()
        sources["the command line"] = lambda: token
    if token_file is not None:
        sources[str(token_file)] = functools.partial(_read_token_file, token_file)
    if "HF_OIDC_RESOURCE" in os.environ:
        sources[KEYLESS] = _sign_in_without_key
    sources |= {name: functools.partial(os.environ.__getitem__, name) for name in TOKEN_VARIABLES if name in os.environ}
    if not sources or os.access(constants.HF_TOKEN_PATH, os.F_OK):
        sources[_STORED] = _stored_login
    source, *others = sources
    if not (found := _unwrapped(sources[source]())):
        raise PublishError("no_token", f"{source} is empty" if source != _STORED else "")
    if not re.fullmatch(r"[!-~]+", found):  # a request header could not hold it
        raise PublishError("bad_token", f"the one from {source} holds characters that no token has")
    if os.access(found, os.F_OK):
        raise PublishError("bad_token", f"the one from {source} is the name of a file, which --token_file reads")
    return found, source, others


def _unwrapped(text: str) -> str:
    """A token without what is copied with it: quotes, the variable's name, a byte order mark."""
    around, quotes = "\ufeff\u200b \t\r\n", "\"'`“”‘’"
    name = r"^(export\s+)?(HF_TOKEN|HUGGING_FACE_HUB_TOKEN)\s*=|^Bearer\s"
    return re.sub(name, "", text.replace("\0", "").strip(around + quotes)).strip(around + quotes)


def _sign_in_without_key() -> str:
    from huggingface_hub import get_token

    try:
        return retrying(get_token) or ""
    except Exception as error:
        failure = explain(error)
        if failure is None:  # the library's own sentence says what is missing
            raise PublishError("keyless", str(error)) from error
        if failure.kind not in ("bad_token", "forbidden", "not_found", "rejected"):
            raise
        raise PublishError("keyless", failure.detail, status=failure.status) from error


def _stored_login() -> str:
    from huggingface_hub import constants, get_token

    with contextlib.suppress(UnicodeDecodeError):  # e.g. UTF-16
        return get_token() or ""
    return _read_token_file(Path(constants.HF_TOKEN_PATH))


@functools.cache  # one warning, although the token is looked for before training and again at the push
def _warn_of_the_command_line() -> None:
    log("note: a token on the command line can be seen by everybody on this machine (ps) and stays in the shell's")
    log("history; HF_TOKEN, a file (--token_file, --hf_token_file) or `hf auth login` keep it to yourself.")


def _read_token_file(path: Path) -> str:
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
        text = _unwrapped(content.decode("utf-16" if b"\0" in content else "utf-8"))  # as Windows' programs write it
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot read the token file {path}: {error}; check the path.", ExitCode.NO_INPUT) from error
    if len(text.split()) != 1:
        raise SuiteError(f"{path} must hold one token and nothing else.", ExitCode.USAGE)
    if os.name != "nt" and mode & 0o077:
        log(f"note: other users of this machine can read {path}; `chmod 600 {path}` keeps it to yourself.")
    return text


strangers_environment = functools.partial(without_variables, _NOT_FOR_STRANGERS)  # for programs that we start


def refuse_secrets(folder: Path, names: Sequence[str], token: str | None) -> None:
    """Refuse files that hold a token or a path of this machine; the message says where, and does not show it."""
    folders = [str(Path.cwd()), str(_SUITE), os.environ.get("HOME", "")]
    places = [folder for folder in folders if len(folder) >= _SHORTEST_PATH]
    # Not in the middle of another path or of an address, because a folder may have the repository's name.
    machine = re.compile("|".join([_HOME, *(rf"(?<![\w.-]){re.escape(path)}(?![\w-])" for path in places)]))
    found = []
    for name in names:
        content = (folder / name).read_bytes()
        if token and token.encode() in content:
            found.append(f"the token in use, in {name}")
        if name.endswith((".bin", ".safetensors", ".png")):  # random bytes may look like a token or a path
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if TOKEN.search(line):
                found.append(f"what looks like a token, in {name} line {number}")
            elif machine.search(line):
                found.append(f"a path of a machine, in {name} line {number}")
    if found:
        raise PublishError("secret", "; ".join(found[:5]))
