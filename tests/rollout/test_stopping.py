"""Stop strings end a completion with the token that completes one, as a loop over tokens finds it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from stable_rlhf.rollout.stopping import first_stop, stopped
from tests.tiny_runs import settings, trainer

TOKENS = ["a", "b", "ab", "ba", "\n", "b\n", "x"]


def naive(tokens: list[str], stops: list[str]) -> tuple[str, int, bool]:
    """(text, tokens kept, whether it stopped), one token at a time."""
    text = ""
    for count, token in enumerate(tokens, start=1):
        text += token
        if places := [text.index(stop) for stop in stops if stop in text]:
            return text[: min(places)], count, True
    return text, len(tokens), False


@pytest.mark.parametrize("stops", [["\n"], ["ab"], ["aba", "bb"], ["x", "b\n"], ["abax", "ba"], ["never"]])
def test_a_completion_ends_as_in_a_loop_over_its_tokens(stops: list[str]) -> None:
    draw = random.Random(0)
    rows = [[draw.choice(TOKENS) for _ in range(draw.randint(1, 9))] for _ in range(40)]
    width = max(map(len, rows))
    mask = torch.tensor([[column < len(row) for column in range(width)] for row in rows])
    ended = torch.tensor([len(row) % 2 == 0 for row in rows])
    given = mask.clone(), ended.clone()
    texts, new_mask, new_ended = stopped(
        ["".join(row) for row in rows], mask, ended, stops, lambda row, count: "".join(rows[row][:count])
    )
    expected = [naive(row, stops) for row in rows]
    assert [len(row) for row in rows] != [count for _, count, _ in expected] or stops == ["never"]
    assert new_mask.sum(1).tolist() == [count for _, count, _ in expected]
    assert new_ended.tolist() == [cut or bool(before) for (_, _, cut), before in zip(expected, ended, strict=True)]
    assert texts == [text for text, _, _ in expected]
    assert torch.equal(mask, given[0])
    assert torch.equal(ended, given[1])


def test_the_stop_string_that_begins_first_counts() -> None:
    assert first_stop("one two", ["two", "ne"]) == 1
    assert first_stop("one two", ["x"]) is None
    assert first_stop("one", []) is None


def test_a_run_stops_at_strings_and_tokens(tokenizer: Any, tmp_path: Any) -> None:
    rollout = {"batch_size": 8, "max_completion_length": 12, "stop_strings": ["a", "e", "\n"], "stop_tokens": ["Z", 40]}
    run = trainer(settings(tmp_path / "run", max_steps=1, rollout=rollout), tokenizer)
    assert {40, tokenizer.convert_tokens_to_ids("Z")} <= set(run.sampler.eos_token_ids)
    rollout_of, _ = run.sampler.collect(run.train_dataset, run.train_prompts, range(8))
    for text, ended, mask, tokens in zip(
        rollout_of.completions, rollout_of.ended, rollout_of.tokens.mask, rollout_of.tokens.response, strict=True
    ):
        assert first_stop(text, ["a", "e", "\n"]) is None
        kept = tokens[mask].tolist()
        stops = {*run.sampler.eos_token_ids, *tokenizer.convert_tokens_to_ids(["a", "e", "Ċ"])}
        assert ended == (kept[-1] in stops)
        assert not stops & set(kept[:-1])
