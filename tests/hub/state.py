"""What the Hub remembers, as plain Python: accounts, tokens, repositories, commits, pull requests.

No HTTP here but the refusals, which carry the status and the words of the real service (recorded, or
quoted by users in public threads). A commit is a complete immutable snapshot `path -> Blob`; moving a
branch is one assignment, so whoever reads at any moment sees the old tree or the new one.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import secrets
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from tests.hub.listener import RefusalError

REGULAR_FILE_LIMIT = 10 * 1024 * 1024  # bytes; above, the Hub takes a file only as LFS

# some of the patterns that the Hub writes into .gitattributes when it creates a model repository
LFS_PATTERNS = ("*.7z", "*.bin", "*.gz", "*.npz", "*.onnx", "*.pt", "*.pth", "*.safetensors", "*.zip", "*tfevents*")
DEFAULT_GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS)
# what the Hub puts into a static Space when it creates one
NEW_SPACE = {
    "README.md": b"---\ntitle: A Page\nsdk: static\npinned: false\n---\n\nCheck out the configuration reference.\n",
    "index.html": b"<h1>Welcome to your static Space!</h1>\n",
    "style.css": b"h1 { color: gray }\n",
}


@dataclass(frozen=True)
class Token:
    """An access token; `scopes` of a fine-grained one: entity (user, organisation or `owner/name`) -> permissions."""

    value: str
    user: str
    role: str  # `write`, `read` or `fineGrained`
    scopes: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def is_keyless(self) -> bool:
        """Whether it was given for the identity of a CI job."""
        return self.value.startswith("hf_jwt_")

    def permits(self, permission: str, repo_id: str) -> bool:
        """Whether a fine-grained token has `permission` on the repository or on its whole namespace."""
        entities = (repo_id.removeprefix("spaces/"), namespace_of(repo_id))
        return any(permission in self.scopes.get(entity, ()) for entity in entities)


@dataclass(frozen=True)
class User:
    """An account; `orgs`: organisation -> its role there, `admin`, `write`, `contributor` or `read`."""

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
    """One file of a commit."""

    content: bytes
    oid: str  # what git calls it: sha1 of the content, or for LFS of the pointer file
    sha256: str | None = None  # of the content, for LFS files
    xet_hash: str | None = None  # in Xet storage, where it lies there
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
    return repo_id.removeprefix("spaces/").partition("/")[0]


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


@dataclass
class Change:
    """What a commit is asked to do; `parent`, when given, must be the head of the branch."""

    title: str
    parent: str | None = None
    added: dict[str, Blob] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)


class Repository:
    """A model repository, created with the Hub's own first commit that holds `.gitattributes`.

    Attributes:
        refs: `refs/heads/…`, `refs/tags/…`, `refs/pr/…` -> commit id.
        history: commit id -> Commit, in the order of their making.
        lock: held by whoever changes the repository; shared with the whole Hub.
        objects: sha256 -> Blob: the large files uploaded so far, committed or not.
        proposals: number of a pull request -> its author, title and status.
    """

    def __init__(self, private: bool, lock: threading.RLock, files: Mapping[str, bytes] | None = None) -> None:
        self.private = private
        self.lock = lock
        self.refs: dict[str, str] = {}
        self.history: dict[str, Commit] = {}
        self.objects: dict[str, Blob] = {}
        self.proposals: dict[str, tuple[str, str, str]] = {}
        made = {".gitattributes": DEFAULT_GITATTRIBUTES.encode(), **(files or {})}
        added = {name: Blob.regular(content) for name, content in made.items()}
        first = self._make(None, Change("initial commit", added=added))
        self.refs["refs/heads/main"] = first.id

    @property
    def head(self) -> str:
        """The commit id of branch main."""
        return self.refs["refs/heads/main"]

    @property
    def commits(self) -> list[Commit]:
        """The commits of branch main, newest first; the last one is the Hub's own."""
        found = [self.resolve("main")]
        while found[-1].parent:
            found.append(self.history[found[-1].parent])
        return found

    @property
    def branches(self) -> dict[str, str]:
        """Branch name -> commit id."""
        return self._refs_under("refs/heads/")

    @property
    def tags(self) -> dict[str, str]:
        """Tag name -> commit id."""
        return self._refs_under("refs/tags/")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of every file at `revision`."""
        return {path: blob.content for path, blob in self.resolve(revision).files.items()}

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, full ref or commit id names.

        Raises:
            RefusalError: 404 RevisionNotFound.
        """
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.history[self.refs[name]]
        if revision in self.history:
            return self.history[revision]
        raise RefusalError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def commit(self, branch: str, change: Change) -> Commit:
        """Add a commit to a branch.

        Raises:
            RefusalError: 404 where there is no such branch, 412 where its head is not `change.parent`.
        """
        ref = branch if branch in self.refs else f"refs/heads/{branch}"
        if ref not in self.refs:
            raise RefusalError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        commit = self._make(self.refs[ref], change)
        self.refs[ref] = commit.id
        return commit

    def propose(self, change: Change, author: str) -> tuple[int, Commit]:
        """Open a pull request against main that holds `change`; its number, and the commit.

        Raises:
            RefusalError: 412 where the head of main is not `change.parent`; no pull request is opened then.
        """
        commit = self._make(self.head, change)
        number = len(self.proposals) + 1
        self.refs[f"refs/pr/{number}"] = commit.id
        self.proposals[str(number)] = (author, change.title, "open")
        return number, commit

    def push(self, files: Mapping[str, bytes]) -> Commit:
        """Commit to main as somebody else would on the website: path -> new content."""
        change = Change("Edit on the website")
        with self.lock:
            for path, content in files.items():
                if self.upload_mode(path, len(content), content[:512]) == "regular":
                    change.added[path] = Blob.regular(content)
                else:
                    blob = Blob.large(content)
                    change.added[path] = self.objects.setdefault(blob.sha256 or "", blob)
            return self.commit("main", change)

    def upload_mode(self, path: str, size: int, sample: bytes) -> str:
        """`lfs` or `regular`: by main's `.gitattributes`, else LFS for what is large or not text."""
        attributes = self.resolve("main").files.get(".gitattributes")
        lines = attributes.content.decode().splitlines() if attributes else []
        patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
        tracked = any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
        return "lfs" if tracked or size > REGULAR_FILE_LIMIT or b"\0" in sample else "regular"

    def _refs_under(self, prefix: str) -> dict[str, str]:
        return {ref.removeprefix(prefix): oid for ref, oid in self.refs.items() if ref.startswith(prefix)}

    def _make(self, head: str | None, change: Change) -> Commit:
        if change.parent not in (None, head):
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(self.history[head].files if head else {})
        for path in change.deleted:
            if files.pop(path, None) is None:
                raise RefusalError(404, f'Entry "{path}" does not exist', "EntryNotFound")
        files |= change.added
        tree = sorted((path, blob.oid) for path, blob in files.items())
        everything = [len(self.history), head, tree, change.title, secrets.token_hex(4)]
        oid = hashlib.sha1(json.dumps(everything).encode()).hexdigest()
        self.history[oid] = Commit(oid, head, MappingProxyType(dict(sorted(files.items()))), change.title)
        return self.history[oid]


