"""Signals and the lock inside one process: what waits for the end of a step, and what is put back afterwards."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from stable_rlhf.errors import ConfigError, Interrupted, RewardUnavailable
from stable_rlhf.runs.lock import RunLock
from stable_rlhf.training import stopping
from stable_rlhf.training.stopping import GracefulStop


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test does to them, they are put back."""
    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    signal.raise_signal(number)


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_outside_a_step_stops_at_once(number: signal.Signals) -> None:
    went_on: list[str] = []
    with pytest.raises(Interrupted, match=f"stopped by {number.name}") as raised, GracefulStop():  # noqa: PT012
        send(number)
        went_on.append("inside")
    assert (raised.value.signum, went_on) == (number, [])


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_a_signal_in_a_step_is_raised_at_its_end(number: signal.Signals) -> None:
    done: list[str] = []
    with pytest.raises(Interrupted), GracefulStop() as stop:  # noqa: PT012
        with stop.waiting():
            assert not stop.asked()
            send(number)
            assert stop.asked()
            done.append("the step")
        done.append("after it")
    assert done == ["the step"]
    assert not stop.asked()


def test_after_a_step_signals_stop_at_once_again() -> None:
    done: list[str] = []
    with pytest.raises(Interrupted), GracefulStop() as stop:  # noqa: PT012
        with stop.waiting():
            done.append("a step")
        send(signal.SIGTERM)
        done.append("after the signal")
    assert done == ["a step"]


def test_after_a_step_that_failed_signals_stop_at_once_again() -> None:
    done: list[str] = []
    with pytest.raises(Interrupted), GracefulStop() as stop:  # noqa: PT012
        with pytest.raises(KeyError), stop.waiting():
            raise KeyError
        send(signal.SIGTERM)
        done.append("after the signal")
    assert done == []


@pytest.mark.parametrize(
    ("first", "second", "at_once"),
    [
        (signal.SIGTERM, signal.SIGINT, True),
        (signal.SIGINT, signal.SIGINT, True),
        (signal.SIGINT, signal.SIGTERM, False),  # a supervisor's may come twice
        (signal.SIGTERM, signal.SIGTERM, False),
    ],
)
def test_only_a_second_signal_that_is_sigint_cuts_a_step(
    first: signal.Signals, second: signal.Signals, at_once: bool
) -> None:
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt) as raised, GracefulStop() as stop, stop.waiting():  # noqa: PT012
        send(first)
        send(second)
        done.append("the step")
    assert done == ([] if at_once else ["the step"])
    assert isinstance(raised.value, Interrupted) != at_once


def test_a_reward_server_that_is_away_is_the_reason_unless_a_signal_came() -> None:
    with pytest.raises(RewardUnavailable, match="away"), GracefulStop() as stop, stop.waiting():
        raise RewardUnavailable("away")
    with pytest.raises(Interrupted) as raised, GracefulStop() as stop, stop.waiting():  # noqa: PT012
        send(signal.SIGTERM)
        raise RewardUnavailable("away")
    assert isinstance(raised.value.__cause__, RewardUnavailable)


def test_handlers_are_put_back_and_an_ended_stop_is_not_asked_any_more() -> None:
    def handler(signum: int, frame: object) -> None:
        raise AssertionError("not called")

    for number in stopping.SIGNALS:
        signal.signal(number, handler)
    with pytest.raises(Interrupted), GracefulStop() as ended:
        send(signal.SIGTERM)
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == [handler, handler]
    assert not ended.asked()
    with GracefulStop() as stop, pytest.raises(Interrupted), stop.waiting():  # noqa: PT012
        send(signal.SIGINT)
        assert stop.asked()


def test_nobody_is_asked_to_stop_where_nobody_listens_or_no_signal_came() -> None:
    assert not GracefulStop().asked()
    with GracefulStop() as outer:
        assert not outer.asked()
        with pytest.raises(Interrupted), GracefulStop() as inner, inner.waiting():  # noqa: PT012
            send(signal.SIGTERM)
            assert inner.asked()
            assert not outer.asked()  # the signal went to the inner one


def test_a_stop_that_is_used_again_has_forgotten_its_signal() -> None:
    stop = GracefulStop()
    for _ in range(2):
        with pytest.raises(Interrupted), stop, stop.waiting():  # noqa: PT012
            assert not stop.asked()
            send(signal.SIGTERM)


# -- the lock -------------------------------------------------------------------------------------------------------


def is_free(folder: Path) -> bool:
    """As another process sees it: a lock of its own on the same file."""
    lock = FileLock(folder / ".lock", is_singleton=False)
    try:
        lock.acquire(timeout=0)
    except TimeoutError:
        return False
    lock.release()
    return True


def test_a_lock_that_is_taken_twice_is_free_after_one_release(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    lock.take()
    lock.take()
    assert not is_free(tmp_path / "run")
    assert (tmp_path / "run" / ".owner.json").exists()
    lock.release()
    assert is_free(tmp_path / "run")
    assert not (tmp_path / "run" / ".owner.json").exists()
    lock.release()  # once more does nothing


def test_a_lock_that_another_has_is_refused_at_once_with_its_owner(tmp_path: Path) -> None:
    one, other = RunLock(tmp_path), RunLock(tmp_path)
    one.take()
    for asks in (other.take, other.check):
        with pytest.raises(ConfigError, match=r"is in use by this process itself, by a run that was not ended; wait"):
            asks()
    owner = json.loads((tmp_path / ".owner.json").read_text())
    (tmp_path / ".owner.json").write_text(json.dumps({**owner, "pid": 1}))
    with pytest.raises(ConfigError, match=r"is in use by process 1 on .*, training since 20\d\d-"):
        other.take()
    (tmp_path / ".owner.json").write_text("torn")
    with pytest.raises(ConfigError, match="is in use by another process; wait for it"):
        other.take()
    one.release()
    other.take()
    assert not is_free(tmp_path)
    other.release()


def test_asking_after_a_run_leaves_nothing_behind(tmp_path: Path) -> None:
    RunLock(tmp_path / "run").check()
    assert not (tmp_path / "run").exists()
    (tmp_path / ".owner.json").write_text("{}")  # of a process that was killed
    RunLock(tmp_path).check()
    assert is_free(tmp_path)
    assert not (tmp_path / ".owner.json").exists()
