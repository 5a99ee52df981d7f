"""Rewards from a server: what is sent, what is accepted, and how long a server that misbehaves is put up with."""

from __future__ import annotations

import asyncio
import datetime
import random
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.config.sections import RewardConfig
from stable_rlhf.errors import RewardError, RewardUnavailable
from stable_rlhf.rewards.client import RemoteReward, remote_reward
from tests.faults import servers
from tests.faults.servers import answer, misbehaving, score

CHAT = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]
ANSWER = [{"role": "assistant", "content": "Hi!"}]
SOON = 5.0
"""Seconds that nothing below may take: far above what it takes, far below the time-outs and pauses it must not wait."""


def asked(
    url: str,
    prompts: Any = ("a", "b"),
    completions: Any = ("x", "yy"),
    data: dict[str, Any] | None = None,
    **given: Any,
) -> list[float | None]:
    """What a RemoteReward answers, with pauses of milliseconds; data: the other columns."""
    reward = RemoteReward(url, **{"first_pause": 0.002, "timeout": 10.0, "retries": 3, **given})
    return asyncio.run(reward(list(prompts), list(completions), **(data or {})))


# -- protocol -------------------------------------------------------------------------------------------------------


def test_a_request_holds_the_whole_texts_and_the_prompts() -> None:
    with misbehaving(score) as server:
        assert asked(server.url, data={"labels": [1, 2]}) == [2.0, 3.0]
    assert server.requests == [{"query": ["ax", "byy"], "prompts": ["a", "b"]}]
    assert server.headers[0]["Content-Type"] == "application/json"
    assert "Authorization" not in server.headers[0]


def test_a_chat_is_sent_as_text_and_as_messages() -> None:
    with misbehaving(score) as server:
        asked(server.url, [CHAT, "a"], [ANSWER, "x"])
    prompt = "\n\nSystem: Be kind.\n\nHuman: Hello?\n\nAssistant:"
    (sent,) = server.requests
    assert sent["query"] == [prompt + " Hi!", "ax"]
    assert sent["prompts"] == [prompt, "a"]
    assert sent["messages"] == [CHAT + ANSWER, None]


def test_batches_are_sent_one_after_the_other_and_scores_keep_their_order() -> None:
    completions = ["x" * n for n in (4, 1, 3, 5, 2)]
    with misbehaving(score) as server:
        assert asked(server.url, "abcde", completions, batch_size=2) == [5.0, 2.0, 4.0, 6.0, 3.0]
    assert [request["prompts"] for request in server.requests] == [["a", "b"], ["c", "d"], ["e"]]


def test_null_is_no_score_and_other_fields_of_an_answer_do_not_matter() -> None:
    openrlhf = {"rewards": [None, -0.5], "scores": [7, 7], "extra_logs": {"dummy_scores": [7, 7]}}
    with misbehaving(answer(openrlhf)) as server:
        assert asked(server.url) == [None, -0.5]


def test_chosen_columns_are_sent_in_their_batches() -> None:
    with misbehaving(score) as server:
        columns = {"labels": [1, "two", None], "secret": [1, 2, 3]}
        asked(server.url, "abc", "xyz", columns, columns=["labels"], batch_size=2)
        assert [request["labels"] for request in server.requests] == [[1, "two"], [None]]
        assert all("secret" not in request for request in server.requests)
        with pytest.raises(
            RewardError, match=r"reward\.columns=\['answer'\]: the data set has no column 'answer'; it has labels"
        ):
            asked(server.url, data={"labels": [1, 2]}, columns=["answer"])
        for value in (datetime.date(2026, 1, 1), float("nan")):
            with pytest.raises(RewardError, match=r"reward\.columns names 'labels', which JSON cannot hold"):
                asked(server.url, data={"labels": [1, value]}, columns=["labels"])


def test_the_token_comes_from_the_environment_and_is_shown_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cret")
    with misbehaving(score, answer({}, 401)) as server:
        config = RewardConfig(url=server.url, token_env="REWARD_TOKEN")
        reward = remote_reward(server.url, config).function
        asyncio.run(reward(["a"], ["x"]))
        assert server.headers[0]["Authorization"] == "Bearer s3cret"
        with pytest.raises(RewardUnavailable, match="HTTP 401") as caught:
            asyncio.run(reward(["a"], ["x"]))
    assert "s3cret" not in str(caught.value) + repr(config)
    for value, message in (
        ("", "no such environment variable is set"),
        ("a b", "spaces"),
        ("a\nb: c", "other characters"),
    ):
        monkeypatch.setenv("REWARD_TOKEN", value)
        with pytest.raises(RewardError, match=rf"reward\.token_env='REWARD_TOKEN': .*{message}"):
            remote_reward(server.url, config)


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with misbehaving(score) as server:
        assert asked(server.url, retries=0) == [2.0, 3.0]


