"""HTTP on loopback for the tests: listeners that log every request and fail when they are told to.

Nothing here knows the Hub. A `Listener` is one port with one routing function; the listeners of one
test server share a `Traffic`: the request log, the planned faults, and the signal that it is closing.
Only the standard library is used.
"""

from __future__ import annotations

import json
import math
import re
import socket
import ssl
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

LOOPBACK = "127.0.0.1"


@dataclass
class Request:
    """A request as a route sees it, and a line of the log."""

    listener: str  # which port it came to: `hub`, `storage` or `cas`
    method: str
    path: str  # without the query; still percent-encoded, for a branch name may hold `%2F`
    query: Mapping[str, str]
    headers: Message
    body: bytes
    status: int | None = None  # what was answered, if anything

    @property
    def token(self) -> str | None:
        """The bearer token, or None where there is none."""
        scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
        return token if scheme == "Bearer" else None

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass(frozen=True)
class Response:
    """What a route answers; Content-Length is added when it is sent."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


Route = tuple[str, str, Callable[..., Response]]  # method, regular expression of the whole path, what answers


def find_route(routes: Sequence[Route], method: str, path: str) -> tuple[Callable[..., Response], tuple[str, ...]]:
    """What answers a request, and the groups of its path.

    Raises:
        RefusalError: 404.
    """
    for one, pattern, handle in routes:
        if one == method and (found := re.fullmatch(pattern, path)):
            return handle, found.groups()
    raise RefusalError(404, "Sorry, we can't find the page you are looking for.")


def json_response(payload: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """An answer whose body is `payload` as JSON."""
    return Response(status, json.dumps(payload).encode(), {"Content-Type": "application/json", **(headers or {})})


def ranged_response(request: Request, content: bytes, headers: Mapping[str, str]) -> Response:
    """`content`, or the part of it that a `Range: bytes=FIRST-[LAST]` header asks for (206, or 416)."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    common = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    if asked is None:
        return Response(200, content, common)
    first = int(asked[1])
    last = min(int(asked[2] or len(content)), len(content) - 1)
    if first > last:
        return Response(416, b"", {**common, "Content-Range": f"bytes */{len(content)}"})
    part = content[first : last + 1]
    return Response(206, part, {**common, "Content-Range": f"bytes {first}-{last}/{len(content)}"})


