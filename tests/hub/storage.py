"""The object store beside the Hub: another origin, signed addresses, and no patience with tokens.

Large files do not travel through the Hub. It hands out signed addresses on this second port, for uploads
(LFS `basic`: one PUT; LFS `multipart`: a PUT a part) and for downloads (the 302 of `resolve`). As real
object stores do, it refuses a request that carries an Authorization header besides its signature: that
catches every client that sends the user's token to a host it does not belong to.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets

from tests.hub.listener import RefusalError, Request, Response, ranged_response
from tests.hub.state import Blob, HubState


class Storage:
    """The routes of the storage origin.

    Attributes:
        url: this origin, set by `HubServer` once the port is known.
        part_size: objects larger than this many bytes are uploaded in parts; None: never.
        xorbs: Xet's containers of chunks, by hash; the CAS fills it, downloads read it here.
    """

    def __init__(self, state: HubState, part_size: int | None) -> None:
        self.url = ""
        self.part_size = part_size
        self.xorbs: dict[str, bytes] = {}
        self._state = state
        self._parts: dict[str, bytes] = {}
        self._secret = secrets.token_bytes(16)

    def signed(self, method: str, path: str) -> str:
        """The address of `path` with the right to use `method` on it."""
        return f"{self.url}{path}?X-Amz-Expires=900&X-Amz-Signature={self._signature(method, path)}"

    def upload_action(self, repo_id: str, oid: str, size: int, completion_url: str) -> dict[str, object]:
        """How a client shall upload an object: the `upload` member of an LFS batch answer."""
        path = f"/lfs/{repo_id}/{oid}"
        if self.part_size is None or size <= self.part_size:
            return {"href": self.signed("PUT", path)}
        header = {"chunk_size": str(self.part_size)}
        for number in range(1, math.ceil(size / self.part_size) + 1):
            header[str(number)] = self.signed("PUT", f"{path}/{number}")
        return {"href": completion_url, "header": header}

    def complete(self, repo_id: str, oid: str, parts: list[dict[str, str]]) -> None:
        """Join the uploaded parts of an object.

        Args:
            parts: the client's list of `partNumber` and `etag`, the latter as the PUT of the part answered.
        """
        contents = [self._parts.get(f"/lfs/{repo_id}/{oid}/{part['partNumber']}", b"") for part in parts]
        if [part["etag"] for part in parts] != [_etag(content) for content in contents]:
            raise RefusalError(400, "InvalidPart")
        self._keep(repo_id, oid, b"".join(contents))

    def route(self, request: Request) -> Response:
        """Answer one request to this origin."""
        if "Authorization" in request.headers:
            return _xml_error(400, "InvalidArgument", "Only one auth mechanism allowed")
        if request.query.get("X-Amz-Signature") != self._signature(request.method, request.path):
            return _xml_error(403, "SignatureDoesNotMatch", "The signature does not match")
        if found := re.fullmatch(r"/lfs/([^/]+/[^/]+)/([0-9a-f]{64})(/\d+)?", request.path):
            repo_id, oid, part = found.groups()
            if request.method == "PUT":
                return self._put(request, repo_id, oid, part)
            return self._get(request, repo_id, oid)
        if found := re.fullmatch(r"/xorbs/([0-9a-f]{64})", request.path):
            return ranged_response(request, self.xorbs[found[1]], {})
        return _xml_error(404, "NoSuchKey", "The specified key does not exist")

    def _put(self, request: Request, repo_id: str, oid: str, part: str | None) -> Response:
        if part is not None:
            self._parts[request.path] = request.body
        else:
            self._keep(repo_id, oid, request.body)
        return Response(200, b"", {"ETag": _etag(request.body)})

    def _get(self, request: Request, repo_id: str, oid: str) -> Response:
        with self._state.lock:
            blob = self._state.repositories[repo_id].objects[oid]
        return ranged_response(request, blob.content, {"ETag": f'"{oid}"'})

    def _keep(self, repo_id: str, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400, "BadDigest")
        with self._state.lock:
            self._state.repositories[repo_id].objects[oid] = Blob.large(content)

    def _signature(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def _xml_error(status: int, code: str, message: str) -> Response:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Response(status, body.encode(), {"Content-Type": "application/xml"})
