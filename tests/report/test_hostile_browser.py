"""A report full of payloads, opened in Chromium: nothing runs or is fetched; where they are not escaped, they do."""

from __future__ import annotations

import http.server
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_hostile_text import ACTED, MARKUP, everywhere


@pytest.fixture
def requests() -> Iterator[tuple[int, list[str]]]:
    """(a port of this machine, the requests that came to it)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server.server_port, asked
        server.shutdown()
        thread.join()


def opened(chromium: str, page: Path, profile: Path, *more: str) -> str:
    """The page as the browser has it after two seconds of its own time, scripts and requests done."""
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --virtual-time-budget=2000 --dump-dom"
    )
    done = subprocess.run(
        [chromium, *flags.split(), *more, f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout.decode("utf-8", "replace")


def test_nothing_runs_or_is_fetched_when_a_browser_opens_the_report(
    chromium: str, tmp_path: Path, requests: tuple[int, list[str]]
) -> None:
    port, asked = requests
    dom = opened(chromium, everywhere(tmp_path / "run", port), tmp_path / "profile")
    assert "stable-rlhf report</title>" in dom  # it was opened
    assert "&lt;svg onload=" in dom
    assert "data-acted" not in dom.split("<body")[0]
    assert "ACTED</title>" not in dom
    assert asked == []


def test_the_same_payloads_do_act_where_they_are_not_escaped(
    chromium: str, tmp_path: Path, requests: tuple[int, list[str]]
) -> None:
    """Otherwise the test above would show nothing. With the report's Content-Security-Policy they are stopped again."""
    port, asked = requests
    head, body = everywhere(tmp_path / "run", port).read_text(encoding="utf-8").split("<body>", 1)
    (policy,) = re.findall(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", head)
    acts = [payload for payload in MARKUP if ACTED in payload]
    named = [payload.replace("data-acted", f"data-acted-{number}") for number, payload in enumerate(acts)]
    torn = f"<body>{''.join(named).replace('PORT', str(port))}"
    (tmp_path / "open.html").write_text(head.replace(policy, "") + torn + body, encoding="utf-8")
    (tmp_path / "closed.html").write_text(head + torn + body, encoding="utf-8")
    dom = opened(chromium, tmp_path / "open.html", tmp_path / "one")
    assert sorted(re.findall(r'data-acted-(\d)="1"', dom.split("<head")[0])) == ["0", "1", "2", "3"]
    assert sorted(asked) == ["/fetch", "/svg"]
    asked.clear()
    assert "data-acted" not in opened(chromium, tmp_path / "closed.html", tmp_path / "two").split("<head")[0]
    assert asked == []
