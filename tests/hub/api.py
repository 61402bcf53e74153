"""The Hub's own HTTP routes, as huggingface_hub 2.4.0 uses them, for models and for Spaces (`spaces/owner/name`).

`HubApi.__init__` holds the table of them. A push is whoami, repos/create, validate-yaml (with a README),
preupload, the upload of large files (a Xet token, or an LFS batch), and one commit; a download is revision and
tree, then a HEAD and a GET of `resolve` for each file. Every route runs under the state's lock, so each request
happens entirely or not at all, one after the other.
"""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Mapping
from urllib.parse import unquote

from tests.hub.listener import RefusalError, Request, Response, Route, find_route, json_response, ranged_response
from tests.hub.state import REGULAR_FILE_LIMIT, Blob, Change, HubState, Repository, Token
from tests.hub.storage import Storage
from tests.hub.xet import Cas

REPO, REV = "((?:spaces/)?[^/]+/[^/]+)", "([^/]+)"


class HubApi:
    """Routes requests to the Hub.

    Attributes:
        url: this origin, set by `HubServer` once the port is known.
        cas: Xet's content store, or None for a Hub without Xet.
    """

    def __init__(self, state: HubState, storage: Storage, cas: Cas | None) -> None:
        self.url = ""
        self.cas = cas
        self._state = state
        self._storage = storage
        api, lfs = f"/api/models/{REPO}", f"/{REPO}\\.git/info/lfs"
        self._routes: list[Route] = [
            ("POST", "/oauth/token", self._exchange),
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create),
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("GET", "/api/(?:models|spaces)", self._list),
            ("GET", api, self._info),
            ("GET", f"{api}/revision/{REV}", self._info),
            ("GET", f"{api}/tree/{REV}", self._tree),
            ("GET", f"{api}/refs", self._refs),
            ("GET", f"{api}/commits/{REV}", self._commits),
            ("GET", f"{api}/discussions", self._discussions),
            ("POST", f"{api}/tag/{REV}", self._tag),
            ("POST", f"{api}/branch/{REV}", self._branch),
            ("POST", f"{api}/preupload/{REV}", self._preupload),
            ("POST", f"{api}/commit/{REV}", self._commit),
            ("POST", f"{lfs}/objects/batch", self._lfs_batch),
            ("POST", f"{lfs}/verify", self._lfs_verify),
            ("GET", f"{api}/xet-(read|write)-token/{REV}", self._xet_token),
            ("GET", f"/{REPO}/resolve/{REV}/(.+)", self._resolve),
            ("HEAD", f"/{REPO}/resolve/{REV}/(.+)", self._resolve),
        ]

    def route(self, request: Request) -> Response:
        """Answer one request to the Hub."""
        if (owner := re.match(f"/(api/models/)?{REPO}", request.path)) and owner[2] in self._state.renamed:
            path = request.path.replace(owner[2], self._state.renamed[owner[2]], 1)
            return Response(307, b"", {"Location": path + ("?create_pr=1" if "create_pr" in request.query else "")})
        path = request.path.replace("/api/spaces/", "/api/models/spaces/", 1)
        handle, found = find_route(self._routes, request.method, path)
        with self._state.lock:
            token = self._state.authenticate(request.token)
            is_elsewhere = token and token.is_keyless and found[:1] != tuple(token.scopes)
            if is_elsewhere and handle != self._validate_yaml:  # its token opens one repository
                raise RefusalError(401, "Invalid username or password.")
            return handle(request, token, *map(unquote, found))

    # --- who and where

    def _whoami(self, request: Request, token: Token | None) -> Response:
        if token is None:
            raise RefusalError(401, "Invalid username or password.")
        scopes = token.scopes.items()
        scoped = [{"entity": {"name": entity}, "permissions": sorted(rights)} for entity, rights in scopes]
        access = {"role": token.role, "fineGrained": {"global": [], "scoped": scoped}}
        orgs = [{"name": name, "roleInOrg": role} for name, role in self._state.users[token.user].orgs.items()]
        auth = {"type": "access_token", "accessToken": access}
        return json_response({"type": "user", "name": token.user, "orgs": orgs, "auth": auth})

    def _exchange(self, request: Request, token: Token | None) -> Response:
        asked = request.json()
        resource = asked["resource"]
        access = self._state.exchange(resource, asked["subject_token"])
        if access is None or not asked["grant_type"].endswith(":token-exchange"):
            reason = {"error": "invalid_grant", "error_description": "No matching trusted publisher"}
            return json_response(reason, 400)
        return json_response({"access_token": access, "token_type": "bearer", "expires_in": 3600})

    def _create(self, request: Request, token: Token | None) -> Response:
        asked = request.json()
        namespace = asked.get("organization") or (token.user if token else "")
        assert asked.get("sdk", "static") == "static"
        repo_id = f"{'spaces/' if 'sdk' in asked else ''}{namespace}/{asked['name']}"
        try:
            self._state.create_repository(repo_id, asked.get("visibility") == "private", token)
        except RefusalError as refusal:
            if refusal.status == 409:  # with exist_ok the client reads the address from here
                refusal.extra["url"] = f"{self.url}/{self._state.same_name(repo_id)}"
            raise
        return json_response({"url": f"{self.url}/{repo_id}", "name": repo_id})

    # --- reading

    def _list(self, request: Request, token: Token | None) -> Response:
        owner, part = request.query["author"], request.query["search"]
        found = [name for name in self._state.repositories if name.startswith(f"{owner}/")]
        return json_response([{"id": name} for name in found if part.lower() in name.lower()])

    def _discussions(self, request: Request, token: Token | None, repo_id: str) -> Response:
        proposals = self._state.readable(repo_id, token).proposals
        found = [
            {"title": title, "num": int(number), "author": {"name": author}, "status": status, "isPullRequest": True}
            | {"createdAt": "2026-11-28T01:00:00.000Z", "repo": {"name": repo_id, "type": "model"}}
            for number, (author, title, status) in proposals.items()
            if request.query.get("author") in (None, author) and request.query.get("status") in (None, status)
        ]
        return json_response({"discussions": found, "count": len(found), "start": 0})

    def _info(self, request: Request, token: Token | None, repo_id: str, revision: str = "main") -> Response:
        repository = self._state.readable(repo_id, token)
        commit = repository.resolve(revision)
        facts = {"id": repo_id.removeprefix("spaces/"), "sha": commit.id, "private": repository.private}
        return json_response({**facts, "siblings": [{"rfilename": path} for path in commit.files]})

    def _tree(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        commit = self._state.readable(repo_id, token).resolve(revision)
        return json_response([_file_entry(path, blob) for path, blob in commit.files.items()])

    def _refs(self, request: Request, token: Token | None, repo_id: str) -> Response:
        repository = self._state.readable(repo_id, token)
        branches = _ref_entries("refs/heads/", repository.branches)
        tags = _ref_entries("refs/tags/", repository.tags)
        return json_response({"branches": branches, "tags": tags, "converts": []})

    def _commits(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        self._state.readable(repo_id, token).resolve(revision)
        usual = {"message": "", "date": "2026-11-28T01:00:00.000Z", "authors": []}
        commits = self._state.repositories[repo_id].commits
        return json_response([{"id": one.id, "title": one.title} | usual for one in commits])

    def _resolve(self, request: Request, token: Token | None, repo_id: str, revision: str, path: str) -> Response:
        commit = self._state.readable(repo_id, token).resolve(revision)
        headers = {"X-Repo-Commit": commit.id}
        blob = commit.files.get(path)
        if blob is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound")
        if blob.sha256 is None:
            return ranged_response(request, blob.content, {**headers, "ETag": f'"{blob.oid}"'})
        headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
        location = self._storage.signed("GET", f"/lfs/{repo_id}/{blob.sha256}")
        return Response(302, b"", {**headers, "Location": location})

    # --- writing

    def _tag(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        repository = self._state.writable(repo_id, token)
        tag = f"refs/tags/{request.json()['tag']}"
        if tag in repository.refs:
            raise RefusalError(409, f"Tag reference exists already: {tag}")
        repository.refs[tag] = repository.resolve(revision).id
        return json_response({})

    def _branch(self, request: Request, token: Token | None, repo_id: str, branch: str) -> Response:
        repository = self._state.writable(repo_id, token)
        if (ref := f"refs/heads/{branch}") in repository.refs:
            raise RefusalError(409, f"Reference already exists: {ref}")
        repository.refs[ref] = repository.head
        return json_response({})

    def _validate_yaml(self, request: Request, token: Token | None) -> Response:
        from huggingface_hub import ModelCard  # not above: it reads its settings at import, and forks need their own

        try:
            ModelCard(content := request.json()["content"])
            if re.search(r"^language: (true|false)$", content, re.MULTILINE):  # as YAML 1.2 has them
                raise ValueError('"language" must be a string')
        except Exception as error:  # of the YAML itself, or of the form of its results
            return json_response({"errors": [{"message": f"Invalid YAML: {error}"}], "warnings": []}, 400)
        return json_response({"errors": [], "warnings": []})

    def _preupload(self, request: Request, token: Token | None, repo_id: str, revision: str) -> Response:
        repository = self._state.writable(repo_id, token, _is_proposal(request, revision))
        remote = repository.resolve(revision).files
        answer = []
        for file in request.json()["files"]:
            path, blob = file["path"], remote.get(file["path"])
            mode = repository.upload_mode(path, file["size"], base64.b64decode(file["sample"]))
            oid = (blob.sha256 or blob.oid) if blob else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return json_response({"files": answer})

    def _lfs_batch(self, request: Request, token: Token | None, repo_id: str) -> Response:
        repository = self._state.writable(repo_id, token)
        objects = []
        for asked in request.json()["objects"]:
            oid, size = asked["oid"], asked["size"]
            entry = {"oid": oid, "size": size}
            if oid not in repository.objects:
                upload = {"href": self._storage.signed("PUT", f"/lfs/{repo_id}/{oid}")}
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.url}/{repo_id}.git/info/lfs/verify"}}
            objects.append(entry)
        return json_response({"transfer": "basic", "objects": objects})

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
            self._state.writable(repo_id, token, _is_proposal(request, revision))
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
        repository = self._state.writable(repo_id, token, _is_proposal(request, revision))
        change = _parse_change(repository, request.body)
        answer: dict[str, object] = {"success": True}
        if "create_pr" in request.query:
            number, commit = repository.propose(change, token.user if token else "")
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{number}"
        else:
            commit = repository.commit(revision, change)
        answer |= {"commitOid": commit.id, "commitUrl": f"{self.url}/{repo_id}/commit/{commit.id}"}
        return json_response(answer)


def _is_proposal(request: Request, revision: str) -> bool:
    """Whether a request makes or changes a pull request, for which no right on the repository is needed."""
    return "create_pr" in request.query or revision.startswith("refs/pr/")


def _file_entry(path: str, blob: Blob) -> dict[str, object]:
    """A file in a tree listing."""
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    if blob.sha256 is not None:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": blob.pointer_size}
    if blob.xet_hash is not None:
        entry["xetHash"] = blob.xet_hash
    return entry


def _ref_entries(prefix: str, refs: Mapping[str, str]) -> list[dict[str, str]]:
    """Branches or tags in a listing of refs."""
    return [{"name": name, "ref": prefix + name, "targetCommit": oid} for name, oid in refs.items()]


def _parse_change(repository: Repository, body: bytes) -> Change:
    """Read the ndjson of a commit: a header line, then one line for each operation.

    Raises:
        RefusalError: 400 for a regular file that is too large, or a large file whose content was never uploaded.
    """
    header, *lines = [json.loads(line) for line in body.splitlines() if line]
    change = Change(header["value"]["summary"], header["value"].get("parentCommit"))
    for line in lines:
        kind, value = line["key"], line["value"]
        path = value["path"]
        if kind == "deletedFile":
            change.deleted.append(path)
        elif kind == "file":
            content = base64.b64decode(value["content"])
            if len(content) > REGULAR_FILE_LIMIT:
                raise RefusalError(400, f"Your push was rejected because {path} is larger than 10 MiB: use LFS for it.")
            change.added[path] = Blob.regular(content)
        elif kind == "lfsFile" and value["oid"] in repository.objects:
            change.added[path] = repository.objects[value["oid"]]
        else:
            sentence = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
            raise RefusalError(400, f"{sentence} Offending file: {path}")
    return change
