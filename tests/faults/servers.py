"""A reward server that misbehaves as it is told to, on a real socket of the loopback."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeAlias

DRIP_SECONDS = 0.01


class Handler(BaseHTTPRequestHandler):
    """One request. `sent` is its JSON."""

    protocol_version = "HTTP/1.1"
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    sent: dict[str, Any]

    def do_POST(self) -> None:
        self.sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            act = self.server.acts[min(len(self.server.requests), len(self.server.acts) - 1)]
            self.server.requests.append(self.sent)
            self.server.headers.append(dict(self.headers))
        act(self)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def give(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def begin(self, length: int) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.flush()


Act: TypeAlias = Callable[[Handler], None]


class Server(ThreadingHTTPServer):
    """acts: what is done with each request in turn, and the last of them with all that follow."""

    daemon_threads = True

    def __init__(self, *acts: Act, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.acts = acts
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.released = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/get_reward"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # a client that has gone is no error of the server's


@contextmanager
def misbehaving(*acts: Act, port: int = 0) -> Iterator[Server]:
    """``port`` 0 is any that is free."""
    server = Server(*acts, port=port)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def score(handler: Handler) -> None:
    """The right thing: the length of each query."""
    handler.give(200, json.dumps({"rewards": [len(query) for query in handler.sent["query"]]}).encode())


def answer(body: object, status: int = 200, **headers: str) -> Act:
    """That answer, whatever was asked: bytes as they are, anything else as JSON."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda handler: handler.give(status, raw, **headers)


def hang(handler: Handler) -> None:
    """Nothing at all, until the test is over."""
    handler.close_connection = True
    handler.server.released.wait()


def close(handler: Handler) -> None:
    """The connection ends without an answer."""
    handler.close_connection = True


def die(handler: Handler) -> None:
    """The server ends, with the connection: nobody listens any more."""
    handler.close_connection = True
    handler.server.shutdown()
    handler.server.server_close()


def cut(handler: Handler) -> None:
    """The connection ends inside the answer."""
    handler.begin(length=1000)
    handler.wfile.write(b'{"rewards": [1')
    handler.close_connection = True


def drip(handler: Handler) -> None:
    """A byte of the answer at a time, for ever: no read of the client takes long."""
    handler.begin(length=10**9)
    while not handler.server.released.wait(DRIP_SECONDS):
        handler.wfile.write(b" ")
        handler.wfile.flush()


def drip_headers(handler: Handler) -> None:
    """A byte of a header at a time, for ever."""
    handler.close_connection = True
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not handler.server.released.wait(DRIP_SECONDS):
        handler.wfile.write(b"x")
        handler.wfile.flush()


def flood(handler: Handler) -> None:
    """An answer that begins well, and never ends."""
    handler.begin(length=10**12)
    handler.wfile.write(b'{"rewards": [')
    while not handler.server.released.is_set():
        handler.wfile.write(b"1," * 32_768)
