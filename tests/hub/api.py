"""The Hub's own HTTP routes, as huggingface_hub 2.4.0 uses them (model repositories only).

`HubApi.__init__` holds the table of them. A push is whoami, repos/create, validate-yaml (with a README),
preupload, the upload of large files (a Xet token, or an LFS batch), and one commit; a download is revision and
tree, then a HEAD and a GET of `resolve` for each file. Every route runs under the state's lock, so each request
happens entirely or not at all, one after the other.
"""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable, Iterable
from urllib.parse import parse_qs, unquote, urlencode

from tests.hub.answers import (
    card_metadata,
    card_problem,
    discussion_entry,
    file_entry,
    parse_change,
    ref_entries,
    sibling_details,
    timestamp,
    tree_entries,
)
from tests.hub.listener import RefusalError, Request, Response, json_response, ranged_response
from tests.hub.state import HubState, Token, namespace_of
from tests.hub.storage import Storage
from tests.hub.xet import Cas

REPO, REV = "([^/]+/[^/]+)", "([^/]+)"
Route = Callable[..., Response]


class HubApi:
    """Routes requests to the Hub.

    Attributes:
        url: this origin, set by `HubServer` once the port is known.
        cas: Xet's content store, or None for a Hub without Xet.
        page_size: entries of one page of a listing; the rest is behind the Link header.
    """

    def __init__(self, state: HubState, storage: Storage, cas: Cas | None, page_size: int) -> None:
        self.url = ""
        self.cas = cas
        self.page_size = page_size
        self._state = state
        self._storage = storage
        api, lfs = f"/api/models/{REPO}", f"/{REPO}\\.git/info/lfs"
        table: list[tuple[str, str, Route]] = [
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create),
            ("DELETE", "/api/repos/delete", self._delete),
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("GET", api, self._info),
            ("GET", f"{api}/revision/{REV}", self._info),
            ("GET", f"{api}/auth-check", self._auth_check),
            ("PUT", f"{api}/settings", self._settings),
            ("GET", f"{api}/tree/{REV}(?:/(.*))?", self._tree),
            ("POST", f"{api}/paths-info/{REV}", self._paths_info),
            ("GET", f"{api}/refs", self._refs),
            ("GET", f"{api}/commits/{REV}", self._commits),
            ("POST", f"{api}/tag/{REV}", self._tag),
            ("DELETE", f"{api}/tag/{REV}", self._untag),
            ("POST", f"{api}/branch/{REV}", self._branch),
            ("DELETE", f"{api}/branch/{REV}", self._unbranch),
            ("POST", f"{api}/preupload/{REV}", self._preupload),
            ("POST", f"{api}/commit/{REV}", self._commit),
            ("POST", f"{lfs}/objects/batch", self._lfs_batch),
            ("POST", f"{lfs}/complete", self._lfs_complete),
            ("POST", f"{lfs}/verify", self._lfs_verify),
            ("GET", f"{api}/xet-(read|write)-token/{REV}", self._xet_token),
            ("GET", f"{api}/discussions", self._discussions),
            ("POST", f"{api}/discussions", self._open_discussion),
            ("GET", f"{api}/discussions/(\\d+)", self._discussion),
            ("GET", f"/{REPO}/resolve/{REV}/(.+)", self._resolve),
            ("HEAD", f"/{REPO}/resolve/{REV}/(.+)", self._resolve),
        ]
        self._table = [(method, re.compile(pattern), route) for method, pattern, route in table]

    def route(self, request: Request) -> Response:
        """Answer one request to the Hub."""
        for method, pattern, handle in self._table:
            found = pattern.fullmatch(request.path) if method == request.method else None
            if found is not None:
                arguments = [unquote(group) if group else group for group in found.groups()]
                with self._state.lock:
                    token = self._state.authenticate(request.bearer)
                    return handle(request, token, *arguments)
        raise RefusalError(404, "Sorry, we can't find the page you are looking for.")

    # --- who and where

    def _whoami(self, request: Request, token: Token | None) -> Response:
        if token is None:
            raise RefusalError(401, "Invalid username or password.")
        access: dict[str, object] = {"displayName": f"{token.role} token", "role": token.role}
        if token.role == "fineGrained":
            access["fineGrained"] = {"global": [], "scoped": [self._scope(*scope) for scope in token.scopes.items()]}
        orgs = self._state.users[token.user].orgs
        return json_response(
            {
                "type": "user",
                "name": token.user,
                "fullname": token.user.title(),
                "orgs": [{"type": "org", "name": name, "roleInOrg": role} for name, role in orgs.items()],
                "auth": {"type": "access_token", "accessToken": access},
            }
        )

    def _scope(self, entity: str, permissions: Iterable[str]) -> dict[str, object]:
        kind = "model" if "/" in entity else "user" if entity in self._state.users else "org"
        return {"entity": {"type": kind, "name": entity}, "permissions": sorted(permissions)}

    def _create(self, request: Request, token: Token | None) -> Response:
        asked = request.json()
        namespace = asked.get("organization") or (token.user if token else "")
        repo_id = f"{namespace}/{asked['name']}"
        try:
            self._state.create_repository(repo_id, asked.get("visibility") == "private", token)
        except RefusalError as refusal:
            if refusal.status == 409:  # with exist_ok the client reads the address from here
                refusal.extra["url"] = f"{self.url}/{repo_id}"
            raise
        return json_response({"url": f"{self.url}/{repo_id}", "name": repo_id})

    def _delete(self, request: Request, token: Token | None) -> Response:
        asked = request.json()
        namespace = asked.get("organization") or (token.user if token else "")
        repository = self._state.writable(f"{namespace}/{asked['name']}", token)
        del self._state.repositories[repository.id]
        return json_response({})

    def _settings(self, request: Request, token: Token | None, repo_id: str) -> Response:
        repository = self._state.writable(repo_id, token)
        repository.private = request.json().get("visibility", repository.private) in (True, "private")
        return json_response({"visibility": "private" if repository.private else "public"})

    # --- reading

    def _auth_check(self, request: Request, token: Token | None, repo_id: str) -> Response:
        self._state.readable(repo_id, token)
        return json_response({})

    def _info(self, request: Request, token: Token | None, repo_id: str, revision: str = "main") -> Response:
        repository = self._state.readable(repo_id, token)
        commit = repository.resolve(revision)
        card = card_metadata(commit)
        siblings = [
            {"rfilename": path, **(sibling_details(blob) if "blobs" in request.query else {})}
            for path, blob in commit.files.items()
        ]
        return json_response(
            {
                "id": repo_id,
                "modelId": repo_id,
                "author": namespace_of(repo_id),
                "sha": commit.id,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "createdAt": timestamp(repository.created),
                "lastModified": timestamp(commit.date),
                "tags": card.get("tags", []) if isinstance(card, dict) else [],
                "cardData": card,
                "siblings": siblings,
            }
        )

    def _tree(
        self, request: Request, token: Token | None, repo_id: str, revision: str, folder: str | None = None
    ) -> Response:
        commit = self._state.readable(repo_id, token).resolve(revision)
        prefix = f"{folder}/" if folder else ""
        entries = tree_entries(commit, prefix, recursive=request.query.get("recursive", "").lower() == "true")
        if prefix and not entries:
            raise RefusalError(404, f'"{folder}" does not exist on "{revision}"', "EntryNotFound")
        return self._page(request, entries)

    def _page(self, request: Request, entries: list[dict[str, object]]) -> Response:
        start = int(request.query.get("cursor", "0"))
        end = start + self.page_size
        headers = {}
        if end < len(entries):
            query = urlencode({**request.query, "cursor": str(end)})
            headers["Link"] = f'<{self.url}{request.path}?{query}>; rel="next"'
        return json_response(entries[start:end], headers=headers)

    def _paths_info(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        commit = self._state.readable(repo_id, token).resolve(revision)
        asked = parse_qs(request.body.decode())["paths"]
        return json_response([file_entry(path, commit.files[path]) for path in asked if path in commit.files])

    def _refs(self, request: Request, token: Token | None, repo_id: str) -> Response:
        repository = self._state.readable(repo_id, token)
        answer: dict[str, object] = {
            "branches": ref_entries("refs/heads/", repository.branches),
            "tags": ref_entries("refs/tags/", repository.tags),
            "converts": [],
        }
        if "include_prs" in request.query:
            answer["pullRequests"] = ref_entries("refs/pr/", repository.pull_requests)
        return json_response(answer)

    def _commits(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        return self._page(
            request,
            [
                {
                    "id": commit.id,
                    "title": commit.title,
                    "message": commit.description,
                    "authors": [{"user": commit.author}],
                    "date": timestamp(commit.date),
                }
                for commit in self._state.readable(repo_id, token).log(revision)
            ],
        )

    def _resolve(self, request: Request, token: Token | None, repo_id: str, revision: str, path: str) -> Response:
        repository = self._state.readable(repo_id, token)
        commit = repository.resolve(revision)
        headers = {"X-Repo-Commit": commit.id}
        blob = commit.files.get(path)
        if blob is None:
            refusal = RefusalError(404, "Entry not found", "EntryNotFound").response()
            return Response(refusal.status, refusal.body, {**refusal.headers, **headers})
        if blob.sha256 is None:
            return ranged_response(request, blob.content, {**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        if blob.xet_hash is not None:
            auth = f"{self.url}/api/models/{repo_id}/xet-read-token/{commit.id}"
            headers |= {"X-Xet-Hash": blob.xet_hash, "Link": f'<{auth}>; rel="xet-auth"'}
        location = self._storage.signed("GET", f"/lfs/{repo_id}/{blob.sha256}")
        return Response(302, b"", {**headers, "Location": location})

    # --- branches and tags

    def _tag(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        repository = self._state.writable(repo_id, token)
        tag = request.json()["tag"]
        if tag in repository.tags:
            raise RefusalError(409, f"Tag reference exists already: refs/tags/{tag}")
        repository.refs[f"refs/tags/{tag}"] = repository.resolve(revision).id
        return json_response({})

    def _untag(self, request: Request, token: Token | None, repo_id: str, tag: str) -> Response:
        repository = self._state.writable(repo_id, token)
        if repository.refs.pop(f"refs/tags/{tag}", None) is None:
            raise RefusalError(404, f"Invalid rev id: {tag}", "RevisionNotFound")
        return json_response({})

    def _branch(self, request: Request, token: Token | None, repo_id: str, branch: str) -> Response:
        repository = self._state.writable(repo_id, token)
        if branch in repository.branches:
            raise RefusalError(409, f"Reference already exists: refs/heads/{branch}")
        start = request.json().get("startingPoint", "main")
        repository.refs[f"refs/heads/{branch}"] = repository.resolve(start).id
        return json_response({})

    def _unbranch(self, request: Request, token: Token | None, repo_id: str, branch: str) -> Response:
        repository = self._state.writable(repo_id, token)
        if branch == "main":
            raise RefusalError(403, "Cannot delete refs/heads/main")
        if repository.refs.pop(f"refs/heads/{branch}", None) is None:
            raise RefusalError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return json_response({})

    # --- writing

    def _validate_yaml(self, request: Request, token: Token | None) -> Response:
        problem = card_problem(request.json()["content"])
        if problem is not None:
            return json_response({"errors": [{"message": problem}], "warnings": []}, 400)
        return json_response({"errors": [], "warnings": []})

    def _preupload(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        repository = self._state.writable(repo_id, token, "create_pr" in request.query)
        remote = repository.resolve(revision).files
        answer = []
        for file in request.json()["files"]:
            blob = remote.get(file["path"])
            sample = base64.b64decode(file["sample"])
            answer.append(
                {
                    "path": file["path"],
                    "uploadMode": repository.upload_mode(revision, file["path"], file["size"], sample),
                    "shouldIgnore": False,
                    "oid": (blob.sha256 or blob.oid) if blob else None,
                }
            )
        return json_response({"files": answer})

    def _lfs_batch(self, request: Request, token: Token | None, repo_id: str) -> Response:
        repository = self._state.writable(repo_id, token)
        transfer, objects = "basic", []
        for asked in request.json()["objects"]:
            oid, size = asked["oid"], asked["size"]
            entry = {"oid": oid, "size": size}
            if oid not in repository.objects:
                complete = f"{self.url}/{repo_id}.git/info/lfs/complete?oid={oid}"
                upload = self._storage.upload_action(repo_id, oid, size, complete)
                transfer = "multipart" if "header" in upload else transfer
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/{repo_id}.git/info/lfs/verify"}}
            objects.append(entry)
        return json_response({"transfer": transfer, "objects": objects})

    def _lfs_complete(self, request: Request, token: Token | None, repo_id: str) -> Response:
        # like the real one this request carries no token: the parts were accepted by their signatures
        self._storage.complete(repo_id, request.query["oid"], request.json()["parts"])
        return json_response({})

    def _lfs_verify(self, request: Request, token: Token | None, repo_id: str) -> Response:
        asked = request.json()
        blob = self._state.readable(repo_id, token).objects.get(asked["oid"])
        if blob is None or len(blob.content) != asked["size"]:
            raise RefusalError(404, "Object not found in storage")
        return json_response({})

    def _xet_token(self, request: Request, token: Token | None, repo_id: str, scope: str, revision: str) -> Response:
        if self.cas is None:
            raise RefusalError(404, "Sorry, we can't find the page you are looking for.")
        if scope == "write":
            self._state.writable(repo_id, token, "create_pr" in request.query)
        else:
            self._state.readable(repo_id, token)
        access, expiry = self.cas.grant(repo_id, scope), int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": self.cas.url,
            "X-Xet-Access-Token": access,
            "X-Xet-Token-Expiration": str(expiry),
        }
        return json_response({"casUrl": self.cas.url, "accessToken": access, "exp": expiry}, headers=headers)

    def _commit(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        create_pr = "create_pr" in request.query
        repository = self._state.writable(repo_id, token, create_pr)
        change = parse_change(repository, request.body, token.user if token else "")
        answer: dict[str, object] = {"success": True}
        if create_pr:
            discussion, commit = repository.propose(change)
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{discussion.num}"
        else:
            commit = repository.commit(revision, change)
        answer |= {"commitOid": commit.id, "commitUrl": f"{self.url}/{repo_id}/commit/{commit.id}"}
        return json_response(answer)

    # --- pull requests

    def _discussions(self, request: Request, token: Token | None, repo_id: str) -> Response:
        repository = self._state.readable(repo_id, token)
        entries = [discussion_entry(repository, discussion) for discussion in repository.discussions]
        return json_response({"count": len(entries), "start": 0, "discussions": entries})

    def _open_discussion(self, request: Request, token: Token | None, repo_id: str) -> Response:
        repository = self._state.writable(repo_id, token, create_pr=True)
        asked = request.json()
        author = token.user if token else ""
        discussion = repository.open_discussion(asked["title"], asked["description"], author, asked["pullRequest"])
        return json_response(discussion_entry(repository, discussion))

    def _discussion(self, request: Request, token: Token | None, repo_id: str, num: str) -> Response:
        repository = self._state.readable(repo_id, token)
        for discussion in repository.discussions:
            if discussion.num == int(num):
                details = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": []}
                return json_response({**discussion_entry(repository, discussion), **details})
        raise RefusalError(404, "Discussion not found")
