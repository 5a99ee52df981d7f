"""Which settings make an arm, and what makes arms not comparable."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stable_rlhf.errors import ConfigError
from stable_rlhf.evidence.arms import arms_of, differing, in_order_of_values, not_comparable
from tests.evidence.outcomes import outcome


def test_what_a_preset_implies_is_not_named_beside_it() -> None:
    runs = [
        outcome(f"{preset}{rate}{seed}", preset=preset, critic__heads=heads, optim__learning_rate=rate, seed=seed)
        for preset, heads in (("safe", 2), ("ppo", 1))
        for rate in (1e-4, 3e-4)
        for seed in (0, 1)
    ]
    assert differing(runs) == ["preset", "optim.learning_rate"]
    arms = arms_of(runs, differing(runs))
    assert [arm.name for arm in arms] == ["safe, 0.0001", "safe, 0.0003", "ppo, 0.0001", "ppo, 0.0003"]
    assert [list(arm.runs) for arm in arms] == [[("", 0), ("", 1)]] * 4


def test_folders_seeds_and_logging_tell_no_arms_apart() -> None:
    runs = [outcome(str(n), seed=n, output_dir=str(n), save_steps=n, log__run_name=str(n)) for n in range(3)]
    assert differing(runs) == []
    (arm,) = arms_of(runs, [])
    assert (arm.name, len(arm.runs)) == ("all runs", 3)


def test_settings_that_by_leaves_out_are_strata() -> None:
    runs = [
        outcome(f"{preset}{rate}{seed}", {"reward/final": rate}, preset=preset, optim__learning_rate=rate, seed=seed)
        for preset in ("safe", "ppo")
        for rate in (1.0, 2.0)
        for seed in (0, 1)
    ]
    safe, _ = arms_of(runs, ["preset"])
    assert safe.values("reward/final") == {
        ("optim.learning_rate=1", 0): 1.0,
        ("optim.learning_rate=1", 1): 1.0,
        ("optim.learning_rate=2", 0): 2.0,
        ("optim.learning_rate=2", 1): 2.0,
    }


def test_two_runs_of_one_seed_are_two_runs() -> None:
    (arm,) = arms_of([outcome("a", seed=3), outcome("b", seed=3)], [])
    assert len(arm.runs) == 2


def test_runs_of_unknown_or_repeated_seeds_make_no_pairs() -> None:
    """Their order on the command line is no reason to pair them."""
    unknown = [outcome(f"{preset}{number}", preset=preset) for preset in "ab" for number in range(3)]
    repeated = [outcome(f"{preset}{number}", preset=preset, seed=7) for preset in "ab" for number in range(3)]
    for runs, pairs in ((unknown, 0), (repeated, 1)):
        one, other = arms_of(runs, ["preset"])
        assert (len(one.runs), len(other.runs)) == (3, 3)
        assert len(one.runs.keys() & other.runs.keys()) == pairs


def test_a_run_without_the_setting_is_an_arm_of_its_own() -> None:
    arms = arms_of([outcome("a", preset="safe", seed=0), outcome("grpo", framework="TRL GRPO", seed=0)], ["preset"])
    assert [arm.name for arm in arms] == ["safe", "-"]


def test_a_setting_that_no_run_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--by optim\.learning_rat: no run has this setting: did you mean optim"):
        arms_of([outcome("a", optim__learning_rate=1.0)], ["optim.learning_rat"])
    with pytest.raises(ConfigError, match="the runs differ in preset"):
        arms_of([outcome("a", preset="x"), outcome("b", preset="y")], ["zzz"])


@pytest.mark.parametrize("name", ["data", "reward", "model", "stable-rlhf", "code", "device"])
def test_arms_with_other_inputs_are_not_comparable(name: str) -> None:
    ours, theirs = (
        [replace(outcome(f"{preset}{seed}", preset=preset, seed=seed), inputs={name: value}) for seed in (0, 1)]
        for preset, value in (("safe", "a" * 64), ("ppo", "other"))
    )
    (sentence,) = not_comparable(arms_of([*ours, *theirs], ["preset"]))
    assert "differs between the arms (safe: aaaaaaaaaaaa...; ppo: other)" in sentence
    assert not_comparable(arms_of(ours, ["preset"])) == []


def test_inputs_that_differ_within_the_arms_alike_are_said() -> None:
    runs = [
        replace(outcome(f"{preset}{seed}", preset=preset, seed=seed), inputs={"torch": f"2.{seed}"})
        for preset in ("safe", "ppo")
        for seed in (0, 1)
    ]
    (sentence,) = not_comparable(arms_of(runs, ["preset"]))
    assert sentence == "the version of torch differs between the runs of each arm (2.0, 2.1)"


def test_arms_come_in_the_order_of_their_numbers_and_of_their_first_names() -> None:
    runs = [
        outcome(f"{preset}{rate}", preset=preset, optim__learning_rate=rate)
        for preset in ("safe", "ppo")
        for rate in (1e-3, 1e-4, 3e-3)
    ]
    arms = in_order_of_values(arms_of(runs, ["preset", "optim.learning_rate"]))
    assert [arm.name for arm in arms] == [f"{p}, {r}" for p in ("safe", "ppo") for r in ("0.0001", "0.001", "0.003")]
