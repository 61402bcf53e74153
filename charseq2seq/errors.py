"""How a program of the suite ends: exception -> sentence -> exit code -> JSON, here and nowhere else.

Everything that a user can cause is raised as a `SuiteError`; `console.run` prints it without a traceback. Where BSD's
sysexits.h has an exit code it is used, because schedulers know it. The README prints the table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import IntEnum
from importlib.util import find_spec
from typing import Any, TypeGuard

# What a token looks like, as the services document it: no message and no published file may show one.
TOKEN = re.compile(
    r"\b(?:hf|api_org)_(?:(?:oauth|jwt)_[\w.-]{20,}|[A-Za-z0-9]{20,})|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{60,}"
    r"|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|xox[abp]-[A-Za-z0-9-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # of the environment


class ExitCode(IntEnum):
    """Every status that a program of the suite ends with."""

    OK = 0
    UNEXPECTED = 1  # a defect of ours: please report it
    USAGE = 2  # a wrong argument, argparse's own number
    DIVERGED = 3  # the loss became NaN or infinite
    BAD_DATA = 65  # a text, checkpoint or prompt that cannot be used (EX_DATAERR)
    NO_INPUT = 66  # a file that is not there or cannot be read (EX_NOINPUT)
    UNAVAILABLE = 69  # the network or a service did not answer (EX_UNAVAILABLE)
    OUT_OF_MEMORY = 71  # the model or the batch does not fit into memory (EX_OSERR)
    CANNOT_CREATE = 73  # an output file or folder that cannot be made (EX_CANTCREAT)
    IO_ERROR = 74  # disk full, quota, read error (EX_IOERR)
    LOCKED = 75  # another run holds the same model path, or the Hub is busy; try later (EX_TEMPFAIL)
    UNCONFIRMED = 76  # pushed, but what the Hub has could not be verified (EX_PROTOCOL)
    NO_PERMISSION = 77  # the Hub did not accept the token or its rights (EX_NOPERM)
    CONFLICT = 78  # the Hub has something else under that name or tag, or nothing to compare with (EX_CONFIG)
    TOO_LARGE = 79  # a file or the account's storage is over the Hub's limit
    INTERRUPTED = 130  # Ctrl-C, after saving
    OUTPUT_CLOSED = 141  # the reader of stdout went away (as SIGPIPE)
    TERMINATED = 143  # SIGTERM, after saving


class SuiteError(Exception):
    """A refusal or failure that the user can act on.

    Its message is one sentence: what, where, what to do. Its `facts` go into the program's JSON.
    """

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.facts: dict[str, Any] = {"error": "refused", "message": message}


class TerminatedError(KeyboardInterrupt):
    """SIGTERM, outside the training loop. Like Ctrl-C, so that no `except Exception` swallows it."""


def ending_of(error: BaseException) -> tuple[ExitCode, str, dict[str, Any]]:
    """How an exception ends a program: exit code, a message for the log, facts for the JSON on stdout.

    A defect of ours is raised again, because its traceback is wanted.
    """
    if is_out_of_memory(error):
        advice = "out of memory; use a smaller model or text, or a machine with more."
        error = SuiteError(advice, ExitCode.OUT_OF_MEMORY)
    if lacks_temporary_folder(error):
        problem = f"{error.strerror}; set TMPDIR to a folder that you may write to, on a disk with space."
        error = SuiteError(problem, ExitCode.CANNOT_CREATE)
    if isinstance(error, SuiteError):
        message = str(error)
        return error.exit_code, message if message.startswith("❌") else f"error: {message}", error.facts
    if isinstance(error, TerminatedError):
        return ExitCode.TERMINATED, "terminated.", {"outcome": "stopped"}
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "interrupted.", {"outcome": "stopped"}
    if isinstance(error, BrokenPipeError):  # nobody reads stdout any more
        return ExitCode.OUTPUT_CLOSED, "", {}
    raise error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; those of PyTorch are RuntimeErrors, so their text decides."""
    if not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return any(words in str(error).lower() for words in ("out of memory", "allocate memory", "not enough memory"))


def lacks_temporary_folder(error: BaseException) -> TypeGuard[OSError]:
    """Whether an exception says that there is no folder for temporary files; PyTorch needs one."""
    return isinstance(error, FileNotFoundError) and "temporary directory" in str(error)


def require_packages(what: str, *names: str, pip: str = "-r requirements_transformer.txt") -> None:
    """Refuse if packages are missing, without importing any; `pip install` with `pip` brings them."""
    if missing := [name for name in names if find_spec(name) is None]:
        raise SuiteError(f"{what} needs {', '.join(missing)}; run `pip install {pip}`.", ExitCode.UNAVAILABLE)


def refuse_wrong_arguments(problems: Iterable[str]) -> None:
    """Raise SuiteError with all problems, if there are any."""
    if told := list(problems):
        raise SuiteError(list_problems(told), ExitCode.USAGE)


def list_problems(problems: list[str]) -> str:
    """One problem as it is, several as a list."""
    return "\n  - ".join([f"{len(problems)} problems:", *problems]) if len(problems) > 1 else problems[0]
