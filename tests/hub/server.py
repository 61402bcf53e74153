"""A Hugging Face Hub on loopback for the real huggingface_hub client.

    with HubServer() as hub:
        hub.add_user("alice", tokens={fake_token("write"): "write"})
        subprocess.run([...], env=hub.environment(tmp_path, fake_token("write")))
        assert "config.json" in hub.repo("alice/m").files()

The client reads its environment when it is imported: run it in a subprocess with `environment()`.

What is played where, for those who want to learn how the Hub talks: `api.py` the Hub's routes,
`state.py` its memory, `storage.py` the object store on another origin, `xet.py` Xet's content
store, `listener.py` the listeners, the request log and the faults.
What the client sends was recorded from huggingface_hub 2.4.0 and hf_xet 1.8.0; the refusals have the words of the
real service. Where the real answer is not known, the simplest plausible one is given.
"""

from __future__ import annotations

import math
import os
import re
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from tests.hub.api import HubApi
from tests.hub.listener import (
    LOOPBACK,
    Fault,
    Listener,
    RefusalError,
    Request,
    Response,
    Traffic,
    loopback_certificate,
)
from tests.hub.state import HubState, Repository, User
from tests.hub.storage import Storage
from tests.hub.xet import Cas


def fake_token(label: str) -> str:
    """A token of the real shape (`hf_` and 34 letters) that says what it is; the same for the same label."""
    return "hf_" + (re.sub("[^A-Za-z0-9]", "", label) + "ThisIsNoRealTokenItIsForTestsOnly" * 2)[:34]


WRITE, READ, STRANGER = fake_token("write"), fake_token("read"), fake_token("stranger")
ONE_REPO, WHOLE_ORG = fake_token("oneRepo"), fake_token("wholeOrg")
LFS_ONLY = {"HF_HUB_DISABLE_XET": "1"}


