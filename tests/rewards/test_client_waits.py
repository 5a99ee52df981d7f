"""Rewards from a server: how long it is waited for, what Retry-After says, and a wait that a stop ends."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import format_datetime
from typing import Any

import pytest

from stable_rlhf.config.sections import RewardConfig
from stable_rlhf.errors import Interrupted, RewardUnavailable
from stable_rlhf.rewards import client
from stable_rlhf.rewards.client import RemoteReward, remote_reward
from stable_rlhf.training.stopping import GracefulStop
from tests.faults import servers
from tests.faults.servers import answer, misbehaving, score
from tests.rewards.test_client import asked

SOON = 10.0
"""Seconds that a wait which must not be waited has ended in, however busy the machine is."""


# -- Retry-After ----------------------------------------------------------------------------------------------------


def asked_to_wait(header: str) -> float:
    """Seconds that a refusal with this header is taken to ask for."""
    with misbehaving(answer(b"", 503, Retry_After=header)) as server, pytest.raises(RewardUnavailable) as caught:
        asked(server.url, retries=0)
    return getattr(caught.value.__cause__, "after")  # noqa: B009  it is the cause's own


def from_now(seconds: float, zone: datetime.timezone | None) -> str:
    """A date as a header has it: with the zone's distance, or with -0000 or nothing, which are UTC."""
    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
    return format_datetime(moment.astimezone(zone) if zone else moment.replace(tzinfo=None))


@pytest.mark.parametrize(
    "zone",
    [
        datetime.UTC,
        datetime.timezone(datetime.timedelta(hours=9)),
        datetime.timezone(datetime.timedelta(hours=-7)),
        None,
    ],
    ids=["UTC", "ahead", "behind", "none"],
)
def test_a_date_is_waited_for_whatever_its_time_zone(zone: datetime.timezone | None) -> None:
    assert asked_to_wait(from_now(7200.0, zone)) == pytest.approx(7200.0, abs=SOON)


def test_a_date_without_any_time_zone_is_one_in_utc() -> None:
    assert asked_to_wait(from_now(7200.0, None).removesuffix(" -0000")) == pytest.approx(7200.0, abs=SOON)


@pytest.mark.parametrize("zone", [datetime.UTC, None])
def test_a_date_that_is_past_asks_for_no_wait_and_never_for_a_negative_one(zone: datetime.timezone | None) -> None:
    assert asked_to_wait(from_now(-7200.0, zone)) == 0.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        (" 7 ", 7.0),
        ("0", 0.0),
        ("soon", 0.0),
        ("-7", 0.0),
        ("7.5", 0.0),
        ("", 0.0),
        ("\xb2", 0.0),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 0.0),
    ],
)
def test_seconds_are_waited_for_and_what_is_neither_is_not(header: str, seconds: float) -> None:
    assert asked_to_wait(header) == seconds


# -- pauses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("timeout", "max_wait"), [(0.1, 1.0), (1.0, 0.1)])
def test_a_request_ends_at_the_nearer_of_its_own_and_the_whole_bound(timeout: float, max_wait: float) -> None:
    ended = pytest.raises(RewardUnavailable, match=r"no whole answer within 0\.(1|0\d+) s")
    with misbehaving(servers.hang) as server, ended:
        asked(server.url, timeout=timeout, max_wait=max_wait, retries=0)


def test_the_first_pause_is_between_half_and_all_of_what_was_given() -> None:
    """Sixteen requests, four at a time, each refused once: none comes back before half of the pause is over."""
    came: dict[str, list[float]] = {}

    def once(handler: servers.Handler) -> None:
        times = came.setdefault(handler.sent["prompts"][0], [])
        times.append(time.monotonic())
        score(handler) if len(times) > 1 else answer(b"", 500)(handler)

    async def at_once(url: str, names: list[str]) -> list[Any]:
        rewards = [RemoteReward(url, first_pause=0.4, retries=1) for _ in names]
        return await asyncio.gather(*(reward([name], ["x"]) for reward, name in zip(rewards, names, strict=True)))

    with misbehaving(once) as server:
        for names in ("abcd", "efgh", "ijkl", "mnop"):
            assert asyncio.run(at_once(server.url, list(names))) == [[2.0]] * 4
    pauses = [second - first for first, second in came.values()]
    assert len(pauses) == 16
    assert min(pauses) > 0.2 * 0.98  # less what the server took to notice the first of the two


