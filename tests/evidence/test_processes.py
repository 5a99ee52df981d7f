"""How a cell's process starts and ends: its environment, its log, Ctrl-C, and the end of its sweep."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stable_rlhf.evidence.devices import Place
from stable_rlhf.evidence.processes import COMMAND, Processes, send

PYTHON = (sys.executable, "-c")
PATIENCE = 30.0


def until(true, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def ended(job) -> int:
    until(lambda: job.poll() is not None)
    return job.poll()


def test_a_cell_is_a_command_of_this_package_in_this_python() -> None:
    assert (sys.executable, "-P", "-m", "stable_rlhf") == COMMAND
    said = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True).stdout
    assert said.startswith("stable-rlhf ")


def test_a_cell_has_its_places_environment_and_its_output_is_appended_to_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    code = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['OMP_NUM_THREADS']); sys.exit('bad')"
    launcher = Processes([], PYTHON)
    assert ended(launcher.start([code], Place("3", 2), log)) == 1
    assert log.read_text() == "before\n3 2\nbad\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_cell_and_one_to_the_terminal_does_not(tmp_path: Path, number: int) -> None:
    job = Processes([], PYTHON).start(["import time; print('on'); time.sleep(60)"], Place(None, None), tmp_path / "log")
    until(lambda: b"on" in (tmp_path / "log").read_bytes())
    assert os.getpgid(job.pid) != os.getpgid(0)  # pyright: ignore
    send(job, number)
    assert ended(job) == (-number if number == signal.SIGTERM else -signal.SIGINT)
    send(job, number)  # to one that has ended


def test_a_cell_does_not_outlive_a_sweep_that_was_killed(tmp_path: Path) -> None:
    """A process starts a cell and is killed; the cell, which would sleep for a minute, ends too."""
    note, log = tmp_path / "pid", tmp_path / "log.txt"
    cell = f"import os, pathlib, time; pathlib.Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(60)"
    sweep = (
        "import sys, time\nfrom pathlib import Path\nfrom stable_rlhf.evidence.devices import Place\n"
        "from stable_rlhf.evidence.processes import Processes\n"
        f"Processes([], {PYTHON!r}).start([{cell!r}], Place(None, None), Path({str(log)!r}))\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", sweep])
    try:
        until(lambda: note.exists() and note.read_text())
        pid = int(note.read_text())
        assert psutil.pid_exists(pid)
    finally:
        process.kill()
        process.wait()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
