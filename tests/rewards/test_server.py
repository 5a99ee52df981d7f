"""`stable-rlhf serve-reward`: what it answers, and what it refuses, on real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from stable_rlhf import errors
from stable_rlhf.cli.main import main
from stable_rlhf.rewards import server as rewards_server
from stable_rlhf.rewards.client import RemoteReward
from stable_rlhf.rewards.functions import RewardFunction, resolve_reward
from stable_rlhf.rewards.model import RewardModel
from stable_rlhf.rewards.server import Limits, RewardServer
from tests.faults import children
from tests.rewards.test_scorer import tiny_model, word_tokenizer

SOON = 10.0
"""Seconds that nothing below may take."""
AWKWARD = [0.1, 1 / 3, -1e-300, 5e-324, 9.999999999999999e29, -0.0, 123456789.12345678, None]
"""Scores that a float's text must carry to the last bit."""


def awkward(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [AWKWARD[len(completion) % len(AWKWARD)] for completion in completions]


def hanging(prompts: list[str], completions: list[str]) -> list[float]:
    print("begun", flush=True)
    time.sleep(6 * SOON)
    return [0.0] * len(prompts)


def stop_soon() -> None:
    rewards_server.STOP_SECONDS = 0.1  # type: ignore[assignment]


async def told(prompts: list[Any], completions: list[Any], marks: list[float]) -> list[float]:
    """Async, of chats or texts, and of a column."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [len(prompt) + 10 * len(text) + mark for prompt, text, mark in zip(prompts, texts, marks, strict=True)]


@contextmanager
def served(function: Any, name: str = "it", **limits: Any) -> Iterator[tuple[str, list[str]]]:
    """(URL, lines of the log) of a server in a thread of this process."""
    log: list[str] = []
    given = Limits(**{"max_body_bytes": 100_000, "max_batch": 8, "token": None, **limits})
    app = RewardServer(RewardFunction(name=name, function=function), given, log.append).app
    with socket.create_server(("127.0.0.1", 0)) as listening:
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=lambda: server.run(sockets=[listening]))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", log
        finally:
            server.should_exit = True
            thread.join()


def post(url: str, body: Any, token: str | None = None, **given: Any) -> httpx2.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | ({} if token is None else {"Authorization": token})
    return httpx2.post(url, trust_env=False, timeout=SOON, **{"content": raw, "headers": headers, **given})


def asked(url: str, prompts: list[Any], completions: list[Any], data: Any = None, **given: Any) -> Any:
    reward = RemoteReward(url, **{"retries": 0, "timeout": SOON, **given})
    return asyncio.run(reward(prompts, completions, **(data or {})))


# -- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_a_served_model_scores_as_it_does_here_to_the_last_bit(chat: bool) -> None:
    """Texts and chats, with a chat template and without one."""
    texts = ["a b", "c", "d e f", "a", "b b b b"]
    model = RewardModel(tiny_model(), word_tokenizer(bos=True, chat=chat))
    prompts: list[Any] = [*texts, *([{"role": "user", "content": text}] for text in texts)]
    completions: list[Any] = [" g", " h i", "", " j", " a"] * 2
    here = [model([prompt], [completion])[0] for prompt, completion in zip(prompts, completions, strict=True)]
    with served(model) as (url, _):
        assert asked(url, prompts, completions, batch_size=1) == here
        assert asked(url + "/get_reward", prompts, completions, batch_size=1) == here
        whole = asked(url, prompts[:5], completions[:5])
    assert whole == model(prompts[:5], completions[:5])
    assert len(set(here)) == 10


def test_every_float_and_null_arrive_as_they_were() -> None:
    completions = ["x" * length for length in range(8)]
    with served(awkward) as (url, _):
        scores = asked(url, ["a"] * 8, completions)
        assert [repr(score) for score in scores] == [repr(score) for score in AWKWARD]
        assert asked(url, ["a"], ["x" * 7]) == [None]


def test_a_served_function_gets_prompts_completions_and_columns() -> None:
    chat = [{"role": "user", "content": "Hello?"}]
    with served(told) as (url, _):
        data = {"marks": [0.5, 0.25]}
        assert asked(url, ["abc", chat], ["xy", "z"], data, columns=["marks"]) == [23.5, 11.25]


def test_a_failing_function_is_said_in_a_sentence_and_the_next_batch_is_scored() -> None:
    def broken(prompts: list[str], completions: list[str]) -> list[float]:
        if "bad" in completions:
            raise KeyError("\x1b[2J/home/me/lexicon")
        return [1.0] * len(prompts)

    with served(broken) as (url, log):
        refused = post(url, {"query": ["abad"], "prompts": ["a"]})
        assert refused.status_code == 500
        assert refused.json() == {"error": "it failed (KeyError); the server's log says why"}
        assert "lexicon" in log[0]
        assert post(url, {"query": ["ax"], "prompts": ["a"]}).json() == {"rewards": [1.0]}
    with served(lambda prompts, completions: [float("nan")]) as (url, _):
        assert post(url, {"query": ["ax"], "prompts": ["a"]}).status_code == 500


def test_health_names_the_model() -> None:
    with served(awkward, name="judge") as (url, _):
        response = httpx2.get(url + "/health", trust_env=False)
        assert (response.status_code, response.json()) == (200, {"status": "ok", "model": "judge"})


# -- refusals -------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
REFUSED = [
    (b"", 400, "not JSON"),
    (b"\xff", 400, "not JSON"),
    (b"[" * 50_000, 400, "nested too deeply"),
    ([], 422, "must be a JSON object with a list 'query'"),
    ({"prompts": ["a"]}, 422, "'query' must be a list of texts"),
    ({"query": "ab", "prompts": ["a"]}, 422, "'query' must be a list of texts"),
    ({"query": [], "prompts": []}, 422, "'query' has 0 texts"),
    ({"query": ["ab", 3], "prompts": ["a", "b"]}, 422, "'query', row 2 is 3, not a text"),
    ({"query": ["ab", ""], "prompts": ["a", ""]}, 422, "'query' is empty in row 2"),
    (b'{"query": ["a\\ud800"], "prompts": ["a"]}', 422, "'query', row 1 holds half of a surrogate pair"),
    ({"query": ["a"] * 9, "prompts": ["a"] * 9}, 413, "'query' has 9 texts; send at most 8"),
    ({"query": ["ab"]}, 422, "'prompts' must be a list of texts"),
    ({"query": ["ab"], "prompts": ["a", "b"]}, 422, "there are 2 'prompts' for 1 texts"),
    ({"query": ["ab"], "prompts": ["b"]}, 422, "'query', row 1, does not begin with its prompt, 'b'"),
    ({"query": ["ab"], "prompts": ["a"], "labels": "x"}, 422, "'labels' must be a list of 1 values"),
    ({"query": ["ab"], "prompts": ["a"], "completions": ["x"]}, 422, "'completions' is not a field"),
    ({"query": ["ab"], "prompts": ["a"], "messages": [CHAT, CHAT]}, 422, "'messages' must be a list of 1 chats"),
    ({"query": ["ab"], "prompts": ["a"], "messages": [CHAT[1:]]}, 422, "'messages', row 1, must be a list of at least"),
    ({"query": ["ab"], "prompts": ["a"], "messages": [CHAT[::-1]]}, 422, "must end with the assistant's answer"),
    ({"query": ["ab"], "prompts": ["a"], "messages": [["x", "y"]]}, 422, "has 'x', not an object with 'role'"),
    ({"query": ["ab"], "prompts": ["a"], "messages": [[CHAT[0], {"role": "assistant", "content": 1}]]}, 422, "is 1"),
    ({"query": ["ab" * 60_000], "prompts": ["a"]}, 413, "the body has more than 100000 bytes"),
]


def test_what_cannot_be_scored_is_refused_with_a_sentence() -> None:
    with served(awkward) as (url, log):
        for body, status, message in REFUSED:
            response = post(url, body)
            assert (response.status_code, list(response.json())) == (status, ["error"]), body
            assert message in response.json()["error"]
        chunked = post(url, b"", content=(b"x" * 50_000 for _ in range(3)))
        assert (chunked.status_code, chunked.json()["error"][:35]) == (413, "the body has more than 100000 bytes")
        for other in ({"Content-Type": "text/plain"}, {}):  # what a page in a browser can send to this machine
            assert post(url, {"query": ["ab"], "prompts": ["a"]}, headers=other).status_code == 415
        missing, wrong = post(url + "/score", {}), httpx2.get(url, trust_env=False)
        assert (missing.status_code, wrong.status_code, wrong.headers["Allow"]) == (404, 405, "POST")
        assert "POSTed to / or /get_reward" in wrong.json()["error"]
        assert post(url, {"query": ["ab"], "prompts": ["a"]}).status_code == 200
    assert all("refused with" in line for line in log[:-1])


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards_server, "BODY_SECONDS", 0.05)
    with served(awkward) as (url, _), socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        client.settimeout(SOON)
        client.sendall(head)
        assert client.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_nobody_is_served_without_the_token() -> None:
    body = {"query": ["ab"], "prompts": ["a"]}
    with served(awkward, token="s3cret") as (url, log):
        for token in (None, "", "Bearer", "Bearer s3cre", "Bearer s3crett", "s3cret", "Basic s3cret"):
            response = post(url, body, token)
            assert (response.status_code, response.headers["WWW-Authenticate"]) == (401, "Bearer"), token
        assert httpx2.get(url + "/health", trust_env=False).status_code == 401
        assert post(url, body, "Bearer s3cret").status_code == 200
    assert not any("s3cret" in line for line in log)


@pytest.mark.parametrize("host", ["localhost", "LocalHost:80", "127.9.8.7:80", "[::1]:80", "[::1]"])
def test_without_a_token_this_machine_is_answered_by_its_names(host: str) -> None:
    with served(awkward) as (url, _):
        assert httpx2.get(url + "/health", headers={"Host": host}, trust_env=False).status_code == 200


@pytest.mark.parametrize("host", ["rebound.example:80", "192.0.2.1", "localhost.rebound.example", "[::1", "a@b", ""])
def test_without_a_token_a_page_whose_name_resolves_to_this_machine_is_refused(host: str) -> None:
    headers = {"Host": host, "Content-Type": "application/json"}
    with served(awkward) as (url, _):
        refused = post(url, {"query": ["ab"], "prompts": ["a"]}, headers=headers)
        assert (refused.status_code, httpx2.get(url + "/health", headers=headers).status_code) == (403, 403)
        message = "without --token-env the host of the URL must be localhost or a loopback address"
        assert refused.json() == {"error": message}
    with served(awkward, token="s3cret") as (url, _):  # which a page does not have
        headers["Authorization"] = "Bearer s3cret"
        assert post(url, {"query": ["ab"], "prompts": ["a"]}, headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no system role') }}", "TemplateError: no system role"),
        ("{{ messages[0]['role'] + 1 }}", "TypeError: can only concatenate str"),
        ("{% if messages[0]['role'] != 'system' %}a{% endif %}", "sample 1 has no tokens"),
    ],
)
def test_a_chat_that_the_template_refuses_is_not_to_be_sent_again(template: str, message: str) -> None:
    tokenizer = word_tokenizer(chat=True)
    refusing = "{% if messages[0]['role'] == 'system' %}" + template + "{% else %}a{% endif %}"
    tokenizer.chat_template = refusing
    chats = [CHAT, [{"role": "system", "content": "a"}, *CHAT]]
    model = RewardModel(tiny_model(), tokenizer)
    with served(model) as (url, _):
        refused = post(url, {"query": ["a", "a"], "messages": chats})
        assert (refused.status_code, refused.json()["error"][:53]) == (
            422,
            "'messages', row 2, cannot be written for the model: '",
        )
        assert message in refused.json()["error"]
        assert post(url, {"query": ["a"], "messages": [CHAT]}).status_code == 200
        model.model.score = None  # what fails later is the server's own fault
        assert post(url, {"query": ["a"], "messages": [CHAT]}).status_code == 500


def test_one_batch_is_scored_at_a_time_and_a_bounded_number_waits() -> None:
    at_once, most, go_on = 0, 0, threading.Event()

    def slow(prompts: list[str], completions: list[str]) -> list[float]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        go_on.wait(SOON)
        at_once -= 1
        return [1.0] * len(prompts)

    with served(slow) as (url, _), ThreadPoolExecutor(rewards_server.QUEUE + 3) as pool:
        sent = [pool.submit(post, url, {"query": ["ab"], "prompts": ["a"]}) for _ in range(rewards_server.QUEUE + 3)]
        until = time.monotonic() + SOON
        while sum(one.done() for one in sent) < 2 and time.monotonic() < until:
            time.sleep(0.005)
        refused = [one.result() for one in sent if one.done()]
        assert [(one.status_code, one.headers["Retry-After"]) for one in refused] == [(503, "1")] * 2
        waiting = f"{rewards_server.QUEUE + 1} batches are already waiting"  # the one that is scored among them
        assert all(waiting in one.text for one in refused)
        go_on.set()
        statuses = sorted(one.result().status_code for one in sent)
    assert statuses == [200] * (rewards_server.QUEUE + 1) + [503] * 2
    assert most == 1


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "--host='0.0.0.0': others can reach this address: set --token-env"),
        (["--host", "::"], "--host='::': others can reach this address"),
        (["--host", "192.0.2.1", "--token-env", "NO_TOKEN"], "--token-env='NO_TOKEN': does not hold a token"),
        (["--host", "192.0.2.1", "--token-env", "A_TOKEN"], "--host='192.0.2.1' --port=0: "),
        (["--device", "tpu9"], "--device='tpu9': give auto, cpu"),
        (["--device", "cuda:99"], "--device='cuda:99': this machine has"),
        (["--max-batch", "0"], "--max-batch=0: must be 1 or more"),
        (["--port", "70000"], "--port=70000: give 1 to 65535"),
        (["--prot", "1"], "unrecognized arguments: --prot"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_TOKEN", "s3cret")
    assert (
        main(["serve-reward", "tests.rewards.test_server:awkward", "--port", "0", *arguments]) == errors.Exit.BAD_INPUT
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert "s3cret" not in line


def test_a_model_that_is_none_and_a_port_that_is_taken_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for model, message in (("tests.rewards.test_server:gone", "has no 'gone'"), ("http://h/", "is a server itself")):
        assert main(["serve-reward", model, "--port", "0"]) == errors.Exit.BAD_INPUT
        assert message in capsys.readouterr().err
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-reward", "builtin", "--port", port]) == errors.Exit.BAD_INPUT
    assert f"--port={port}: Address already in use" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_serves_until_a_signal_and_leaves_signals_as_they_were(
    number: signal.Signals, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    answers: list[Any] = []

    def client() -> None:
        url = f"http://127.0.0.1:{port}"
        reward = RemoteReward(url, retries=200, first_pause=0.02, max_wait=SOON)
        try:
            answers.extend(asyncio.run(reward(["The soup was"] * 2, [" good.", " bad."])))
        finally:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=client)
    thread.start()
    assert main(["serve-reward", "builtin", "--port", str(port), "--batch-size", "1"]) == code
    thread.join()
    assert signal.getsignal(number) is before
    function = resolve_reward("builtin", batch_size=1).function
    assert answers == function(["The soup was"] * 2, [" good.", " bad."])
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"stable-rlhf serve-reward: serving builtin at http://127.0.0.1:{port} (Ctrl-C stops it)"
    assert second.startswith("stable-rlhf serve-reward: 2 samples scored in ")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_batch_that_does_not_end_does_not_keep_the_server(number: signal.Signals, code: int, tmp_path: Path) -> None:
    arguments = ["serve-reward", "tests.rewards.test_server:hanging", "--port", "0"]
    child = children.start(arguments, tmp_path / "said", stop_soon)
    try:
        url = said(child, r"http://127\.0\.0\.1:\d+")
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, url, {"query": ["ab"], "prompts": ["a"]})
            said(child, "begun")
            os.kill(child.pid, number)
            assert child.end(SOON) == code
            assert answer.result().status_code == 503
    finally:
        child.process.kill()
    assert "the batch being scored did not end within 0.1 s and is lost" in child.said
    assert "Traceback" not in child.said


def said(child: children.Child, pattern: str) -> str:
    """What the command has said that matches, once it has."""
    until = time.monotonic() + children.PATIENCE
    while not (child.output.exists() and (found := re.search(pattern, child.said))):
        assert time.monotonic() < until, pattern
        time.sleep(0.01)
    return found.group()
