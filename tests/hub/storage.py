"""The object store beside the Hub: another origin, signed addresses, and no patience with tokens.

Large files do not travel through the Hub. It hands out signed addresses on this second port, for uploads
(LFS `basic`: one PUT) and for downloads (the 302 of `resolve`). As real object stores do, it refuses a request
that carries an Authorization header besides its signature: that catches every client that sends the user's token
to a host it does not belong to. Not played: uploads in parts.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from tests.hub.listener import RefusalError, Request, Response, Route, find_route, ranged_response
from tests.hub.state import Blob, HubState


class Storage:
    """The routes of the storage origin.

    Attributes:
        url: this origin, set by `HubServer` once the port is known.
        xorbs: Xet's containers of chunks, by hash; the CAS fills it, downloads read it here.
    """

    def __init__(self, state: HubState) -> None:
        self.url = ""
        self.xorbs: dict[str, bytes] = {}
        self._state = state
        self._secret = secrets.token_bytes(16)
        large = "/lfs/((?:spaces/)?[^/]+/[^/]+)/([0-9a-f]{64})"
        self._routes: list[Route] = [
            ("PUT", large, self._put),
            ("GET", large, self._get),
            ("GET", "/xorbs/([0-9a-f]{64})", lambda request, name: ranged_response(request, self.xorbs[name], {})),
        ]

    def signed(self, method: str, path: str) -> str:
        """The address of `path` with the right to use `method` on it."""
        return f"{self.url}{path}?X-Amz-Expires=900&X-Amz-Signature={self._signature(method, path)}"

    def route(self, request: Request) -> Response:
        """Answer one request to this origin."""
        if "Authorization" in request.headers:
            raise RefusalError(400, "Only one auth mechanism allowed")
        if request.query.get("X-Amz-Signature") != self._signature(request.method, request.path):
            raise RefusalError(403, "The signature does not match")
        handle, found = find_route(self._routes, request.method, request.path)
        return handle(request, *found)

    def _put(self, request: Request, repo_id: str, oid: str) -> Response:
        blob = Blob.large(request.body)
        if blob.sha256 != oid:
            raise RefusalError(400, "BadDigest")
        with self._state.lock:
            self._state.repositories[repo_id].objects[oid] = blob
        return Response()

    def _get(self, request: Request, repo_id: str, oid: str) -> Response:
        with self._state.lock:
            blob = self._state.repositories[repo_id].objects[oid]
        return ranged_response(request, blob.content, {"ETag": f'"{oid}"'})

    def _signature(self, method: str, path: str) -> str:
        return hmac.new(self._secret, f"{method} {path}".encode(), hashlib.sha256).hexdigest()
