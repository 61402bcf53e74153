"""One run at a time for each model path, and the files that lie beside it.

An advisory lock by the kept library `filelock` (flock on Linux and macOS, its like on Windows): the kernel releases it
when the process dies, however it dies. The lock file stays and names the last holder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

from charseq2seq.atomic_files import write_error
from charseq2seq.errors import ExitCode, SuiteError


def resume_path(model_path: Path) -> Path:
    """Where the resume state of a model lies: transformer_model.pth -> transformer_model.resume.pth."""
    return model_path.with_suffix(".resume" + (model_path.suffix or ".pth"))


def lock_path(model_path: Path) -> Path:
    """Where the lock of a model lies: transformer_model.pth -> transformer_model.pth.lock."""
    return model_path.with_name(model_path.name + ".lock")


@contextlib.contextmanager
def run_lock(model_path: Path) -> Iterator[None]:
    """Hold the lock of a model path.

    Raises:
        SuiteError: another run holds it (exit code 75), or no file of that name can be written there.
    """
    from filelock import FileLock, Timeout

    _check_name(model_path)
    path = lock_path(model_path)
    try:
        lock = FileLock(path, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise SuiteError(
            f"another run is writing {model_path} ({_holder(path)}); wait for it or choose another --model_path.",
            ExitCode.LOCKED,
        ) from error
    except OSError as error:
        raise write_error(path, error) from error
    try:
        with contextlib.suppress(OSError):  # who holds it is a courtesy, the lock itself is held
            path.write_text(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}", encoding="utf-8")
        yield
    finally:
        lock.release()


def _check_name(model_path: Path) -> None:
    """Refuse now what could not be written at the end of the run."""
    try:
        if model_path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not model_path.parent.is_dir():  # filelock would make the folder of a mistyped path
            reason = errno.ENOTDIR if model_path.parent.exists() else errno.ENOENT
            raise OSError(reason, os.strerror(reason))
        with contextlib.suppress(FileNotFoundError):  # the longest name that a run gives a file
            model_path.with_name(f"{model_path.name}.resume.earlier.{os.getpid()}.tmp").lstat()
    except OSError as error:
        raise write_error(model_path, error) from error


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") or "its holder is not recorded"
    except (OSError, UnicodeDecodeError):
        return "its holder cannot be read"
