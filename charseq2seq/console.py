"""Talking to whoever started the program: results on stdout, the log on stderr.

A person at a terminal reads plain sentences; a log file or cron gets the same lines with a time before each. A log
that cannot be written (stderr closed, its disk full) never stops a run; a reader of stdout that went away ends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from charseq2seq.errors import ExitCode, SuiteError, TerminatedError, as_refusal
from charseq2seq.files import write_error

_log_files: list[logging.Handler] = []
_silent = threading.Event()


def leave_speaking_to_another() -> None:
    """From now on say nothing but errors: of several processes of one run, one speaks."""
    _silent.set()


def log_to_file(path: Path) -> None:
    """From now on write the log to this file too, every line timed; at 10 MB it is rotated.

    Raises:
        SuiteError: the file cannot be written.
    """
    from logging.handlers import RotatingFileHandler

    try:
        handler = RotatingFileHandler(path, maxBytes=10_000_000, backupCount=3, encoding="utf-8", errors="replace")
    except OSError as error:
        raise write_error(path, error) from error
    _log_files.append(handler)
    logging.raiseExceptions = False  # a log that can no longer be written must not stop a run


def is_terminal() -> bool:
    """Whether the log goes to a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def log(message: str = "") -> None:
    """Write a message to the log, every line timed unless a person is reading."""
    if not _silent.is_set():
        _write(message)


def _write(message: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
    timed = "\n".join((stamp + line).rstrip() for line in message.split("\n"))
    # A closed or full log must not stop training, nor a signal handler that logs while a line is being written.
    with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
        sys.stderr.write((message if is_terminal() else timed) + "\n")
        sys.stderr.flush()
    for file in _log_files:
        file.emit(logging.makeLogRecord({"msg": timed}))


def log_error(error: SuiteError) -> None:
    """Write to the log why something was refused."""
    _write(str(error) if str(error).startswith("❌") else f"error: {error}")


def write_result(text: str) -> None:
    """Write to stdout at once.

    Raises:
        BrokenPipeError: its reader went away; `run` turns this into exit code 141.
        SuiteError: it cannot be written, e.g. because it is a file on a full disk.
    """
    if sys.stdout is None or _silent.is_set():
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        raise SuiteError(
            f"the result cannot be written to stdout ({error.strerror}); send it somewhere else and run again.",
            ExitCode.IO_ERROR,
        ) from error


def _discard(stream: TextIO) -> None:
    """Let what a stream could not write vanish, or the interpreter fails with status 120 when it tries once more."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fill_closed_descriptors() -> None:
    """Open what the caller closed (`2>&-`): no model file may get the number that libraries print their warnings to."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise TerminatedError


def stopped_by(stop: KeyboardInterrupt) -> ExitCode:
    """Say that the program was stopped; returns the status to end with."""
    log("terminated." if isinstance(stop, TerminatedError) else "interrupted.")
    return ExitCode.TERMINATED if isinstance(stop, TerminatedError) else ExitCode.INTERRUPTED


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run an entry point and turn what can go wrong into one sentence and an exit code."""
    _fill_closed_descriptors()
    signal.signal(signal.SIGTERM, _terminate)  # temporaries are removed and locks released on the way out
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            # Cron's locale may be ASCII: a model's text must not end in UnicodeEncodeError.
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return main(argv)
    except (SuiteError, MemoryError, RuntimeError) as error:
        refusal = as_refusal(error)
        log_error(refusal)
        return refusal.exit_code
    except KeyboardInterrupt as stop:
        return stopped_by(stop)
    except BrokenPipeError:
        return ExitCode.OUTPUT_CLOSED
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                _discard(stream)
