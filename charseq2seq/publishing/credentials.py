"""Where the token comes from. It goes from here to the request header and nowhere else."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from charseq2seq.console import log
from charseq2seq.errors import ExitCode, SuiteError
from charseq2seq.publishing.failures import PublishError


@dataclass(frozen=True)
class Credentials:
    """A token, never shown, and where it was found."""

    token: str = field(repr=False)
    source: str


def find_credentials(token: str | None, token_file: Path | None) -> Credentials:
    """The first token of: the command line, the file, HF_TOKEN, the stored login.

    Raises:
        PublishError: there is none, or it cannot be one.
        SuiteError: the file cannot be used.
    """
    found = _find(token, token_file)
    if not re.fullmatch(r"[!-~]+", found.token):  # else it would make a header that cannot be sent
        raise PublishError("bad_token", f"the one from {found.source} holds characters that no token has")
    return found


def _find(token: str | None, token_file: Path | None) -> Credentials:
    if token is not None and token.strip():
        _warn_of_the_command_line()
        return Credentials(token.strip(), "the command line")
    if token_file is not None:
        return Credentials(_read_token_file(token_file), str(token_file))
    from huggingface_hub import get_token

    found = get_token()
    if found is None:
        raise PublishError("no_token")
    by_environment = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    return Credentials(found, "HF_TOKEN" if by_environment else "the stored login")


@functools.cache  # once, however often the Hub is asked
def _warn_of_the_command_line() -> None:
    log("note: a token on the command line can be seen by everybody on this machine (ps) and stays in the shell's")
    log("history; HF_TOKEN, a file (--token_file, --hf_token_file) or `hf auth login` keep it to yourself.")


def _read_token_file(path: Path) -> str:
    try:
        words = path.read_text(encoding="utf-8").split()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise SuiteError(f"cannot read the token file {path}: {error}; check the path.", ExitCode.NO_INPUT) from error
    if len(words) != 1:
        raise SuiteError(f"{path} must hold one token and nothing else.", ExitCode.USAGE)
    if os.name != "nt" and mode & 0o077:
        log(f"note: other users of this machine can read {path}; `chmod 600 {path}` keeps it to yourself.")
    return words[0]