class HubState:
    """Accounts and repositories, and who may do what. `lock` is held while a request changes anything."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.users: dict[str, User] = {}
        self.tokens: dict[str, Token] = {}
        self.publishers: dict[str, str] = {}  # repository -> identity of a CI job that may write to it
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}  # name of before -> name; whoever uses the former is sent on

    def add_token(self, value: str, user: str, role: str | Mapping[str, Iterable[str]]) -> None:
        """Give a token to a user; see `HubServer.add_user`."""
        if isinstance(role, str):
            self.tokens[value] = Token(value, user, role)
        else:
            scopes = {entity: frozenset(permissions) for entity, permissions in role.items()}
            self.tokens[value] = Token(value, user, "fineGrained", scopes)

    def exchange(self, resource: str, identity: str) -> str | None:
        """A new token for a CI job that a repository trusts."""
        if resource not in self.repositories or self.publishers.get(resource) != identity:
            return None
        access = f"hf_jwt_{secrets.token_urlsafe(32)}"
        self.add_token(access, namespace_of(resource), {resource: ["repo.write"]})
        return access

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

    def same_name(self, repo_id: str) -> str | None:
        """The repository whose name is this one, whatever its capitals."""
        return next((name for name in self.repositories if name.lower() == repo_id.lower()), None)

    def create_repository(self, repo_id: str, private: bool, token: Token | None) -> None:
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
        if self.same_name(repo_id):
            raise RefusalError(409, "You already created this model repo")
        self.repositories[repo_id] = Repository(private, self.lock, NEW_SPACE if "spaces/" in repo_id else None)

    def _may_see_private(self, repo_id: str, token: Token | None) -> bool:
        if token is None or not self.users[token.user].belongs_to(namespace_of(repo_id)):
            return False
        reading = ("repo.content.read", "repo.write")
        return token.role != "fineGrained" or any(token.permits(right, repo_id) for right in reading)
