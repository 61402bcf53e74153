"""What a push would change: each file new, changed, the same, or removed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from charseq2seq.publishing.card_merge import merge_cards, retarget_card
from charseq2seq.publishing.failures import PublishError
from charseq2seq.publishing.hub import Remote, RemoteFile
from charseq2seq.publishing.repository_folder import CARD, RECORD, parse_record, read_record
from charseq2seq.publishing.secret_scan import scan_folder

Contents = dict[str, Path | bytes]  # file name -> the file, or its content

LARGEST_TEXT = 10 << 20  # bytes; the Hub takes more only as LFS
LARGEST_FILE = 500 << 30  # bytes; the Hub takes no more at all
_LARGE_FORMATS = (".bin", ".safetensors")


@dataclass(frozen=True)
class Change:
    """One file of a plan; `size` in bytes."""

    name: str
    state: Literal["new", "changed", "same", "removed"]
    size: int


class Local:
    """A repository folder, ready to be published as `repo_id`.

    Raises:
        SuiteError: it is none, or not complete.
    """

    def __init__(self, folder: Path, repo_id: str) -> None:
        self.folder = folder
        self.repo_id = repo_id
        self.record: dict[str, Any] = read_record(folder)
        self.names: list[str] = self.record["files"]

    def check(self, token: str | None) -> None:
        """Refuse what the Hub would refuse, and what nobody should see.

        Raises:
            PublishError: a file is too large or holds a secret, such as `token`.
        """
        for name in self.names:
            size = _size(self.folder / name)
            limit = LARGEST_FILE if name.endswith(_LARGE_FORMATS) else LARGEST_TEXT
            if size > limit:
                raise PublishError("too_large", f"{name} has {size:,} bytes, {limit:,} are allowed")
        scan_folder(self.folder, self.names, token)

    def contents(self, remote: Remote | None) -> Contents:
        """What is to be published; the card is joined with what people wrote into the published one."""
        files: Contents = {name: self.folder / name for name in self.names}
        card = retarget_card((self.folder / CARD).read_text(encoding="utf-8", errors="replace"), self.repo_id)
        if remote is not None and CARD in remote.texts:
            card = merge_cards(card, remote.texts[CARD])
        return files | {CARD: card.encode("utf-8")}

    def plan(self, remote: Remote | None) -> list[Change]:
        """Compare with what is published; None for nothing.

        Of the published files only those are removed that the suite says it made, and makes no longer.
        """
        published = remote.files if remote else {}
        plan = []
        for name, content in sorted(self.contents(remote).items()):
            there = published.get(name)
            plan.append(
                Change(name, "same" if is_same(content, there) else "changed" if there else "new", _size(content))
            )
        record = published_record(remote)
        gone = (set(record["files"]) & set(published)) - set(self.names) if record else set()
        return plan + [Change(name, "removed", published[name].size) for name in sorted(gone)]


def published_record(remote: Remote | None) -> dict[str, Any] | None:
    """What the suite wrote of the model that is published, if it wrote anything."""
    return parse_record(remote.texts.get(RECORD, "")) if remote else None


def changes_anything(plan: list[Change]) -> bool:
    """Whether there is something to push."""
    return any(change.state != "same" for change in plan)


def describe_plan(plan: list[Change]) -> str:
    """The plan as a person reads it, a line a file."""
    return "".join(f"{change.state:8} {change.size:>12,} bytes  {change.name}\n" for change in plan)


def is_same(content: Path | bytes, there: RemoteFile | None) -> bool:
    """Whether a published file has this content."""
    size = _size(content)
    if there is None or size != there.size:
        return False
    digest = hashlib.sha256() if there.is_large else hashlib.sha1(b"blob %d\0" % size)  # as git names a file
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest() == there.digest


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size
