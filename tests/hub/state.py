"""What the Hub remembers, as plain Python: accounts, tokens, repositories, commits, pull requests.

No HTTP here but the refusals, which carry the status and the words of the real service (recorded, or
quoted by users in public threads). A commit is a complete immutable snapshot `path -> Blob`; moving a
branch is one assignment, so whoever reads at any moment sees the old tree or the new one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

from tests.hub.listener import RefusalError

REGULAR_FILE_LIMIT = 10 * 1024 * 1024  # bytes; above, the Hub takes a file only as LFS

# the patterns that the Hub writes into .gitattributes when it creates a model repository
LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz "
    "*.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar "
    "*.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
)
DEFAULT_GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split())


@dataclass(frozen=True)
class Token:
    """An access token.

    Attributes:
        value: the secret itself.
        user: whose it is.
        role: `write`, `read` or `fineGrained`.
        scopes: for `fineGrained`: entity (user, organisation or `owner/name`) -> permissions, e.g. `repo.write`.
    """

    value: str
    user: str
    role: str
    scopes: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def permits(self, permission: str, repo_id: str) -> bool:
        """Whether a fine-grained token has `permission` on the repository or on its whole namespace."""
        entities = (repo_id, namespace_of(repo_id))
        return any(permission in self.scopes.get(entity, ()) for entity in entities)


@dataclass(frozen=True)
class User:
    """An account; `orgs` maps the organisations it belongs to to its role: `admin`, `write` or `read`."""

    name: str
    orgs: Mapping[str, str]

    def belongs_to(self, namespace: str) -> bool:
        """Whether `namespace` is this user or one of its organisations."""
        return namespace == self.name or namespace in self.orgs

    def may_write(self, namespace: str) -> bool:
        """Whether this user may create and change repositories under `namespace`."""
        return namespace == self.name or self.orgs.get(namespace) in ("admin", "write")


@dataclass(frozen=True)
class Blob:
    """One file of a commit.

    Attributes:
        oid: what git calls it: sha1 of the content, or for LFS of the pointer file.
        sha256: of the content, for LFS files; None for regular ones.
        xet_hash: the file's hash in Xet storage, where it lies there.
    """

    content: bytes
    oid: str
    sha256: str | None = None
    xet_hash: str | None = None
    pointer_size: int = 0

    @classmethod
    def regular(cls, content: bytes) -> Blob:
        """A file that git keeps itself."""
        return cls(content, git_sha1(content))

    @classmethod
    def large(cls, content: bytes, xet_hash: str | None = None) -> Blob:
        """A file of which git keeps a pointer only (LFS, with the content in LFS or Xet storage)."""
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        return cls(content, git_sha1(pointer), sha256, xet_hash, len(pointer))


def namespace_of(repo_id: str) -> str:
    """The user or organisation that `owner/name` belongs to."""
    return repo_id.partition("/")[0]


def git_sha1(content: bytes) -> str:
    """The name that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A complete snapshot; `id` is 40 hexadecimal digits and depends on everything else."""

    id: str
    parent: str | None
    files: Mapping[str, Blob]
    title: str
    description: str
    author: str
    date: datetime


@dataclass
class Change:
    """What a commit is asked to do; `parent`, when given, must be the head of the branch."""

    title: str
    description: str = ""
    author: str = "somebody"
    parent: str | None = None
    added: dict[str, Blob] = field(default_factory=dict)
    deleted_files: list[str] = field(default_factory=list)
    deleted_folders: list[str] = field(default_factory=list)

    def apply(self, files: Mapping[str, Blob]) -> dict[str, Blob]:
        """The snapshot that follows `files`.

        Raises:
            RefusalError: 404 when something to be deleted is not there.
        """
        result = dict(files)
        for path in self.deleted_files:
            if result.pop(path, None) is None:
                raise RefusalError(404, f'Entry "{path}" does not exist', "EntryNotFound")
        for folder in self.deleted_folders:
            inside = [path for path in result if path.startswith(folder.rstrip("/") + "/")]
            if not inside:
                raise RefusalError(404, f'Entry "{folder}" does not exist', "EntryNotFound")
            for path in inside:
                del result[path]
        return {**result, **self.added}


@dataclass
class Discussion:
    """A discussion or, with `is_pull_request`, a pull request whose commits are at `refs/pr/NUM`."""

    num: int
    title: str
    description: str
    author: str
    is_pull_request: bool
    created: datetime


class Repository:
    """A model repository, created with the Hub's own first commit that holds `.gitattributes`.

    Attributes:
        refs: `refs/heads/…`, `refs/tags/…`, `refs/pr/…` -> commit id.
        history: commit id -> Commit, in the order of their making.
        lock: held by whoever changes the repository; shared with the whole Hub.
        objects: sha256 -> Blob: the large files uploaded so far, committed or not.
    """

    def __init__(self, repo_id: str, private: bool, author: str, lock: threading.RLock) -> None:
        self.id = repo_id
        self.private = private
        self.lock = lock
        self.created = datetime.now(UTC)
        self.refs: dict[str, str] = {}
        self.history: dict[str, Commit] = {}
        self.objects: dict[str, Blob] = {}
        self.discussions: list[Discussion] = []
        attributes = Blob.regular(DEFAULT_GITATTRIBUTES.encode())
        first = self._make(None, Change("initial commit", author=author, added={".gitattributes": attributes}))
        self.refs["refs/heads/main"] = first.id

    @property
    def head(self) -> str:
        """The commit id of branch main."""
        return self.refs["refs/heads/main"]

    @property
    def commits(self) -> list[Commit]:
        """The commits of branch main, newest first; the last one is the Hub's own."""
        return self.log("main")

    @property
    def branches(self) -> dict[str, str]:
        """Branch name -> commit id."""
        return self._refs_under("refs/heads/")

    @property
    def tags(self) -> dict[str, str]:
        """Tag name -> commit id."""
        return self._refs_under("refs/tags/")

    @property
    def pull_requests(self) -> dict[str, str]:
        """Pull request number, as text -> commit id."""
        return self._refs_under("refs/pr/")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of every file at `revision`."""
        return {path: blob.content for path, blob in self.resolve(revision).files.items()}

    def log(self, revision: str) -> list[Commit]:
        """The commits that lead to `revision`, newest first."""
        found: list[Commit] = []
        commit: Commit | None = self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.history[commit.parent] if commit.parent else None
        return found

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, full ref, commit id or its first seven or more digits names.

        Raises:
            RefusalError: 404 RevisionNotFound.
        """
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.history[self.refs[name]]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision):
            for commit in self.history.values():
                if commit.id.startswith(revision):
                    return commit
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, revision: str, change: Change) -> Commit:
        """Add a commit to a branch or pull request.

        Raises:
            RefusalError: 404 where `revision` is neither, 412 where its head is not `change.parent`.
        """
        ref = revision if revision in self.refs else f"refs/heads/{revision}"
        if ref not in self.refs or ref.startswith("refs/tags/"):
            raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        commit = self._make(self.refs[ref], change)
        self.refs[ref] = commit.id
        return commit

    def propose(self, change: Change) -> tuple[Discussion, Commit]:
        """Open a pull request against main that holds `change`.

        Raises:
            RefusalError: 412 where the head of main is not `change.parent`; no pull request is opened then.
        """
        commit = self._make(self.head, change)
        discussion = self.open_discussion(change.title, change.description, change.author, True)
        self.refs[f"refs/pr/{discussion.num}"] = commit.id
        return discussion, commit

    def push(
        self, files: Mapping[str, bytes | None], title: str = "Edit on the website", revision: str = "main"
    ) -> Commit:
        """Commit as somebody else would, without HTTP: path -> new content, or None to delete the file."""
        change = Change(title, deleted_files=[path for path, content in files.items() if content is None])
        with self.lock:
            for path, content in files.items():
                if content is not None:
                    change.added[path] = self._store(revision, path, content)
            return self.commit(revision, change)

    def open_discussion(self, title: str, description: str, author: str, is_pull_request: bool) -> Discussion:
        """Open a discussion; a pull request starts at the head of main."""
        num = len(self.discussions) + 1
        discussion = Discussion(num, title, description, author, is_pull_request, datetime.now(UTC))
        self.discussions.append(discussion)
        if is_pull_request:
            self.refs[f"refs/pr/{num}"] = self.head
        return discussion

    def upload_mode(self, revision: str, path: str, size: int, sample: bytes) -> str:
        """`lfs` or `regular`: by `.gitattributes`, else LFS for what is large or not text."""
        attributes = self.resolve(revision).files.get(".gitattributes")
        lines = attributes.content.decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        name = path.rsplit("/", 1)[-1]
        tracked = any(fnmatch.fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)
        return "lfs" if tracked or size > REGULAR_FILE_LIMIT or b"\0" in sample else "regular"

    def _store(self, revision: str, path: str, content: bytes) -> Blob:
        if self.upload_mode(revision, path, len(content), content[:512]) == "regular":
            return Blob.regular(content)
        blob = Blob.large(content)
        return self.objects.setdefault(blob.sha256 or "", blob)

    def _refs_under(self, prefix: str) -> dict[str, str]:
        return {ref.removeprefix(prefix): oid for ref, oid in self.refs.items() if ref.startswith(prefix)}

    def _make(self, head: str | None, change: Change) -> Commit:
        if change.parent not in (None, head):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = change.apply(self.history[head].files if head else {})
        now = datetime.now(UTC)
        tree = sorted((path, blob.oid) for path, blob in files.items())
        everything = [len(self.history), head, tree, change.title, change.author, now.isoformat()]
        oid = hashlib.sha1(json.dumps(everything).encode()).hexdigest()
        snapshot = MappingProxyType(dict(sorted(files.items())))
        self.history[oid] = Commit(oid, head, snapshot, change.title, change.description, change.author, now)
        return self.history[oid]


