"""What file_calls.c has recorded of a folder, and what a disk may hold of it after a power cut."""

from __future__ import annotations

import os
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

GARBAGE = random.Random(0).randbytes(1 << 20)
MOST_NAMES = 5  # changes of names that are kept or lost in every combination; of more, in order, or all but one
Files = dict[str, bytes]  # path within the folder -> content


@dataclass(frozen=True)
class Call:
    """A call, or the `end` of a program; paths are within the folder, the second one is a rename's or a link's."""

    name: str
    inode: int = 0
    offset: int = 0
    content: bytes = b""
    paths: tuple[str, ...] = ()


def read_record(record: bytes, folder: Path) -> list[Call]:
    """What file_calls.c has recorded."""
    calls = []
    while record:
        line, _, record = record.partition(b"\n")
        name, (inode, offset, length) = line.split()[0].decode(), map(int, line.split()[1:])
        content, record = record[:length], record[length:]
        named = name not in ("write", "truncate", "fsync", "fail")
        paths = [os.path.relpath(os.fsdecode(part), folder) for part in content.split(b"\0")] if named else []
        calls.append(Call(name, inode, offset, b"" if named else content, tuple(paths)))
    return calls


@dataclass
class File:
    """A file, as it is on the disk for certain, and as a program sees it."""

    durable: bytes = b""
    whole: bytes = b""
    pending: list[Call] = field(default_factory=list)
    is_folder: bool = False

    def torn(self) -> Iterator[bytes]:
        """What it may hold after a power cut."""
        content, size = self.durable, len(self.whole)
        for call in self.pending:
            half = Call(call.name, offset=call.offset, content=call.content[: len(call.content) // 2])
            for kept in (content, changed(content, half)) if call.content else (content,):
                yield from (kept, kept.ljust(size, b"\0"), kept + GARBAGE[: max(0, size - len(kept))])
            end = call.offset + len(call.content)
            yield self.whole[: call.offset] + bytes(len(call.content)) + self.whole[end:]
            content = changed(content, call)
        yield content


def changed(content: bytes, call: Call) -> bytes:
    """A file's content after a write or a truncation."""
    before = content[: call.offset].ljust(call.offset, b"\0")
    return before + call.content + (content[call.offset + len(call.content) :] if call.name == "write" else b"")


class Disk:
    """A folder on a disk whose cache a power cut empties.

    Args:
        files: what is there for certain.
        inode: the folder's own.
    """

    def __init__(self, files: Files, inode: int) -> None:
        self.names = {name: File(content, content) for name, content in files.items()}
        self.seen = dict(self.names)  # by a program
        self.pending: list[tuple[str, dict[str, File | None]]] = []  # folder, changes of its names; None is gone
        self.inode, self.folders = inode, {inode: ""}
        self.files: dict[int, File] = {}

    def apply(self, call: Call) -> None:
        """What a call does."""
        if call.name in ("create", "mkdir"):
            self.files[call.inode] = File(is_folder=call.name == "mkdir")  # the number may have been another file's
        if call.name == "mkdir":
            self.folders[call.inode] = call.paths[0]
        if call.paths:
            names: dict[str, File | None] = dict.fromkeys(call.paths)
            if call.name != "unlink":
                names[call.paths[-1]] = self.files[call.inode]
            if call.name == "link":
                del names[call.paths[0]]
            self.pending.append((folder_of(call.paths[-1]), names))
            rename(self.seen, names)
        elif call.name == "fsync" and call.inode in self.folders:
            for folder, names in self.pending:
                if folder == self.folders[call.inode]:
                    rename(self.names, names)
            self.pending = [change for change in self.pending if change[0] != self.folders[call.inode]]
        elif call.inode in self.files:
            file = self.files[call.inode]
            if call.name == "fsync":
                file.durable, file.pending = file.whole, []
            else:
                file.whole = changed(file.whole, call)
                file.pending.append(call)

    def visible(self) -> Files:
        """What a program sees."""
        return {name: file.whole for name, file in self.seen.items() if not file.is_folder}

    def after_cut(self) -> Iterator[Files]:
        """All that may be there after a power cut now."""
        for kept in subsets(len(self.pending)):
            names = dict(self.names)
            for number in kept:
                rename(names, self.pending[number][1])
            files = {name: file for name, file in names.items() if not file.is_folder}
            files = {name: file for name, file in files.items() if folder_of(name) in {"", *names}}
            lost = {name: file.durable for name, file in files.items()}
            every = {name: file.whole for name, file in files.items()}
            yield from (lost, every)
            for name, file in files.items():
                for content in file.torn() if file.pending else ():
                    yield from (lost | {name: content}, every | {name: content})


def folder_of(path: str) -> str:
    """The folder of a path; empty for the outermost one."""
    return path.rpartition("/")[0]


def rename(names: dict[str, File], changes: dict[str, File | None]) -> None:
    """Change the names of files."""
    for name, file in changes.items():
        names.pop(name, None)
        if file is not None:
            names[name] = file


def subsets(count: int) -> Iterator[Collection[int]]:
    """Which of so many changes of names may be kept."""
    if count <= MOST_NAMES:
        yield from ([i for i, kept in enumerate(chosen) if kept] for chosen in product([0, 1], repeat=count))
    else:
        yield from (range(kept) for kept in range(count + 1))
        yield from ([i for i in range(count) if i != lost] for lost in range(count))


class Versions:
    """What every file has been replaced by, and the oldest that a power cut may leave."""

    def __init__(self, files: Files) -> None:
        self.of = {name: [content] for name, content in files.items()}
        self.promised = dict.fromkeys(files, 0)

    def note(self, call: Call, disk: Disk) -> bool:
        """Follow a call that the disk has done; a save is over when the next begins or the program ends.

        Returns:
            Whether more is promised now.
        """
        if call.name == "rename":
            for kept in (self.of, self.promised):
                kept.pop(call.paths[0], None)
            self.of.setdefault(call.paths[1], []).append(disk.files[call.inode].whole)
        elif call.name in ("create", "end"):
            self.promised = {name: len(versions) - 1 for name, versions in self.of.items()}
            return True
        return False

    def problems(self, files: Files) -> Iterator[str]:
        """What a power cut must not have left."""
        for name, versions in self.of.items():
            first = self.promised.get(name)
            if name not in files:
                if first is not None:
                    yield f"{name} has gone"
            elif files[name] not in versions[first or 0 :]:
                yield f"{name} is {'an older version' if files[name] in versions else 'damaged'}"
