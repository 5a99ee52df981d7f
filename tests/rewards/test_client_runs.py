"""Rewards from a server in a run: its settings, its trial before anything loads, and the same rows as without it."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import PreTrainedTokenizerFast

from stable_rlhf import errors
from stable_rlhf.cli.main import main
from stable_rlhf.config.config import Config
from stable_rlhf.config.sections import RewardConfig
from stable_rlhf.errors import ConfigError, RewardError, RewardUnavailable
from stable_rlhf.rewards.client import remote_reward
from stable_rlhf.rewards.functions import RewardFunction
from stable_rlhf.rewards.scorer import Scorer
from stable_rlhf.training.given import as_given, probe_servers
from tests.faults import servers
from tests.faults.servers import answer, misbehaving, score
from tests.tiny_runs import letters, settings, trainer

SOON = 5.0
"""Seconds that two requests may take to meet."""


def test_the_error_comes_out_of_the_scorer_as_it_is() -> None:
    with misbehaving(answer(b"", 404)) as server:
        functions = [
            RewardFunction(name="a", function=letters),
            remote_reward(server.url, RewardConfig(url=server.url)),
        ]
        with pytest.raises(RewardUnavailable, match=r"^the reward server http://127\.0\.0\.1:"):
            Scorer(functions).score(["a"], ["x"], {}, [True])


def test_two_servers_are_asked_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=SOON)

    def met(handler: servers.Handler) -> None:
        meeting.wait()
        score(handler)

    with misbehaving(met) as one, misbehaving(met) as two:
        config = RewardConfig(functions=[one.url, two.url], retries=0)
        functions = [remote_reward(url, config) for url in config.functions]
        scores = Scorer(functions, [1.0, 10.0]).score(["a"], ["xy"], {}, [True])
    assert scores.total == [33.0]
    assert list(scores.per_function) == [url.split("/")[2] for url in config.functions]


def test_the_url_is_short_for_a_list_of_one_and_config_yaml_can_be_read_again() -> None:
    url = "http://127.0.0.1:8000/get_reward"
    config = Config.from_preset(reward={"url": url})
    assert config.reward.functions == [url]
    assert Config.from_preset(**yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=rf"reward\.functions=\['other'\]: reward\.url='{url}' is the only reward"):
        RewardConfig(url=url, functions=["other"])


REFUSED = [
    ({"url": "localhost:8000"}, r"reward\.url='localhost:8000': give http://HOST:8000/PATH"),
    ({"url": "http://"}, r"reward\.url='http://': give http://HOST:8000/PATH"),
    ({"url": "http://h:99999/"}, "is not a URL; give http://HOST:8000/PATH"),
    ({"functions": ["https://[::1/x"]}, "is not a URL; give"),
    ({"url": "http://h/a b"}, "give http://HOST:8000/PATH"),
    ({"url": "http://h/#x"}, "a part after '#'"),
    ({"url": "http://me:s3cret@h/x?key=s3cret"}, r"reward\.url='http://h/x': .*set reward\.token_env instead"),
    ({"functions": ["builtin", "http://s3cret@h:1/x"]}, r"reward\.functions='http://h:1/x': .*reward\.token_env"),
    ({"url": "http://me:s3cret@h:99999/x"}, "is not a URL"),
    ({"url": "http://h/", "timeout": 0.0}, r"reward\.timeout=0\.0: must be greater than 0"),
    ({"url": "http://h/", "max_wait": -1.0}, r"reward\.max_wait=-1\.0: must be greater than 0"),
    ({"url": "http://h/", "retries": -1}, r"reward\.retries=-1: must be 0 or more"),
    ({"url": "http://h/", "columns": ["query"]}, r"reward\.columns='query': is a field of the protocol"),
    ({"functions": ["http://a/", "http://b/"], "token_env": "T"}, r"reward\.token_env='T': would be sent to a and b"),
]


@pytest.mark.parametrize(("reward", "message"), REFUSED)
def test_settings_that_cannot_be_meant_are_refused(reward: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        RewardConfig(**reward)
    assert "s3cret" not in str(caught.value)


def test_rewards_given_as_objects_take_the_place_of_the_url() -> None:
    config = Config.from_preset(reward={"url": "http://127.0.0.1:1/"})
    rewards = as_given(config, "builtin", [letters], None).reward
    assert (rewards.functions, rewards.url) == (["tests.tiny_runs:letters"], None)


@pytest.mark.parametrize("field", ["timeout", "retries", "max_wait", "token_env", "columns"])
def test_a_servers_settings_are_refused_without_a_server(field: str) -> None:
    values: dict[str, Any] = {"timeout": 1.0, "retries": 1, "max_wait": 1.0, "token_env": "T", "columns": ["labels"]}
    config = Config.from_preset(reward={field: values[field]})
    with pytest.raises(
        ConfigError, match=rf"reward\.{field}=.* has no effect unless one of reward\.functions is the URL"
    ):
        as_given(config, "builtin", None, None)


@pytest.mark.parametrize(
    ("given", "act", "message"),
    [
        ({"timeout": 0.05, "retries": 0}, servers.hang, r"no whole answer within 0\.05 s"),
        ({"retries": 1}, answer(b"", 500), r"2 tries in .*reward\.retries=1"),
        ({"max_wait": 0.9, "retries": 0}, servers.drip, r"no whole answer within 0\.[4-9]\d* s"),  # what is left of it
        ({"columns": ["labels"], "retries": 0}, answer(b"", 500), r"reward\.columns=.* has no column 'labels'"),
    ],
)
def test_a_servers_settings_act(given: dict[str, Any], act: servers.Act, message: str) -> None:
    with misbehaving(act) as server:
        function = remote_reward(server.url, RewardConfig(url=server.url, **given)).function
        with pytest.raises(RewardError, match=message):
            asyncio.run(function(["a"], ["x"]))


def test_a_server_that_is_not_there_is_said_before_anything_loads(tmp_path: Path) -> None:
    with misbehaving(answer(b"", 404)) as server:
        config = settings(tmp_path / "run", model={"name": "/no/such/model"}, reward={"url": server.url})
        with pytest.raises(RewardUnavailable, match=r"1 try .*\(a trial before the run begins.*HTTP 404"):
            probe_servers(as_given(config, "/no/such/model", None, None))
    assert server.requests == [{"query": ["The soup was good."], "prompts": ["The soup was"]}]
    assert not (tmp_path / "run").exists()


def test_a_trial_without_the_data_sets_columns_needs_no_score() -> None:
    given = {"columns": ["labels"], "retries": 0}
    with misbehaving(answer(b"labels must not be null", 422)) as server:
        probe_servers(as_given(Config.from_preset(reward={"url": server.url, **given}), "builtin", None, None))
        assert server.requests[0]["labels"] == [None]
    for columns, status in ((["labels"], 404), ([], 422)):
        with misbehaving(answer(b"", status)) as server, pytest.raises(RewardUnavailable, match=f"HTTP {status}"):
            probe_servers(
                as_given(Config.from_preset(reward={"url": server.url, "columns": columns}), "builtin", None, None)
            )


def test_a_run_is_rewarded_by_the_server_as_by_the_function_itself(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Through a restart of the server as well: the rows are the same to the last digit."""

    def scored(handler: servers.Handler) -> None:
        sent = handler.sent
        texts = [query[len(prompt) :] for query, prompt in zip(sent["query"], sent["prompts"], strict=True)]
        handler.give(200, json.dumps({"rewards": letters(sent["prompts"], texts)}).encode())

    rows = []
    with misbehaving(scored, scored, answer(b"", 503), servers.close, scored) as server:
        for name, reward, given in (("local", letters, {}), ("remote", None, {"url": server.url, "batch_size": 4})):
            run = trainer(settings(tmp_path / name, max_steps=2, reward=given), tokenizer, reward)
            run.train()
            text = (tmp_path / name / "metrics.jsonl").read_text()
            rows.append(text.replace(f"rewards/{server.url.split('/')[2]}/", "rewards/letters/"))
        other = trainer(settings(tmp_path / "named", max_steps=2), tokenizer, [letters, server.url])
    assert rows[0] == rows[1] != ""
    assert [len(request["query"]) for request in server.requests[:7]] == [1, 4, 4, 4, 4, 4, 4]
    assert (other.args.reward.functions[1], other.args.reward.url) == (server.url, None)


def test_a_run_whose_server_is_not_there_ends_with_the_code_of_rewards_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with misbehaving(answer(b"", 404)) as server:
        given = ["--reward.url", server.url, "--output_dir", str(tmp_path / "run")]
        assert main(["train", *given]) == errors.Exit.REWARD == 4
    assert "HTTP 404" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
