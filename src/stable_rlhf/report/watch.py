"""A report that follows its run: a small server on this machine that makes the page anew when the run's files change.

It listens on loopback and answers only requests whose Host is this machine's: a page of another site that has its own
name resolve to 127.0.0.1 would otherwise read the run. Nothing is written into the run's folder.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stable_rlhf.errors import ConfigError, NoRunError, RunError
from stable_rlhf.report.html import rendered, waiting
from stable_rlhf.report.run import read_run
from stable_rlhf.runs import RunLock

HOST = "127.0.0.1"

NAMES = ("127.0.0.1", "localhost")
"""Hosts of a URL that mean this machine. The port may be another one: ssh forwards it from elsewhere."""

FILES = (
    "metrics.jsonl",
    "timings.jsonl",
    "incidents.jsonl",
    "evaluation.json",
    "starts.jsonl",
    "config.yaml",
    "completions",
)
"""What of a run's folder a report is made from."""

REQUEST_SECONDS = 10
"""Seconds that a client may take to send its request, so that one that never does holds no thread for ever."""


class LiveReport:
    """The page of a run and its version, made anew when a file of the run has changed or the run has begun or ended."""

    def __init__(self, run_dir: Path) -> None:
        self._path, self._lock = run_dir, threading.Lock()
        self._version, self._page = "", ""

    def version(self) -> str:
        """What the page depends on: times and sizes of the run's files, and whether a process trains there."""
        states: list[Any] = [RunLock(self._path).held_elsewhere()]
        for name in FILES:
            try:
                state = os.stat(self._path / name)
            except FileNotFoundError:
                states.append(None)
            else:
                states.append((state.st_mtime_ns, state.st_size))
        return json.dumps(states, separators=(",", ":"))

    def page(self) -> str:
        """The page; where the run cannot be shown yet, or a file of it is damaged, a page that says so."""
        with self._lock:
            version = self.version()  # before the files are read: what changes meanwhile is a newer version
            if version != self._version:
                try:
                    page = rendered(read_run(self._path), live=version)
                except NoRunError:
                    page = waiting(self._path.resolve().name, "the run has not done a step yet", live=version)
                except RunError as error:
                    page = waiting(self._path.resolve().name, str(error), live=version)
                self._version, self._page = version, page
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_SECONDS
    server_version, sys_version = "stable-rlhf", ""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        status, kind, content = self._content()
        body = content.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _content(self) -> tuple[HTTPStatus, str, str]:
        if _host(self.headers.get_all("Host", [])) not in NAMES:
            return HTTPStatus.FORBIDDEN, "text/plain", f"the host of the URL must be {' or '.join(NAMES)}\n"
        if self.path == "/":
            return HTTPStatus.OK, "text/html", self.server.report.page()
        if self.path == "/state":
            return HTTPStatus.OK, "application/json", json.dumps({"version": self.server.report.version()})
        return HTTPStatus.NOT_FOUND, "text/plain", "there are only / and /state here\n"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: a page that asks every two seconds would fill the terminal."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a client that is slow does not hold up Ctrl-C

    def __init__(self, port: int, report: LiveReport) -> None:
        self.report = report
        super().__init__((HOST, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away in the middle is not an error; every other one is shown with its traceback."""
        import sys

        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def watch(run_dir: Path, port: int, say: Callable[[str, bool], None], stopped: threading.Event) -> None:
    """Serves the report of a run until `stopped` is set. Port 0 takes a free one.

    `say` is given the address, and whether the run has begun: a folder that is not there yet, or is empty, is waited
    for. Raises NoRunError for a folder with something else in it, ConfigError for a port that cannot be had.
    """
    begun = any(os.path.isfile(run_dir / name) for name in ("config.yaml", "metrics.jsonl"))
    if not begun and os.path.exists(run_dir) and not _may_become_a_run(run_dir):
        raise NoRunError(f"{run_dir / 'metrics.jsonl'} does not exist: give the folder of a run, or of one to come")
    try:
        server = _Server(port, LiveReport(run_dir))
    except OSError as error:
        raise ConfigError(f"--port={port}: cannot be listened at ({error.strerror}); give another, or 0") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.2}, daemon=True)
        thread.start()
        say(f"http://{HOST}:{server.server_port}/", begun)
        stopped.wait()
        server.shutdown()
        thread.join()


def _may_become_a_run(folder: Path) -> bool:
    """Whether a folder without a run is empty but for what a start that failed leaves, or a process that is going to
    train has it already."""
    if not os.path.isdir(folder):
        return False
    return set(os.listdir(folder)) <= set(RunLock.FILES) or RunLock(folder).held_elsewhere()


def _host(given: list[str]) -> str | None:
    """The host of a request's one Host header, without its port; None for anything else."""
    try:
        return urlsplit(f"//{given[0]}").hostname if len(given) == 1 else None
    except ValueError:
        return None