# -- what passes, and what does not ---------------------------------------------------------------------------------

PASSING = {
    "500": answer({"error": "restarting"}, 500),
    "503": answer(b"", 503),
    "429": answer(b"slow down", 429),
    "408": answer(b"", 408),
    "425": answer(b"", 425),
    "no JSON": answer(b"<html>welcome</html>"),
    "nested without end": answer(b"[" * 100_000),
    "not UTF-8": answer(b"\xff\xfe\xfd"),
    "no object": answer([1.0, 2.0]),
    "no rewards": answer({"error": "loading"}),
    "one reward for all": answer({"rewards": 1.0}),
    "too few": answer({"rewards": [1.0]}),
    "too many": answer({"rewards": [1.0, 2.0, 3.0]}),
    "nothing": answer(b""),
    "closed": servers.close,
    "cut": servers.cut,
}


@pytest.mark.parametrize("act", PASSING.values(), ids=PASSING)
def test_a_failure_that_may_pass_is_tried_again(act: servers.Act) -> None:
    with misbehaving(act, act, score) as server:
        assert asked(server.url) == [2.0, 3.0]
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


LASTING = {
    "400": (answer({"detail": "no field text"}, 400), r'HTTP 400: \'{"detail": "no field text"}\''),
    "401": (answer(b"", 401), "HTTP 401"),
    "404": (answer(b"\x1b[2Jgone", 404), r"HTTP 404: '\\x1b\[2Jgone'"),
    "422": (answer(b"", 422), "HTTP 422"),
    "encoded": (answer(b"", Content_Encoding="gzip"), "in the encoding 'gzip'"),
}


@pytest.mark.parametrize(("act", "message"), LASTING.values(), ids=LASTING)
def test_a_refusal_ends_it_at_once(act: servers.Act, message: str) -> None:
    with misbehaving(act) as server, pytest.raises(RewardUnavailable, match=message) as caught:
        asked(server.url)
    assert len(server.requests) == 1
    assert str(caught.value).isprintable()


WRONG = ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, '"1.0"', "true", "[0.1]", "{}"]


@pytest.mark.parametrize("value", WRONG)
def test_a_reward_that_is_no_finite_number_is_named_with_its_sample(value: str) -> None:
    wrong = answer(f'{{"rewards": [1.0, {value}]}}'.encode())
    with misbehaving(score, wrong) as server, pytest.raises(RewardUnavailable, match="its reward of sample 4 is "):
        asked(server.url, "abcd", "xxxx", batch_size=2)
    assert len(server.requests) == 2


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(status: int) -> None:
    with (
        misbehaving(score) as other,
        misbehaving(answer(b"", status, Location=other.url)) as server,
        pytest.raises(RewardUnavailable, match=f"HTTP {status}: it redirects to '{other.url}'"),
    ):
        asked(server.url)
    assert (len(server.requests), len(other.requests)) == (1, 0)


def test_an_answer_without_end_is_not_read_to_its_end() -> None:
    many = f"its answer has more than {8 * 2**20} bytes"
    with misbehaving(servers.flood) as server, pytest.raises(RewardUnavailable, match=many):
        asked(server.url, retries=0)


