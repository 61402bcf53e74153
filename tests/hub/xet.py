"""Xet's content-addressed store (CAS), small: enough for the real hf_xet to upload to and download from.

huggingface_hub uploads large files through Xet whenever hf_xet is installed. The Rust client cuts files into
chunks, packs chunks into xorbs, and describes each file in a shard as a list of terms (chunk ranges of xorbs);
for a download it asks for that list and fetches ranges of xorbs by signed addresses. The formats are public:
https://huggingface.co/docs/xet . Not played: global deduplication (every query is answered "unknown"), files that
are asked for in parts, and compressed chunks (`HubServer.environment` switches compression off in the client).
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tests.hub.listener import RefusalError, Request, Response, Route, find_route, json_response
from tests.hub.state import Blob, HubState
from tests.hub.storage import Storage

ENTRY_BYTES = 48  # header and every entry of a shard
WITH_VERIFICATION, WITH_METADATA = 1 << 31, 1 << 30  # flags of a file in a shard


@dataclass(frozen=True)
class Term:
    """Chunks `first` up to, not including, `last` of a xorb: one piece of a file."""

    xorb: str
    unpacked_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Chunk:
    """Where a chunk lies in its serialized xorb (header included), and its content."""

    start: int
    end: int
    content: bytes


class Cas:
    """The routes of the CAS.

    Attributes:
        url: where clients are sent to, set by `HubServer`; a test may point it at a dead port.
    """

    def __init__(self, state: HubState, storage: Storage) -> None:
        self.url = ""
        self._state = state
        self._storage = storage
        self._files: dict[str, list[Term]] = {}
        self._grants: dict[str, tuple[str, str]] = {}
        self._routes: list[Route] = [
            ("GET", "/v1/reconstructions/([0-9a-f]{64})", self._reconstruction),
            ("POST", "/v1/xorbs/default/([0-9a-f]{64})", self._take_xorb),
            ("POST", "/v1/shards", self._take_shard),
        ]

    def grant(self, repo_id: str, scope: str) -> str:
        """A new access token for one repository; `scope` is `read` or `write`."""
        token = f"xet_{secrets.token_hex(16)}"
        self._grants[token] = repo_id, scope
        return token

    def route(self, request: Request) -> Response:
        """Answer one request to the CAS; what it does not know is 404, upon which hf_xet falls back."""
        handle, found = find_route(self._routes, request.method, request.path)
        repo_id, scope = self._grants.get(request.token or "", ("", ""))
        if not scope:
            raise RefusalError(401, "Unauthorized")
        if request.method == "POST" and scope != "write":
            raise RefusalError(403, "Forbidden")
        return handle(request, repo_id, *found)

    def _take_xorb(self, request: Request, repo_id: str, xorb: str) -> Response:
        known = xorb in self._storage.xorbs
        self._storage.xorbs[xorb] = request.body
        return json_response({"was_inserted": not known})

    def _take_shard(self, request: Request, repo_id: str) -> Response:
        files = dict(read_shard(request.body))
        with self._state.lock:
            for file_hash, terms in files.items():
                chunks = [chunk for term in terms for chunk in self._chunks(term)]
                blob = Blob.large(b"".join(chunk.content for chunk in chunks), file_hash)
                self._state.repositories[repo_id].objects[blob.sha256 or ""] = blob
                self._files[file_hash] = terms
        return json_response({"result": 1})

    def _chunks(self, term: Term) -> list[Chunk]:
        return read_chunks(self._storage.xorbs[term.xorb])[term.first : term.last]

    def _reconstruction(self, request: Request, repo_id: str, file_hash: str) -> Response:
        assert request.headers.get("Range", "bytes=0-").startswith("bytes=0-"), "files are small, and asked for whole"
        terms = self._files[file_hash]
        fetch_info: dict[str, list[dict[str, object]]] = {}
        for term in terms:
            fetch_info.setdefault(term.xorb, []).append(self._fetch_entry(term))
        answer = {"offset_into_first_range": 0, "terms": list(map(_term_entry, terms)), "fetch_info": fetch_info}
        return json_response(answer)

    def _fetch_entry(self, term: Term) -> dict[str, object]:
        chunks = self._chunks(term)
        return {
            "range": {"start": term.first, "end": term.last},
            "url": self._storage.signed("GET", f"/xorbs/{term.xorb}"),
            "url_range": {"start": chunks[0].start, "end": chunks[-1].end - 1},  # both inclusive
        }


def _term_entry(term: Term) -> dict[str, object]:
    chunks = {"start": term.first, "end": term.last}
    return {"hash": term.xorb, "unpacked_length": term.unpacked_bytes, "range": chunks}


def hash_text(raw: bytes) -> str:
    """A hash as Xet writes it: four little-endian 64-bit numbers in hexadecimal."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def read_chunks(xorb: bytes) -> list[Chunk]:
    """The chunks of a serialized xorb, without its footer.

    Raises:
        RefusalError: 400 for a compressed chunk, see the head of this file.
    """
    chunks: list[Chunk] = []
    position = 0
    while position + 8 <= len(xorb) and xorb[position] == 0:  # the footer begins with "XETBLOB"
        packed = int.from_bytes(xorb[position + 1 : position + 4], "little")
        if xorb[position + 4] != 0:
            raise RefusalError(400, "this CAS takes uncompressed chunks only")
        end = position + 8 + packed
        chunks.append(Chunk(position, end, xorb[position + 8 : end]))
        position = end
    return chunks


def read_shard(shard: bytes) -> Iterator[tuple[str, list[Term]]]:
    """The files that a shard describes: file hash and terms."""
    position = ENTRY_BYTES  # after the header
    while shard[position : position + 32] != b"\xff" * 32:
        file_hash, flags, count = struct.unpack_from("<32sII", shard, position)
        terms = []
        for index in range(1, count + 1):
            entry = struct.unpack_from("<32sIIII", shard, position + index * ENTRY_BYTES)
            terms.append(Term(hash_text(entry[0]), entry[2], entry[3], entry[4]))
        entries = 1 + count + (count if flags & WITH_VERIFICATION else 0) + (1 if flags & WITH_METADATA else 0)
        position += entries * ENTRY_BYTES
        yield hash_text(file_hash), terms
