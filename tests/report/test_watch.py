"""report --watch: what the server answers, to whom, and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stable_rlhf.cli.main import main
from stable_rlhf.errors import ConfigError, NoRunError
from stable_rlhf.report.watch import watch
from tests.report.test_report import fake_rows, fake_run


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """(a run that has not done a step, the port at which it is served)."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("max_steps: 3\n")
    stopped, told, said = threading.Event(), threading.Event(), list[str]()

    def say(address: str, begun: bool) -> None:
        assert begun
        said.append(address)
        told.set()

    thread = threading.Thread(target=watch, args=(run, 0, say, stopped))
    thread.start()
    assert told.wait(10)
    yield run, int(said[0].rsplit(":", 1)[1].strip("/"))
    stopped.set()
    thread.join(10)
    assert not thread.is_alive()


def asked(port: int, path: str = "/", method: str = "GET", host: str | None = "localhost") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if host is not None:
        connection.putheader("Host", host)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode("utf-8")
    connection.close()
    return answer.status, body


def version(port: int) -> str:
    return json.loads(asked(port, "/state")[1])["version"]


def test_the_page_waits_for_the_first_step_and_follows_the_run(served: tuple[Path, int]) -> None:
    run, port = served
    status, page = asked(port)
    assert (status, "the run has not done a step yet" in page) == (200, True)
    assert "connect-src 'self'" in page
    first = version(port)
    assert version(port) == first
    (run / "metrics.jsonl").write_text('{"step": 0, "objective/scores": 0.5}\n{"st')  # a row and a half
    second = version(port)
    assert second != first
    page = asked(port)[1]
    assert "Stopped before its end: 1 of 3 steps." in page
    assert f'data-version="{second.replace(chr(34), "&#34;")}"' in page
    (run / "metrics.jsonl").write_text('{"step": 0}\nnothing\n{"step": 2}\n')
    assert "metrics.jsonl:2: not a JSON object" in asked(port)[1]
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "metrics.jsonl"]  # nothing is written


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:80", "", None, "[", "0.0.0.0"]
)
def test_a_page_of_another_site_reads_nothing(served: tuple[Path, int], host: str | None) -> None:
    """A name of its own that resolves to this machine is what it would have in Host."""
    for path in ("/", "/state"):
        status, body = asked(served[1], path, host=host)
        assert (status, "version" in body, "<main" in body) == (403, False, False)


def test_this_machines_names_are_answered_by_any_port(served: tuple[Path, int]) -> None:
    for host in ("localhost", "127.0.0.1", f"127.0.0.1:{served[1]}", "LOCALHOST:9"):  # 9: forwarded by ssh
        assert asked(served[1], host=host)[0] == 200


def test_nothing_else_is_served_and_nothing_is_changed(served: tuple[Path, int]) -> None:
    _, port = served
    for path in ("/config.yaml", "/../config.yaml", "/state/", "http://localhost/"):
        assert asked(port, path)[0] == 404
    for method in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert asked(port, method=method)[0] == 501
    assert asked(port, method="HEAD") == (200, "")


def test_it_listens_on_loopback_only(served: tuple[Path, int]) -> None:
    with socket.socket() as other, pytest.raises(OSError, match="refused"):
        other.connect(("127.0.0.2", served[1]))  # would be accepted by a server on all addresses


def test_a_port_that_is_taken_and_a_folder_that_is_no_run_cost_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a run")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(NoRunError, match="give the folder of a run, or of one to come"):
            watch(path, 0, print, threading.Event())
    (tmp_path / "config.yaml").write_text("max_steps: 3\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"--port={port}: cannot be listened at \(Address already in use\)"):
            watch(tmp_path, port, print, threading.Event())


def test_a_port_without_watch_or_out_of_range_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--port", "80"]) == 2
    assert "--port=80: has no effect without --watch" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--watch", "--port", "65536"]) == 2
    assert "--port=65536: give 1 to 65535" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_command_says_where_it_serves_and_ends_with_its_signal(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    run = fake_run(tmp_path / "run", fake_rows(2))
    command = [sys.executable, "-m", "stable_rlhf", "report", str(run), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"stable-rlhf report: {run} at http://127.0.0.1:")
        port = int(line.split("127.0.0.1:")[1].split("/")[0])
        assert "Finished: 2 steps." in asked(port)[1]
        os.kill(process.pid, number)
        assert process.wait(20) == code
        assert process.stderr is not None
        assert process.stderr.read().strip() == ""


@pytest.mark.parametrize("there", [None, [], [".lock", ".owner.json"]])
def test_a_run_that_has_not_begun_is_waited_for(tmp_path: Path, there: list[str] | None) -> None:
    run = tmp_path / "runs" / "to-come"
    if there is not None:
        run.mkdir(parents=True)
    for name in there or []:  # what a start that was killed leaves
        (run / name).touch()
    command = [sys.executable, "-m", "stable_rlhf", "report", str(run), "--watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.endswith("/ (there is no run yet, the page waits for it; Ctrl-C ends it)\n")
            port = int(line.split("127.0.0.1:")[1].split("/")[0])
            assert "the run has not done a step yet" in asked(port)[1]
            before = version(port)
            shutil.copytree(fake_run(tmp_path / "made", fake_rows(2)), run, dirs_exist_ok=True)
            assert version(port) != before
            assert "Finished: 2 steps." in asked(port)[1]
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
