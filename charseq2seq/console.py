"""Results on stdout, the log on stderr, and the exit code.

At a terminal the log is plain sentences; for a log file or cron, each line begins with the time. A log that cannot be
written (stderr closed, its disk full) never stops a run; a reader of stdout that went away ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from charseq2seq.errors import ExitCode, SuiteError, TerminatedError, ending_of
from charseq2seq.files import write_error

if TYPE_CHECKING:
    import logging

# They ask a program to end. `nohup` makes it ignore SIGHUP, and that stays so.
STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    STOP_SIGNALS.append(signal.SIGHUP)


class _Output:  # the only state of this module
    log_file: logging.Handler | None = None
    errors_only = False


def log_errors_only() -> None:
    """From now on write neither log nor results, only errors, because only rank 0 of a run writes them."""
    _Output.errors_only = True


def log_to_file(path: Path) -> None:
    """Write the log to this file too from now on, or raise SuiteError. Rotated at 10 MB; three old files are kept."""
    from logging.handlers import RotatingFileHandler

    try:
        file = RotatingFileHandler(path, maxBytes=10_000_000, backupCount=3, encoding="utf-8", errors="replace")
    except OSError as error:
        raise write_error(path, error) from error
    file.handleError = lambda record: None  # type: ignore[method-assign] # a full disk must not stop a run
    _Output.log_file = file


def is_terminal() -> bool:
    """Whether the log goes to a terminal."""
    return os.isatty(2)


def input_waits() -> bool:
    """Whether stdin is a pipe or a file with something to read."""
    with contextlib.suppress(ImportError, OSError):  # on Windows; the null device
        import fcntl
        import termios

        waiting = fcntl.ioctl(0, termios.FIONREAD, bytes(4))
        return not os.isatty(0) and int.from_bytes(waiting, sys.byteorder) > 0
    return False


def log(message: str) -> None:
    """Write a message to the log."""
    if not _Output.errors_only:
        _write(message)


def _write(message: str) -> None:
    stamp = time.strftime("%Y-%m-%d %H:%M:%S ")
    timed = "\n".join((stamp + line).rstrip() for line in message.split("\n"))
    # A closed or full log must not stop training, nor a signal handler that logs while a line is being written.
    with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
        sys.stderr.write((message if is_terminal() else timed) + "\n")
        sys.stderr.flush()
    if _Output.log_file is not None:
        import logging

        _Output.log_file.emit(logging.makeLogRecord({"msg": timed}))


def write_result(text: str) -> None:
    """Write to stdout at once, or raise SuiteError, or BrokenPipeError if its reader went away."""
    if sys.stdout is None or _Output.errors_only:
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise
        said = f"the result cannot be written to stdout ({error.strerror}); send it somewhere else and run again."
        raise SuiteError(said, ExitCode.IO_ERROR) from error


def _discard(stream: TextIO) -> None:
    """Send what a stream could not write to the null device; else Python tries again at its exit and ends with 120."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run(main: Callable[[Sequence[str] | None], int]) -> int:
    """Run an entry point with the program's command line; what goes wrong becomes a sentence and an exit code."""
    return run_with_report(lambda argv, report: main(argv))


def run_with_report(main: Callable[[Sequence[str] | None, dict[str, Any]], int]) -> int:
    """Like `run`. If `main` puts anything into its report, that is printed at the end as one line of JSON.

    What went wrong, the duration and the exit code are added to it.
    """
    started = time.monotonic()
    _prepare_streams()
    for number in STOP_SIGNALS:
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)  # temporaries are removed and locks released on the way out
    report: dict[str, Any] = {}

    def start() -> int:
        try:
            Path.cwd()
        except OSError as error:
            advice = "the folder in which this was started is gone or closed to you; change to another and run again."
            raise SuiteError(advice, ExitCode.NO_INPUT) from error
        return main(None, report)

    try:
        code, facts = _attempt(start)
        if report:
            report |= facts | {"duration_seconds": round(time.monotonic() - started, 1), "exit_code": int(code)}
            unwritten, _ = _attempt(lambda: write_result(json.dumps(report) + "\n"))
            code = code or unwritten
        return code
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                _discard(stream)


def _attempt(do: Callable[[], int | None]) -> tuple[int, dict[str, Any]]:
    """Do something, and log what ended it; returns the exit code and what the report says of it."""
    try:
        return do() or ExitCode.OK, {}
    except BaseException as error:
        code, message, facts = ending_of(error)  # raises what is a defect
        if message:
            _write(message)
        return code, facts


def _prepare_streams() -> None:
    """Make the three standard streams usable, however the program was started."""
    # One that was closed (`2>&-`) is opened. Else the next file gets its number, and libraries print into a model.
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # Cron's locale may be ASCII, in which a model's text would raise UnicodeEncodeError.
            stream.reconfigure(encoding="utf-8", errors="replace")


def _end(number: int, frame: FrameType | None, tries: int = 50) -> None:
    """End the program by an exception. An import gets up to five seconds first, because its C++ code would abort."""
    error = KeyboardInterrupt() if number == signal.SIGINT else TerminatedError()
    if not _is_importing(frame) or not hasattr(signal, "setitimer"):
        raise error
    if not tries:
        os._exit(ending_of(error)[0])
    signal.signal(signal.SIGALRM, lambda _, now: _end(number, now, tries - 1))
    signal.setitimer(signal.ITIMER_REAL, 0.1)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None
