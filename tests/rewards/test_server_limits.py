"""`stable-rlhf serve-reward`: its limits to the byte and to the sample, its queue over time, its command's settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaForSequenceClassification

from stable_rlhf import errors
from stable_rlhf.cli.main import main
from stable_rlhf.rewards import functions
from stable_rlhf.rewards import server as rewards_server
from tests.rewards.test_scorer import tiny_model, word_tokenizer
from tests.rewards.test_server import asked, awkward, post, served

ONE = {"query": ["ab"], "prompts": ["a"]}


def of_length(length: int) -> bytes:
    """A request that can be scored, of that many bytes."""
    bare = len(json.dumps({"query": [""], "prompts": [""]}))
    body = json.dumps({"query": ["x" * (length - bare)], "prompts": [""]}).encode()
    assert len(body) == length
    return body


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_may_have_exactly_as_many_bytes_as_are_allowed(chunked: bool) -> None:
    with served(awkward, max_body_bytes=1000) as (url, _):
        for length, status in ((999, 200), (1000, 200), (1001, 413)):
            body = of_length(length)
            content: Any = iter([body[:400], body[400:]]) if chunked else body
            assert post(url, b"", content=content).status_code == status, length


@pytest.mark.parametrize(("count", "status"), [(1, 200), (7, 200), (8, 200), (9, 413)])
def test_a_batch_may_have_exactly_as_many_samples_as_are_allowed(count: int, status: int) -> None:
    with served(awkward) as (url, _):
        assert post(url, {"query": ["ab"] * count, "prompts": ["a"] * count}).status_code == status


def test_batches_that_are_done_do_not_wait_any_more() -> None:
    """Whether they were scored or failed: more of them than have a place at one time."""

    def fails_for_bad(prompts: list[str], completions: list[str]) -> list[float]:
        if "bad" in completions:
            raise ValueError
        return [1.0] * len(prompts)

    with served(fails_for_bad) as (url, log):
        for _ in range(rewards_server.QUEUE + 2):
            assert post(url, {"query": ["abad"], "prompts": ["a"]}).status_code == 500
            assert post(url, ONE).json() == {"rewards": [1.0]}
    assert sum(line.startswith("1 samples scored in ") for line in log) == rewards_server.QUEUE + 2


def test_a_batch_that_is_scored_is_known_to_be_and_one_that_is_done_is_not() -> None:
    seen: list[bool] = []
    limits = rewards_server.Limits(max_body_bytes=1000, max_batch=8, token=None)

    def looks(prompts: list[str], completions: list[str]) -> list[float]:
        seen.append(server.scoring)
        if completions == ["bad"]:
            raise ValueError
        return [0.0]

    server = rewards_server.RewardServer(functions.RewardFunction(name="it", function=looks), limits, lambda line: None)
    for completion in ("x", "bad", "y"):
        query = {"query": ["a" + completion], "prompts": ["a"]}
        _answered(server.app, query)
        assert not server.scoring
    assert seen == [True, True, True]


def _answered(app: Any, query: dict[str, Any]) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
            return await client.post("/", json=query)

    return asyncio.run(ask())


def test_a_reward_function_gets_the_part_of_a_text_after_its_prompt_and_of_a_chat_its_last_message() -> None:
    seen: dict[str, Any] = {}

    def spy(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0] * len(prompts)

    chat = [{"role": "user", "content": "Hello?"}]
    with served(spy) as (url, _):
        asked(url, ["abc", chat], ["xy", "z"], {"marks": [1, None]}, columns=["marks"])
    answer = [{"role": "assistant", "content": "z"}]
    assert seen == {"prompts": ["abc", chat], "completions": ["xy", answer], "marks": [1, None]}


@pytest.mark.parametrize("values", [[1], [1, 2, 3], 5, None])
def test_a_column_needs_one_value_a_sample(values: Any) -> None:
    with served(awkward) as (url, _):
        refused = post(url, {"query": ["ab", "ab"], "prompts": ["a", "a"], "marks": values})
        assert (refused.status_code, refused.json()["error"]) == (
            422,
            "'marks' must be a list of 2 values, one for each text in 'query'",
        )


def test_an_empty_text_is_named_by_its_row_from_one() -> None:
    with served(awkward) as (url, _):
        refused = post(url, {"query": ["", "ab"], "prompts": ["", "a"]})
        assert refused.json()["error"] == "'query' is empty in row 1"


# -- the command ----------------------------------------------------------------------------------------------------


def commanded(client: Callable[[str], None], *arguments: str) -> int:
    """The code of the command, which SIGTERM stops, where it serves, once the client is done with its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    failed: list[BaseException] = []
    ended = threading.Event()

    def act() -> None:
        url = f"http://127.0.0.1:{port}"
        try:
            _up(url, ended)
            client(url)
        except BaseException as error:  # noqa: BLE001  raised where the test is
            failed.append(error)
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=act)
    thread.start()
    code = main(["serve-reward", *arguments, "--port", str(port)])
    ended.set()
    thread.join()
    if failed and code == 0:
        raise failed[0]
    return code


def _up(url: str, ended: threading.Event) -> None:
    while not ended.wait(0.02):
        with contextlib.suppress(httpx2.ConnectError):
            httpx2.get(url + "/health", trust_env=False)
            return
    raise AssertionError("it did not serve")


def test_the_commands_limits_and_token_are_those_of_its_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("A_TOKEN", "s3cret")
    statuses: list[int] = []

    def client(url: str) -> None:
        bodies: list[Any] = [{"query": ["ab"] * n, "prompts": ["a"] * n} for n in (2, 3)]
        bodies += [of_length(500), of_length(501)]
        statuses.extend(post(url, body, "Bearer s3cret").status_code for body in bodies)
        statuses.append(post(url, ONE).status_code)
        statuses.append(post(url + "/" + "x" * 3000, ONE, "Bearer s3cret").status_code)

    arguments = ["--max-batch", "2", "--max-body-bytes", "500", "--token-env", "A_TOKEN"]
    assert commanded(client, "tests.rewards.test_server:awkward", *arguments) == 0
    assert statuses == [200, 413, 200, 413, 401, 404]
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == len("stable-rlhf serve-reward: ") + rewards_server.SHOWN  # the long path is cut


def test_the_commands_batch_size_is_that_of_its_model(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    sizes: list[int] = []

    def seen(module: torch.nn.Module, given: Any) -> None:
        if isinstance(module, LlamaForSequenceClassification):
            sizes.append(1)

    hook = register_module_forward_pre_hook(seen)
    try:
        assert commanded(lambda url: asked(url, ["a"] * 5, [" b"] * 5), str(tmp_path), "--batch-size", "2") == 0
    finally:
        hook.remove()
    assert len(sizes) == 3  # batches of 2, 2 and 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_that_is_not_there_is_refused_by_its_number(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = commanded(lambda url: None, "tests.rewards.test_server:awkward", "--device", device)
    assert code == errors.Exit.BAD_INPUT
    assert f"--device='{device}': this machine has 0 CUDA devices; give auto" in capsys.readouterr().err


@pytest.mark.parametrize("port", ["65536", "-1"])
def test_a_port_beyond_the_last_is_refused(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["serve-reward", "tests.rewards.test_server:awkward", f"--port={port}"])
    assert code == errors.Exit.BAD_INPUT
    assert f"--port={port}: give 1 to 65535, or 0 for any free port" in capsys.readouterr().err