class HubServer:
    """The Hub and its two companions, the storage origin and Xet's CAS, each on a port of its own.

    Args:
        tls: serve HTTPS with a self-signed certificate; `environment` tells clients to trust it.
        xet: as huggingface.co has it; without it the token endpoints are 404.

    Attributes:
        endpoint: the address of the Hub, for HF_ENDPOINT.
        storage_url: the address of the storage origin.
        requests: the log of all requests to all three, in order of arrival.
    """

    def __init__(self, *, tls: bool = False, xet: bool = True) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hub-server-")
        self._certificate: Path | None = None
        context = None
        if tls:
            self._certificate, key = loopback_certificate(Path(self._folder.name))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._certificate, key)
        self._traffic = Traffic()
        self._state = HubState()
        storage = Storage(self._state)
        self._cas = Cas(self._state, storage)
        api = HubApi(self._state, storage, self._cas if xet else None)
        self._listeners = [
            Listener("hub", api.route, self._traffic, context),
            Listener("storage", storage.route, self._traffic, context),
            Listener("cas", self._cas.route, self._traffic, context),
        ]
        api.url, storage.url, self._cas.url = (listener.url for listener in self._listeners)
        self.endpoint, self.storage_url = api.url, storage.url
        self._dead_socket = socket.socket()
        self._dead_socket.bind((LOOPBACK, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if error is None and self._traffic.crashes:
            raise AssertionError("the test server crashed:\n" + "\n".join(self._traffic.crashes))

    def close(self) -> None:
        """Stop at once; clients that wait for an answer see their connection closed."""
        for listener in self._listeners:
            listener.close()
        self._dead_socket.close()
        self._folder.cleanup()

    # --- what is there

    def add_user(
        self,
        name: str,
        tokens: Mapping[str, str | Mapping[str, Iterable[str]]],
        orgs: Mapping[str, str] | None = None,
    ) -> None:
        """Add an account.

        Args:
            name: its name, which is also its namespace.
            tokens: token -> role, `write` or `read`; or, for a fine-grained token, a mapping from entity (user,
                organisation or `owner/name`) to permissions, e.g. `{"alice/m": ["repo.write"]}`.
            orgs: organisations it belongs to, with its role there: `admin`, `write`, `contributor` or `read`.
        """
        self._state.users[name] = User(name, orgs or {})
        for value, role in tokens.items():
            self._state.add_token(value, name, role)

    def add_repo(self, repo_id: str, files: Mapping[str, bytes] | None = None, *, private: bool = False) -> Repository:
        """Create a repository as its owner would on the website, with `files` in a second commit."""
        with self._state.lock:
            repository = Repository(private, self._state.lock)
            self._state.repositories[repo_id] = repository
            if files:
                repository.push(files)
            return repository

    def trust(self, repo_id: str, identity: str) -> None:
        """Make the CI job that shows this identity a trusted publisher of a repository."""
        self._state.publishers[repo_id] = identity

    def rename(self, repo_id: str, name: str) -> None:
        """Give a repository another name, as its owner would on the website; requests to the former are sent on."""
        with self._state.lock:
            self._state.repositories[name] = self._state.repositories.pop(repo_id)
            self._state.renamed[repo_id] = name

    def repo(self, repo_id: str) -> Repository:
        """The repository `owner/name`; KeyError where there is none."""
        return self._state.repositories[repo_id]

    @property
    def repos(self) -> list[str]:
        """The names of all repositories."""
        return list(self._state.repositories)

    @property
    def requests(self) -> list[Request]:
        """The log of all requests, in order of arrival."""
        return list(self._traffic.requests)

    def calls(self, method: str, path: str) -> list[Request]:
        """The logged requests with this method whose path matches the regular expression `path` somewhere."""
        return [one for one in self.requests if one.method == method and re.search(path, one.path)]

    # --- what goes wrong

    def fail(
        self,
        method: str | None = None,
        path: str = "",
        *,
        status: int | None = None,
        message: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        delay: float = 0.0,
        drop: Literal["before", "after"] | None = None,
        call: Callable[[], object] | None = None,
        times: float = math.inf,
    ) -> None:
        """Plan a fault, on any of the three ports; the first planned one that matches a request strikes.

        Args:
            method, path: for these requests only: a method, and a regular expression found somewhere in the path.
            status, message, code, headers, body: answer with this and do nothing; the message and code are the Hub's
                `X-Error-Message` and `X-Error-Code`, and the body takes the place of its JSON.
            delay: be silent for this many seconds first; `math.inf`: until the server is closed.
            drop: close the connection without an answer, `before` doing anything or `after` having done what was
                asked. With `after` and a `status` the client gets that status instead (a gateway's 504).
            call: run this first, in the server's thread, e.g. to push a commit in between or kill the client.
            times: strike this often.
        """
        response = None
        if status is not None:
            refusal = RefusalError(status, message or "", code).response()
            given = refusal.headers if message or code else {}
            response = Response(status, refusal.body if body is None else body, {**given, **(headers or {})})
        self._traffic.faults.append(Fault(method, re.compile(path), response, delay, drop, call, times))

    def mend(self) -> None:
        """Forget all planned faults."""
        self._traffic.faults.clear()

    def unplug_cas(self) -> None:
        """From now on clients are sent to a CAS whose port refuses connections."""
        self._cas.url = self.dead_url

    @property
    def dead_url(self) -> str:
        """An address on loopback that refuses connections as long as this server lives."""
        return f"http://{LOOPBACK}:{self._dead_socket.getsockname()[1]}"

    # --- how to reach it

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """A clean environment for a client process: nothing of the caller's tokens, caches or proxies.

        Args:
            home: an empty folder, which becomes the client's home; its cache is in there.
            token: what HF_TOKEN shall be, if it shall be there.
        """
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "HF_HOME": str(home / "huggingface"),
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": LOOPBACK,
            "HF_XET_DATA_XORB_COMPRESSION_POLICY": "none",  # our CAS cannot unpack LZ4
        }
        if self._certificate is not None:
            environment["SSL_CERT_FILE"] = str(self._certificate)
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment


def hub_with_people(**options: Any) -> HubServer:
    """A Hub where alice has every kind of token, writes for acme and reads for museum; and a stranger.

    Args:
        options: as for `HubServer`.
    """
    hub = HubServer(**options)
    alice: dict[str, Any] = {WRITE: "write", READ: "read"}
    alice[ONE_REPO] = {"alice/m": ["repo.write"]}
    alice[WHOLE_ORG] = {"acme": ["repo.content.read", "repo.write"]}
    hub.add_user("alice", tokens=alice, orgs={"acme": "write", "museum": "read", "club": "contributor"})
    hub.add_user("mallory", tokens={STRANGER: "write"})
    return hub