def test_a_certificate_that_nobody_signed_is_refused_at_once(tmp_path: Path) -> None:
    if not (openssl := shutil.which("openssl")):
        pytest.skip("openssl makes the certificate of this test")
    made = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    files = ["-keyout", tmp_path / "key", "-out", tmp_path / "certificate", "-subj", "/CN=127.0.0.1"]
    subprocess.run([openssl, *made, *files, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate", tmp_path / "key")
    with misbehaving(score) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        with pytest.raises(RewardUnavailable, match=r"1 try in .*CERTIFICATE_VERIFY_FAILED"):
            asked(server.url.replace("http:", "https:"))
    assert server.requests == []


# -- how long it is waited ------------------------------------------------------------------------------------------


def test_a_server_that_stays_down_is_named_with_tries_time_cause_and_remedy() -> None:
    with misbehaving(answer({"error": "no memory"}, 500)) as server, pytest.raises(RewardUnavailable) as caught:
        asked(server.url + "?key=s3cret", retries=2, max_wait=30)
    assert len(server.requests) == 3
    said = str(caught.value)
    assert said.startswith(f"the reward server {server.url} gave no scores, 3 tries in 0.")
    bounds = "(reward.timeout=10, reward.retries=2, reward.max_wait=30)"
    assert f'{bounds}: HTTP 500: \'{{"error": "no memory"}}\'. Start or repair the server' in said
    assert said.endswith("If it needs columns of the data set, name them in reward.columns (now none).")
    assert "s3cret" not in said


@pytest.mark.parametrize(("status", "named"), [(422, True), (500, True), (404, False), (401, False)])
def test_a_server_that_refuses_rows_may_lack_a_column_and_one_at_the_wrong_place_does_not(
    status: int, named: bool
) -> None:
    with misbehaving(answer({"error": "KeyError"}, status)) as server, pytest.raises(RewardUnavailable) as caught:
        asked(server.url, data={"labels": [1, 2], "answer": [1, 2]}, columns=["labels"], retries=0)
    assert ("name them in reward.columns (now labels)" in str(caught.value)) == named


def test_nobody_at_the_address_is_an_error_with_the_cause() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/", "http://no-such-host.invalid/"):
        with pytest.raises(RewardUnavailable, match=r"2 tries in .* ConnectError: "):
            asked(url, retries=1)


def test_a_server_that_hangs_costs_the_timeout_a_try() -> None:
    with misbehaving(servers.hang) as server:
        started = time.monotonic()
        with pytest.raises(RewardUnavailable, match=r"2 tries .* no whole answer within 0\.05 s"):
            asked(server.url, timeout=0.05, retries=1)
        assert 0.1 <= time.monotonic() - started < SOON
        assert len(server.requests) == 2


@pytest.mark.parametrize("act", [servers.drip, servers.drip_headers])
@pytest.mark.parametrize("bound", ["timeout", "max_wait"])
def test_bounds_hold_for_a_server_that_drips(act: servers.Act, bound: str) -> None:
    with misbehaving(act) as server:
        started = time.monotonic()
        with pytest.raises(RewardUnavailable, match=r"no whole answer within 0\.(1|0\d+) s"):
            asked(server.url, **{"timeout": 60.0, "retries": 0, bound: 0.1})
        assert time.monotonic() - started < SOON


def test_pauses_end_with_the_whole_wait() -> None:
    with misbehaving(answer(b"", 500)) as server:
        started = time.monotonic()
        # The last try may begin when next to nothing of the wait is left.
        with pytest.raises(RewardUnavailable, match=r"HTTP 500|no whole answer within 0\.0"):
            asked(server.url, retries=1000, max_wait=0.3, first_pause=0.05)
        assert time.monotonic() - started < SOON
    assert 2 <= len(server.requests) <= 7  # pauses of 0.025 to 0.05, 0.05 to 0.1, 0.1 to 0.2, ...


def test_the_whole_wait_is_that_of_all_batches() -> None:
    def slow(handler: servers.Handler) -> None:
        time.sleep(0.06)
        score(handler)

    with misbehaving(slow) as server, pytest.raises(RewardUnavailable):
        asked(server.url, "abcdefgh", "xxxxxxxx", batch_size=1, max_wait=0.2)
    assert len(server.requests) <= 4


def test_a_server_that_asks_for_time_gets_it_within_the_bound() -> None:
    with misbehaving(answer(b"", 429, Retry_After="1"), score) as server:
        started = time.monotonic()
        assert asked(server.url) == [2.0, 3.0]
        assert 1.0 <= time.monotonic() - started < SOON
    later = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=2)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    for wait in ("3600", later, "9" * 400):
        with misbehaving(answer(b"", 503, Retry_After=wait)) as server:
            started = time.monotonic()
            with pytest.raises(RewardUnavailable, match=r"1 try in .*it asked to wait .* s\)"):
                asked(server.url, max_wait=30)
            assert time.monotonic() - started < SOON
    with misbehaving(answer(b"", 503, Retry_After="soon"), score) as server:
        assert asked(server.url) == [2.0, 3.0]


def test_a_retry_draws_nothing_from_the_runs_random_numbers() -> None:
    before = random.getstate()
    with misbehaving(answer(b"", 500), score) as server:
        asked(server.url)
    assert random.getstate() == before