def test_pauses_double_to_the_longest_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten doublings of 0.02 s would take 10 s at least."""
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.05)
    began = time.monotonic()
    with misbehaving(*[answer(b"", 500)] * 10, score) as server:
        assert asked(server.url, first_pause=0.02, retries=10) == [2.0, 3.0]
    assert time.monotonic() - began < 0.01 * (2**10 - 1) - 1


def test_what_the_server_asks_for_is_waited_where_it_is_longer_than_the_pause() -> None:
    came: list[float] = []

    def timed(act: servers.Act) -> servers.Act:
        def noted(handler: servers.Handler) -> None:
            came.append(time.monotonic())
            act(handler)

        return noted

    with misbehaving(timed(answer(b"", 503, Retry_After="1")), timed(score)) as server:
        asked(server.url, first_pause=0.002)
    assert came[1] - came[0] >= 0.98
    came.clear()
    with misbehaving(timed(answer(b"", 503, Retry_After="1")), timed(score)) as server:
        asked(server.url, first_pause=4.0)
    assert came[1] - came[0] >= 1.98  # half of the pause


def test_the_bound_on_the_wait_holds_for_the_pauses_of_a_later_batch_too() -> None:
    """The first batch takes 1.2 of 3 s: a pause of 2 s that would have fitted at the start is not begun any more."""

    def slow(handler: servers.Handler) -> None:
        time.sleep(1.2)
        score(handler)

    with misbehaving(slow, answer(b"", 503, Retry_After="2")) as server:
        with pytest.raises(RewardUnavailable, match=r"2 tries in .*HTTP 503"):
            asked(server.url, "ab", "xy", batch_size=1, max_wait=3.0, retries=9)
        assert len(server.requests) == 2


def test_tries_are_those_of_all_batches() -> None:
    acts = [score, answer(b"", 500), score, answer(b"", 500), answer(b"", 404)]
    with misbehaving(*acts) as server, pytest.raises(RewardUnavailable, match="gave no scores, 5 tries in "):
        asked(server.url, "abc", "xyz", batch_size=1)


@pytest.mark.parametrize(("retries", "requests"), [(0, 1), (1, 2), (5, 3)])
def test_the_trial_makes_at_most_two_retries_and_no_more_than_are_allowed(retries: int, requests: int) -> None:
    with misbehaving(answer(b"", 503, Retry_After="0")) as server:
        with pytest.raises(RewardUnavailable, match="a trial before the run begins, of at most 2 retries"):
            RemoteReward(server.url, retries=retries).probe()
        assert len(server.requests) == requests


@pytest.mark.parametrize("bound", ["timeout", "max_wait"])
def test_the_trial_takes_no_longer_than_a_request_may(bound: str) -> None:
    with misbehaving(servers.hang) as server:
        began = time.monotonic()
        with pytest.raises(RewardUnavailable, match="no whole answer within 0"):
            RemoteReward(server.url, **{"retries": 0, bound: 0.1}).probe()  # type: ignore[arg-type]
        assert time.monotonic() - began < SOON


def test_the_trial_sends_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    with misbehaving(score) as server:
        RemoteReward(server.url, token_env="REWARD_TOKEN").probe()
    assert server.headers[0]["Authorization"] == "Bearer s3cret"


@pytest.mark.parametrize("status", [301, 308, 401, 403, 405])
def test_a_trial_without_the_data_sets_columns_still_needs_the_right_address_and_token(status: int) -> None:
    with misbehaving(answer(b"", status)) as server, pytest.raises(RewardUnavailable, match=f"HTTP {status}"):
        RemoteReward(server.url, columns=["labels"], retries=0).probe()


def test_a_servers_batches_are_of_the_configured_size() -> None:
    with misbehaving(score) as server:
        function = remote_reward(server.url, RewardConfig(url=server.url, batch_size=3)).function
        assert asyncio.run(function(list("abcd"), ["", "x", "xx", "xxx"])) == [1.0, 2.0, 3.0, 4.0]
    assert [len(request["query"]) for request in server.requests] == [3, 1]


# -- what a person is told, once ------------------------------------------------------------------------------------


def test_a_long_silence_is_told_once_before_the_pause_that_makes_it_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "SILENT", 0.3)
    acts = [answer(b"", 503), *[answer(b"", 503, Retry_After="1")] * 2, score]
    with misbehaving(*acts) as server:
        assert asked(server.url, first_pause=0.002) == [2.0, 3.0]
    bound = "at most reward.max_wait=600 s"
    assert capsys.readouterr().err == (
        f"the reward server {server.url} gives no scores (HTTP 503: ''); waiting, {bound}\n"
    )


def test_a_silence_that_a_pause_will_make_is_told_before_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The only pause: nothing would be told later."""
    monkeypatch.setattr(client, "SILENT", 0.9)
    with misbehaving(answer(b"", 503, Retry_After="1"), score) as server:
        asked(server.url, first_pause=0.002)
    assert "gives no scores (HTTP 503: ''); waiting" in capsys.readouterr().err


