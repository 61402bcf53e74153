"""Files written whole or not at all, the lock of a model path, and the names of the files beside a model.

A reader, a crash or a power cut sees the old file or the new one, never a part: the bytes go to a temporary
file in the same folder, are flushed to the disk, and take the place of the old file by `os.replace`; the folder
is flushed too, so that the new name survives a power cut (see fsync(2) and "Files are hard", danluu.com).

One run at a time writes a model: an advisory lock of the library `filelock` (flock on Linux and macOS, its counterpart
on Windows), which the kernel releases when the process ends. The lock file stays and names the last holder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from charseq2seq.errors import ExitCode, SuiteError

# NAME.PID.tmp: the writer's process id tells the sweep which temporaries are stale.
_TEMPORARY = re.compile(r"^(?P<name>.+)\.(?P<pid>\d+)\.tmp$")

_REMEDY = {
    errno.ENOSPC: ("the disk is full", "free some space and run again", ExitCode.IO_ERROR),
    errno.EDQUOT: ("the disk quota is used up", "free some space and run again", ExitCode.IO_ERROR),
    errno.EFBIG: ("the file is larger than this system allows", "raise the limit (ulimit -f)", ExitCode.IO_ERROR),
    errno.EACCES: ("permission is denied", "choose a folder you may write to", ExitCode.CANNOT_CREATE),
    errno.EPERM: ("permission is denied", "choose a folder you may write to", ExitCode.CANNOT_CREATE),
    errno.EROFS: ("the file system is read-only", "choose a folder you may write to", ExitCode.CANNOT_CREATE),
    errno.ENOENT: ("the folder does not exist", "create it or choose another path", ExitCode.CANNOT_CREATE),
    errno.ENOTDIR: ("a part of the path is a file", "choose another path", ExitCode.CANNOT_CREATE),
    errno.EISDIR: ("a folder of that name is in the way", "choose another path", ExitCode.CANNOT_CREATE),
    errno.ENAMETOOLONG: ("the file name is too long", "choose a shorter one", ExitCode.CANNOT_CREATE),
}


def write_error(path: Path, error: OSError) -> SuiteError:
    """The one sentence for a write that failed: what, where, what to do."""
    default = (error.strerror or str(error), "check the disk and the path", ExitCode.IO_ERROR)
    cause, remedy, code = _REMEDY.get(error.errno or 0, default)
    return SuiteError(f"cannot write {path}: {cause}; {remedy} (any earlier file there is untouched).", code)


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that becomes `path` when the block ends without an exception.

    Raises:
        SuiteError: the file cannot be written; what stood at `path` is untouched.
    """
    path = _target(Path(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)  # os.replace
            _flush_folder(path.parent)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise write_error(path, error) from error
    except RuntimeError as error:
        # torch.save closes its archive after a failed write, and complains about that instead of the full disk.
        if isinstance(error.__context__, OSError):
            raise write_error(path, error.__context__) from error
        if isinstance(error.__context__, KeyboardInterrupt):  # or of what was interrupted
            raise error.__context__ from None
        raise


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, whole or not at all."""
    with atomic_write(path) as file:
        file.write(content)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 with LF line ends on every system, whole or not at all.

    Lone surrogates, which the name of a file may hold and UTF-8 may not, become question marks.
    """
    atomic_write_bytes(path, text.encode("utf-8", errors="replace"))


def sweep_stale_temporaries(path: str | Path) -> list[Path]:
    """Remove the temporaries of `path` whose writers are dead, and return them."""
    path = _target(Path(path))
    swept: list[Path] = []
    with contextlib.suppress(OSError):
        for candidate in path.parent.iterdir():
            match = _TEMPORARY.match(candidate.name)
            if match and match["name"] == path.name and not _is_alive(int(match["pid"])):
                candidate.unlink()
                swept.append(candidate)
    return swept


def _target(path: Path) -> Path:
    """The file itself where the path is a symbolic link: the link is to stay one."""
    return Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114 (no error where it cannot be)


def _is_alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # a live writer of this process would be further down the stack, not sweeping
    if os.name == "nt":  # os.kill(pid, 0) would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OverflowError:
        return False
    except PermissionError:
        return True
    return True


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there; NTFS journals the rename
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
