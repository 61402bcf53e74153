"""Files written whole or not at all, the lock of a model, and the names of the files beside it.

A reader, a crash or a power cut sees the old file or the new one, never a part: the bytes go to a temporary file in
the same folder, are flushed to the disk, and replace the old file; the folder is flushed too, so that the new name
survives a power cut (see fsync(2) and "Files are hard", danluu.com).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import secrets
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from charseq2seq.errors import ExitCode, SuiteError

# The errors of file systems that cannot flush.
_CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES)

# After these errors another path helps; after all others the disk has to be looked at.
_PATH_ERRORS = ["EACCES", "EPERM", "EROFS", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG", "ELOOP"]


def write_error(path: Path, error: OSError) -> SuiteError:
    """The one sentence for a write that failed: what, where, what to do."""
    wrong_path = errno.errorcode.get(error.errno or 0) in _PATH_ERRORS
    advice = "choose a path that you may write to" if wrong_path else "check the disk and its free space, and run again"
    return SuiteError(
        f"cannot write {path}: {error.strerror or error}; {advice} (any earlier file there is untouched).",
        ExitCode.CANNOT_CREATE if wrong_path else ExitCode.IO_ERROR,
    )


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` when the block ends. After an exception (SuiteError) the old one is there."""
    path = _target(Path(path))
    # Random, because only a model has a lock: two writers of any other file must not use the same temporary file.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            with _if_supported():
                os.fsync(file.fileno())
        temporary.replace(path)  # os.replace
        flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # After a failed write torch.save fails to close its archive, and reports that instead of the full disk.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError):
            raise write_error(path, cause) from error
        if isinstance(cause, KeyboardInterrupt):
            raise cause from None
        raise


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write a whole file, see `atomic_write`."""
    with atomic_write(path) as file:
        file.write(content)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8, with LF on every system; lone surrogates, which file names can contain, become question marks."""
    atomic_write_bytes(path, text.encode("utf-8", errors="replace"))


def _target(path: Path) -> Path:
    """The file that a symbolic link names: the link itself must stay a link."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114 (never raises)


@contextlib.contextmanager
def _if_supported() -> Iterator[None]:
    """Go on where a file system cannot flush: shared folders (SMB), FUSE, folders that one may not list."""
    try:
        yield
    except OSError as error:
        if error.errno not in _CANNOT_FLUSH:
            raise


def flush_folder(folder: Path) -> None:
    """Make sure that the names in a folder survive a power cut, where the system can."""
    if os.name != "nt":  # a folder cannot be opened there; NTFS journals the rename
        with _if_supported():
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def leftovers(folder: Path, name: str = "*") -> list[Path]:
    """The temporary files that killed writers of a file left in a folder; `name` may be a pattern."""
    return list(folder.glob(f"{name}.{'[0-9a-f]' * 8}.tmp"))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, so that they survive a power cut; an OSError if one cannot be made."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        flush_folder(folder.parent)


def resume_path(model_path: Path) -> Path:
    """The resume state of a model: transformer_model.pth -> transformer_model.resume.pth."""
    return model_path.with_suffix(".resume" + (model_path.suffix or ".pth"))


def metrics_path(model_path: Path) -> Path:
    """The course of a model's run: transformer_model.pth -> transformer_model.metrics.jsonl."""
    return model_path.with_suffix(".metrics.jsonl")


def lock_path(model_path: Path) -> Path:
    """The lock file of a model: transformer_model.pth -> transformer_model.pth.lock."""
    return model_path.with_name(model_path.name + ".lock")


@contextlib.contextmanager
def run_lock(model_path: Path) -> Iterator[str]:
    """Hold the lock of a model path, so that one run at a time writes it, and remove what a killed run left behind.

    The kernel releases the lock when the process ends, however it ends. The lock file stays and names the last holder.
    Where the file system has no locks, a warning is yielded instead of "". A SuiteError: another run holds it
    (exit code 75), or no file of that name can be written there.
    """
    try:  # refuse now what could not be written at the end of the run
        if model_path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with contextlib.suppress(FileNotFoundError):  # the longest name that a run gives a file may be too long
            model_path.with_name(f"{model_path.name}.resume.earlier.01234567.tmp").lstat()
        path = lock_path(model_path)
        lock = path.open("a", encoding="utf-8")
    except OSError as error:
        raise write_error(model_path, error) from error
    with lock:
        try:
            _lock(lock.fileno())
        except (BlockingIOError, PermissionError) as error:
            holder = path.read_text(encoding="utf-8", errors="ignore") or "its holder is not recorded"
            problem = f"another run is writing {model_path} ({holder}); wait for it or choose another --model_path."
            raise SuiteError(problem, ExitCode.LOCKED) from error
        except OSError as error:  # some network and cluster file systems have no locks
            yield f"{path} cannot be locked ({error.strerror}): take care that no other run writes {model_path}."
            return
        for written in map(_target, (model_path, resume_path(model_path), metrics_path(model_path))):
            for temporary in leftovers(written.parent, glob.escape(written.name)):
                with contextlib.suppress(OSError):
                    temporary.unlink()
        with contextlib.suppress(OSError):  # the lock is held, whatever fails here
            path.write_text(f"process {os.getpid()} since {time.strftime('%Y-%m-%d %H:%M:%S')}", encoding="utf-8")
        yield ""


def _lock(descriptor: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # a byte beyond the text, or nobody could read who holds the lock
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
