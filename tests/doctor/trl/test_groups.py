"""The rules of doctor --trl on literal numbers: lengths, sums of rewards, groups without variance, batches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from stable_rlhf.doctor.findings import Findings
from stable_rlhf.doctor.trl.arguments import batch_fault
from stable_rlhf.doctor.trl.groups import Group, enough, judge_completions
from stable_rlhf.doctor.trl.rewards import TRLRewards
from stable_rlhf.doctor.trl.sampling import Completion


def completion(length: int | None, seen: int = 64) -> Completion:
    return Completion(ids=[], length=length, seen=seen)


def test_the_recommended_length_lets_95_in_100_end() -> None:
    assert enough([completion(length) for length in range(1, 101)]) == 96  # the 95th is 95, rounded up to 8 x 12
    assert enough([completion(10)] * 19 + [completion(None)]) == 16
    assert enough([completion(10)] * 18 + [completion(None)] * 2) is None


def test_a_completion_is_cut_where_its_end_comes_after_the_limit() -> None:
    assert [completion(length).is_cut(16) for length in (16, 17, None)] == [False, True, True]
    assert [completion(length, seen=10).is_known(16) for length in (5, None)] == [True, False]


def judged(lengths: list[int | None], seen: int, others: str = "") -> str:
    group = Group(completions=[completion(length, seen) for length in lengths], texts=[], scores={}, again={})
    given: Any = SimpleNamespace(limit=16, training=SimpleNamespace(mask_truncated_completions=False))
    said: list[str] = []
    judge_completions(Findings(said.append), given, [group], "'<eos>'", others)
    return said[0]


def test_a_share_that_the_deadline_hides_is_not_guessed() -> None:
    assert judged([5, None], 10) == (
        "warning  completions: sampling was stopped after 10 tokens of max_completion_length=16; 1 of 2 had not ended. "
        "Whether they are cut off is not known: run doctor where you train"
    )


def test_an_end_token_that_this_trl_does_not_read_is_named() -> None:
    assert judged([None, None], 32, "'<|im_end|>'").endswith(
        "Within 32 tokens only 0 of 2 end: the model's settings name the end tokens '<|im_end|>', but this version of "
        "TRL ends at '<eos>' only"
    )


def rewards(weights: list[float], by_function: bool = False) -> TRLRewards:
    scorer: Any = None
    return TRLRewards(scorer=scorer, weights=weights, by_function=by_function, advice=[])


def test_totals_are_weighted_sums_of_the_scores_that_there_are() -> None:
    scores: dict[str, list[float | None]] = {"a": [1.0, None, None], "b": [2.0, 3.0, None]}
    assert rewards([1.0, 0.5]).totals(scores) == [2.0, 1.5, None]


def test_a_group_is_flat_where_its_sums_are_equal() -> None:
    opposed: dict[str, list[float | None]] = {"a": [0.0, 1.0], "b": [1.0, 0.0]}
    assert rewards([1.0, 1.0]).is_flat(opposed)
    assert not rewards([1.0, 2.0]).is_flat(opposed)
    assert not rewards([1.0, 1.0], by_function=True).is_flat(opposed)  # normalised in the group before they are added
    assert rewards([1.0]).is_flat({"a": [1.0, None]})
    assert rewards([1.0]).is_flat({"a": [0.1 + 0.2, 0.3]})  # equal in float32, which TRL computes in


@pytest.mark.parametrize(
    ("changes", "processes", "fault"),
    [
        ({}, 1, None),
        ({"num_generations": 16}, 1, "set gradient_accumulation_steps to 2 or a multiple of it"),
        ({"num_generations": 16}, 2, None),
        ({"num_generations": 16, "steps_per_generation": 3}, 1, "set steps_per_generation to 2 or a multiple of it"),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, 1, "TRL takes one of them; remove the other"),
        (
            {"generation_batch_size": 24, "num_generations": 16},
            1,
            "set generation_batch_size to 16 or a multiple of it",
        ),
    ],
)
def test_the_arithmetic_of_a_generation_is_trls(changes: dict[str, int], processes: int, fault: str | None) -> None:
    values = {
        "per_device_train_batch_size": 8,
        "num_generations": 8,
        "gradient_accumulation_steps": 1,
        "generation_batch_size": None,
        "steps_per_generation": None,
    }
    found = batch_fault(values | changes, processes, "GRPO")
    assert found is None if fault is None else found is not None and fault in found
