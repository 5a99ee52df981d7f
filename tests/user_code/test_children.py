"""Processes that rewards fork: they end by a signal, and never become a second run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context

import pytest

from stable_rlhf.training.stopping import GracefulStop
from stable_rlhf.user_code import RandomStream, Shield

SOON = 20.0
"""Seconds in which a child that is told to end has ended, on a busy machine."""


def status_of(child: int) -> int:
    """The exit status of a child; it is killed where it has not ended soon."""
    for _ in range(int(SOON / 0.02)):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def forked(act: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        act()
        os._exit(0)
    return child


def sleeps() -> None:
    time.sleep(3 * SOON)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_child_ends_by_the_signal_that_a_run_would_only_note(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with GracefulStop():
            child = forked(sleeps)
            os.kill(child, number)  # most likely before the child has run a line
            assert os.WTERMSIG(status_of(child)) == number
            assert signal.getsignal(number) is not signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_child_has_the_handlers_from_before_the_run_and_the_run_keeps_its_own() -> None:
    def handler(signum: int, frame: object) -> None:
        os._exit(23)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with GracefulStop() as stop, stop.waiting():
            child = forked(lambda: os._exit(7 if signal.getsignal(signal.SIGTERM) is handler else 8))
            assert os.waitstatus_to_exitcode(status_of(child)) == 7
            child = forked(sleeps)
            os.kill(child, signal.SIGTERM)
            assert os.waitstatus_to_exitcode(status_of(child)) == 23
            assert signal.getsignal(signal.SIGTERM) == stop._note
    finally:
        signal.signal(signal.SIGTERM, before)


def test_children_of_a_thread_and_of_a_preexec_end_too() -> None:
    with GracefulStop():
        children: list[int] = []
        thread = threading.Thread(target=lambda: children.append(forked(sleeps)))
        thread.start()
        thread.join()
        os.kill(children[0], signal.SIGTERM)
        assert os.WTERMSIG(status_of(children[0])) == signal.SIGTERM
        seen = "import signal; raise SystemExit(signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL)"
        assert subprocess.run([sys.executable, "-c", seen], preexec_fn=lambda: None).returncode == 0


def test_a_pool_and_a_terminated_process_are_not_waited_for_forever() -> None:
    with GracefulStop():
        began = time.monotonic()
        with get_context("fork").Pool(2) as pool:
            assert pool.map(abs, [-1, 2]) == [1, 2]
        process = get_context("fork").Process(target=sleeps)
        process.start()
        process.terminate()
        process.join(SOON)
        assert process.exitcode == -signal.SIGTERM
        assert time.monotonic() - began < SOON


def test_a_signal_that_comes_while_the_run_forks_is_noted() -> None:
    with GracefulStop() as stop, stop.waiting():
        run = os.getpid()
        for _ in range(20):
            child = forked(lambda: os.kill(run, signal.SIGTERM))
            status_of(child)
            assert stop.signum == signal.SIGTERM
            stop.signum = None


def test_a_stop_that_is_over_leaves_children_alone() -> None:
    with GracefulStop():
        pass
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        child = forked(lambda: os._exit(signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN))
        assert os.waitstatus_to_exitcode(status_of(child)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("leaves", "code"), [("returns", 0), ("exits", 3), ("exits with a text", 1), ("raises", 1)])
def test_a_child_that_leaves_its_function_ends_there(leaves: str, code: int, capfd: pytest.CaptureFixture) -> None:
    parent = os.getpid()
    children = []

    def reward() -> None:
        children.append(os.fork())
        if os.getpid() == parent or leaves == "returns":
            return
        if leaves == "raises":
            raise KeyError("gold")
        sys.exit(3 if leaves == "exits" else "that was all")

    def modes() -> None:
        if os.getpid() != parent:
            os._exit(98)  # it went through what the run puts back, which on a GPU a child cannot do

    try:
        with Shield(modes).around(RandomStream(0)):
            reward()
    finally:
        if os.getpid() != parent:
            os._exit(99)  # it came out
    assert os.waitstatus_to_exitcode(status_of(children[0])) == code
    assert ("KeyError: 'gold'" in capfd.readouterr().err) == (leaves == "raises")