class RefusalError(Exception):
    """A route says no: a status, the sentence that the client shows, the Hub's code for it, more of the JSON body."""

    def __init__(self, status: int, message: str, code: str | None = None, **extra: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.extra = status, message, code, extra

    def response(self) -> Response:
        """This refusal as the Hub words it."""
        headers = {"X-Error-Message": self.message}
        if self.code is not None:
            headers["X-Error-Code"] = self.code
        return json_response({"error": self.message, **self.extra}, self.status, headers)


@dataclass
class Fault:
    """A planned misbehaviour; `HubServer.fail` explains the members."""

    method: str | None
    path: re.Pattern[str]
    response: Response | None
    delay: float
    drop: Literal["before", "after"] | None
    call: Callable[[], object] | None
    times: float  # how often it will yet strike

    def strikes(self, request: Request) -> bool:
        """Whether this fault still has times left and is meant for `request`."""
        return self.times > 0 and self.method in (None, request.method) and self.path.search(request.path) is not None


class Traffic:
    """What the listeners of one server share: the log, the planned faults, and whether it is closing."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.crashes: list[str] = []  # tracebacks of the server's own defects; a test must not pass over them
        self.closing = threading.Event()
        self._lock = threading.Lock()

    def take_fault(self, request: Request) -> Fault | None:
        """The fault that strikes `request`, counted, or None."""
        with self._lock:
            fault = next((fault for fault in self.faults if fault.strikes(request)), None)
            if fault is not None:
                fault.times -= 1
            return fault


class Listener:
    """One port on loopback, served by daemon threads, HTTP/1.1 with kept-alive connections.

    `route` answers a request or raises `RefusalError`; it is called in several threads at once.
    """

    def __init__(
        self, name: str, route: Callable[[Request], Response], traffic: Traffic, tls: ssl.SSLContext | None
    ) -> None:
        self.name = name
        self.traffic = traffic
        self._route = route
        self._server = _Server(self, tls)
        self.url = f"{'https' if tls else 'http'}://{LOOPBACK}:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        """Stop: no new connection is taken, and whoever waits for an answer is cut off."""
        self.traffic.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: Request, fault: Fault | None) -> Response | None:
        """The answer to `request`, bent by `fault`; None: close the connection without a word."""
        if fault is None:
            return self._answer_soundly(request)
        if fault.call is not None:
            fault.call()
        if fault.delay:
            self.traffic.closing.wait(None if math.isinf(fault.delay) else fault.delay)
            if self.traffic.closing.is_set():
                return None
        if fault.drop == "before":
            return None
        if fault.drop == "after":
            self._answer_soundly(request)
            return fault.response
        return fault.response or self._answer_soundly(request)

    def _answer_soundly(self, request: Request) -> Response:
        try:
            return self._route(request)
        except RefusalError as refusal:
            return refusal.response()
        except Exception:
            self.traffic.crashes.append(f"{request.method} {request.path}\n{traceback.format_exc()}")
            return Response(500, b"the test server itself is broken; see Traffic.crashes")


class _Server(ThreadingHTTPServer):
    """The socket side of a `Listener`."""

    request_queue_size = 64

    def __init__(self, listener: Listener, tls: ssl.SSLContext | None) -> None:
        self.listener = listener
        self._tls = tls
        super().__init__((LOOPBACK, 0), _Handler)

    def server_bind(self) -> None:
        # HTTPServer would ask the name service who 127.0.0.1 is
        TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        if self._tls is not None:  # the handshake happens at the first read, in the connection's own thread
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that goes away is none of our defects
            self.listener.traffic.crashes.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    """Reads one request after another from a connection and sends what the listener answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        target = urlsplit(self.path)
        query = dict(parse_qsl(target.query, keep_blank_values=True))
        listener = self.server.listener
        request = Request(listener.name, self.command, target.path, query, self.headers, self._read_body())
        listener.traffic.requests.append(request)
        response = listener.answer(request, listener.traffic.take_fault(request))
        if response is None:
            self.close_connection = True
            return
        request.status = response.status  # before it is sent: whoever has the answer finds it in the log
        self._send(response)

    def _read_body(self) -> bytes:
        assert "Transfer-Encoding" not in self.headers, "the client sends no body in chunks"
        size = int(self.headers.get("Content-Length", "0"))
        data = self.rfile.read(size)
        if len(data) < size:  # the client was killed while it sent: nothing of this request may happen
            raise ConnectionResetError("the client closed the connection inside a request body")
        return data

    def _send(self, response: Response) -> None:
        self.send_response_only(response.status)
        for name in {"Date"} - response.headers.keys():
            self.send_header(name, self.date_time_string())
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """Nothing on stderr: the log is `Traffic.requests`."""


for _method in ("GET", "HEAD", "POST", "PUT", "DELETE"):  # the names by which http.server looks for them
    setattr(_Handler, f"do_{_method}", _Handler._serve)


def loopback_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a self-signed certificate for 127.0.0.1 with the `openssl` program.

    Returns:
        The paths of the certificate (clients name it in SSL_CERT_FILE) and of its private key.
    """
    certificate, key, config = folder / "certificate.pem", folder / "key.pem", folder / "openssl.cnf"
    config.write_text(
        "[req]\nprompt = no\ndistinguished_name = name\nx509_extensions = extensions\n"
        "[name]\nCN = loopback test certificate\n"
        "[extensions]\nsubjectAltName = IP:127.0.0.1\nbasicConstraints = critical, CA:FALSE\n"
    )
    make = ["openssl", "req", "-x509", "-config", str(config), "-days", "2", "-nodes"]
    make += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return certificate, key