# -- a run that is asked to stop ------------------------------------------------------------------------------------


@contextmanager
def stopped_after(seconds: float) -> Iterator[Callable[[], bool]]:
    """SIGTERM to this process that soon, while a step is in hand; Interrupted at its end, as in a run. Gives whether
    the run is asked to stop."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted), GracefulStop() as stop:  # noqa: PT012
        timer.start()
        try:
            with stop.waiting():
                yield stop.asked
                timer.join()
        finally:
            timer.cancel()


def test_a_first_request_is_answered_although_the_run_is_asked_to_stop() -> None:
    def slow(handler: servers.Handler) -> None:
        time.sleep(1.0)
        score(handler)

    scores: list[Any] = []
    with misbehaving(slow) as server, stopped_after(0.2) as stopping:
        scores += asked(server.url, stopping=stopping)
    assert scores == [2.0, 3.0]


def test_a_pause_ends_where_the_run_is_asked_to_stop() -> None:
    began = time.monotonic()
    with misbehaving(answer(b"", 503, Retry_After="30")) as server, stopped_after(0.3) as stopping:
        asked(server.url, stopping=stopping)
    assert time.monotonic() - began < SOON
    assert len(server.requests) == 1


def test_a_request_that_is_made_again_ends_where_the_run_is_asked_to_stop() -> None:
    began = time.monotonic()
    with misbehaving(answer(b"", 503), servers.hang) as server, stopped_after(1.0) as stopping:
        asked(server.url, timeout=30.0, stopping=stopping)
    assert time.monotonic() - began < SOON
    assert len(server.requests) == 2


def test_no_further_request_is_made_once_the_run_is_asked_to_stop() -> None:
    with misbehaving(answer(b"", 503, Retry_After="1")) as server, stopped_after(0.2) as stopping:
        asked(server.url, stopping=stopping)
    assert len(server.requests) == 1


# -- a refusal ------------------------------------------------------------------------------------------------------


def test_a_refusal_is_not_read_further_than_is_shown_of_it() -> None:
    """It begins with more than is read of one, and never ends."""

    def endless(handler: servers.Handler) -> None:
        handler.send_response(503)
        handler.send_header("Content-Length", str(10**9))
        handler.end_headers()
        handler.wfile.write(b"busy " * 2000)
        handler.wfile.flush()
        handler.close_connection = True
        handler.server.released.wait()

    with misbehaving(endless) as server, pytest.raises(RewardUnavailable, match="HTTP 503: 'busy busy "):
        asked(server.url, timeout=3.0, retries=0)