class HubState:
    """Accounts and repositories, and who may do what. `lock` is held while a request changes anything."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.tokens: dict[str, Token] = {}
        self.repositories: dict[str, Repository] = {}

    def add_user(
        self,
        name: str,
        tokens: Mapping[str, str | Mapping[str, Iterable[str]]],
        orgs: Mapping[str, str] | Sequence[str],
    ) -> None:
        """Add an account; see `HubServer.add_user`."""
        roles = orgs if isinstance(orgs, Mapping) else dict.fromkeys(orgs, "write")
        self.users[name] = User(name, roles)
        for value, role in tokens.items():
            if isinstance(role, str):
                self.tokens[value] = Token(value, name, role)
            else:
                scopes = {entity: frozenset(permissions) for entity, permissions in role.items()}
                self.tokens[value] = Token(value, name, "fineGrained", scopes)

    def authenticate(self, bearer: str | None) -> Token | None:
        """The token that was sent; None for an anonymous request.

        Raises:
            RefusalError: 401 for a token that nobody has.
        """
        if bearer is not None and bearer not in self.tokens:
            raise RefusalError(401, "Invalid credentials in Authorization header")
        return self.tokens[bearer] if bearer else None

    def readable(self, repo_id: str, token: Token | None) -> Repository:
        """The repository, if `token` may see it.

        Raises:
            RefusalError: what is private is said not to exist: 404, or 401 to the anonymous.
        """
        repository = self.repositories.get(repo_id)
        if repository is not None and (not repository.private or self._may_see_private(repo_id, token)):
            return repository
        if token is None:
            raise RefusalError(401, "Invalid username or password.")
        raise RefusalError(404, "Repository not found", "RepoNotFound")

    def writable(self, repo_id: str, token: Token | None, create_pr: bool = False) -> Repository:
        """The repository, if `token` may commit to it (or, with `create_pr`, propose a commit).

        Raises:
            RefusalError: as `readable`; 401 for nobody, 403 for a token or a user without the right.
        """
        repository = self.readable(repo_id, token)
        if token is None:
            raise RefusalError(401, "Invalid username or password.")
        if token.role == "read":
            raise RefusalError(403, "you must use a write token to upload to a repository.")
        needed = "discussion.write" if create_pr else "repo.write"
        if token.role == "fineGrained" and not (token.permits("repo.write", repo_id) or token.permits(needed, repo_id)):
            raise RefusalError(403, "You have read access but not the required permissions for this operation")
        if not create_pr and not self.users[token.user].may_write(namespace_of(repo_id)):
            raise RefusalError(403, "pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def create_repository(self, repo_id: str, private: bool, token: Token | None) -> Repository:
        """Create an empty repository.

        Raises:
            RefusalError: 401 for nobody, 403 without the right on the namespace, 409 where it exists.
        """
        if token is None:
            raise RefusalError(401, "Invalid username or password.")
        namespace = namespace_of(repo_id)
        right_by_token = token.role == "write" or token.permits("repo.write", repo_id)
        if not right_by_token or not self.users[token.user].may_write(namespace):
            raise RefusalError(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        if repo_id in self.repositories:
            raise RefusalError(409, "You already created this model repo")
        self.repositories[repo_id] = Repository(repo_id, private, token.user, self.lock)
        return self.repositories[repo_id]

    def _may_see_private(self, repo_id: str, token: Token | None) -> bool:
        if token is None or not self.users[token.user].belongs_to(namespace_of(repo_id)):
            return False
        reading = ("repo.content.read", "repo.write")
        return token.role != "fineGrained" or any(token.permits(right, repo_id) for right in reading)
