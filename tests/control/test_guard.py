"""The guard: each rule fires on what it is for and on nothing a hair better; what follows; the state kept."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_rlhf.control import guard_rules
from stable_rlhf.control.base import from_dict
from stable_rlhf.control.guard import Action, Guard, Verdict, judge
from stable_rlhf.control.guard_config import GuardConfig
from stable_rlhf.control.guard_rules import RULES, START, Figures, GuardState
from stable_rlhf.runs.names import METRICS

HEALTHY: dict[str, float | None] = {
    "objective/kl": 0.25,
    "objective/kl_exact": None,
    "safe/threshold": None,
    "objective/entropy": 4.0,
    "completions/distinct_2": 0.5,
    "completions/mean_length": 10.0,
    "objective/scores": 1.0,
    "objective/scores_std": 0.5,
    "rows": 64,
    "val/explained_variance": 0.5,
    "policy/skipped_steps": 0,
}


def run(config: GuardConfig, steps: list[Figures], state: GuardState | None = None) -> tuple[GuardState, list[Verdict]]:
    state = state or GuardState()
    verdicts = []
    for figures in steps:
        state, verdict = judge(config, state, figures)
        verdicts.append(verdict)
    return state, verdicts


def started(config: GuardConfig) -> GuardState:
    """After as many healthy steps as the start has."""
    return run(config, [HEALTHY] * START)[0]


def test_the_figures_that_the_rules_look_at_are_metrics_of_a_row() -> None:
    assert set(HEALTHY) - set(METRICS) - {"objective/kl_exact"} == {
        "rows"
    }  # the completions that had a reward, which the trainer adds
    source = Path(guard_rules.__file__).read_text(encoding="utf-8")
    assert set(re.findall(r'"(\w+/\w+)"', source)) == set(HEALTHY) - {"rows"}


# -- each rule at its bound -----------------------------------------------------------------------------------------

AT_THE_BOUND = [  # rule, figure, its value at the bound (allowed), the next number beyond (not allowed)
    ("max_kl", "objective/kl", 2.0, math.nextafter(2.0, 3)),
    ("min_entropy", "objective/entropy", 0.8, math.nextafter(0.8, 0)),  # 0.2 x 4
    ("max_entropy", "objective/entropy", 8.0, math.nextafter(8.0, 9)),  # 2 x 4
    ("min_distinct", "completions/distinct_2", 0.125, math.nextafter(0.125, 0)),  # 0.25 x 0.5
    ("min_length", "completions/mean_length", 2.0, math.nextafter(2.0, 0)),  # 0.2 x 10
    ("min_explained_variance", "val/explained_variance", -2.0, math.nextafter(-2.0, -3)),
    ("skipped_steps", "policy/skipped_steps", 0, 1),
]


@pytest.mark.parametrize(("rule", "figure", "allowed", "beyond"), AT_THE_BOUND)
def test_a_rule_fires_beyond_its_bound_and_not_at_it(rule: str, figure: str, allowed: float, beyond: float) -> None:
    config = GuardConfig(patience=1, min_explained_variance=-2.0)
    _, (good,) = run(config, [{**HEALTHY, figure: allowed}], started(config))
    assert good == Verdict(action=Action.GO_ON)
    _, (bad,) = run(config, [{**HEALTHY, figure: beyond}], started(config))
    assert (bad.action, bad.rule, bad.suspect) == (Action.ROLL_BACK, rule, True)
    assert bad.advice == RULES[rule].advice


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("figure", [*HEALTHY, "loss/value_avg"])
def test_a_figure_that_is_not_finite_rolls_back_at_once_whatever_it_is(figure: str, value: float) -> None:
    state, (verdict,) = run(GuardConfig(), [{**HEALTHY, figure: value}])
    assert (verdict.action, verdict.rule) == (Action.ROLL_BACK, "non_finite")
    assert verdict.seen == f"{figure} is {value}"
    json.dumps(dataclasses.asdict(state), allow_nan=False)  # none of it stays
    assert math.isfinite(sum(state.rewards.errors))


def test_what_was_seen_is_said_with_its_figures() -> None:
    config = GuardConfig(patience=2, min_explained_variance=-2.0)
    said = {}
    for rule, figure, _, beyond in AT_THE_BOUND:
        far = {"min_explained_variance": -7.5, "skipped_steps": 3}.get(rule, beyond * (3 if "max" in rule else 0.5))
        said[rule] = run(config, [{**HEALTHY, figure: far}] * 2, started(config))[1][0 if rule == "max_kl" else 1].seen
    assert said == {
        "max_kl": "the KL is 6 nats per token, above its ceiling of 2",
        "min_entropy": "the entropy is 0.4 nats per token, below 0.2 x its 4 at the start, for 2 steps",
        "max_entropy": "the entropy is 24 nats per token, above 2 x its 4 at the start, for 2 steps",
        "min_distinct": "the share of distinct word pairs is 0.0625, below 0.25 x its 0.5 at the start, for 2 steps",
        "min_length": "the mean length is 1 tokens, below 0.2 x its 10 at the start, for 2 steps",
        "min_explained_variance": "the critic's explained variance is -7.5, below -2, for 2 steps",
        "skipped_steps": "3 optimiser steps had a gradient that is not finite and were not taken, for 2 steps",
    }


@pytest.mark.parametrize(
    ("setting", "figure", "value", "other"),
    [
        ("max_kl", "objective/kl", 3.0, 4.0),
        ("min_entropy", "objective/entropy", 0.6, 0.1),
        ("max_entropy", "objective/entropy", 9.0, 3.0),
        ("min_distinct", "completions/distinct_2", 0.1, 0.1),
        ("min_length", "completions/mean_length", 1.5, 0.1),
        ("min_explained_variance", "val/explained_variance", -3.0, -4.0),
    ],
)
def test_a_rules_setting_moves_its_bound_and_none_turns_it_off(
    setting: str, figure: str, value: float, other: float
) -> None:
    """``value`` breaks the default (or -2), and not ``other``, nor no bound at all."""
    bad = {**HEALTHY, figure: value}
    default = GuardConfig(patience=1, min_explained_variance=-2.0)
    assert run(default, [bad], started(default))[1][0].rule == setting
    for bound in (other, None):
        config = dataclasses.replace(default, **{setting: bound})
        assert run(config, [bad], started(config))[1][0] == Verdict(action=Action.GO_ON)


def test_the_ceiling_of_the_kl_follows_the_threshold_in_force() -> None:
    """At 5 x the threshold, whatever the ceiling in nats is, which is for rules without a threshold."""
    for threshold in (0.02, 0.3, 2.0):
        for kl, expected in ((5 * threshold, Action.GO_ON), (5.01 * threshold, Action.ROLL_BACK)):
            figures = {**HEALTHY, "objective/kl": kl, "safe/threshold": threshold}
            _, (verdict,) = run(GuardConfig(max_kl=1e-9), [figures])
            assert verdict.action is expected
    assert verdict.seen == "the KL is 10 nats per token, above its ceiling of 10, 5 x the threshold in force"
    assert run(GuardConfig(max_kl_ratio=None), [figures])[1][0].action is Action.GO_ON


def test_the_exact_kl_is_the_one_that_is_judged_where_it_is_measured() -> None:
    noisy: Figures = {**HEALTHY, "objective/kl": 9.0, "objective/kl_exact": 0.25, "safe/threshold": 0.3}
    assert run(GuardConfig(), [noisy])[1][0].action is Action.GO_ON
    assert run(GuardConfig(), [{**noisy, "objective/kl": 0.1, "objective/kl_exact": 2.0}])[1][0].rule == "max_kl"


SURE = {"objective/entropy": 0.1}
BRIEF = {"completions/mean_length": 0.5}
WILD = {"objective/entropy": 9.0}


@pytest.mark.parametrize(
    ("figure", "rule"), [(SURE, "min_entropy"), (BRIEF, "min_length"), (WILD, "max_entropy")], ids=str
)
@pytest.mark.parametrize(
    ("others", "is_one"),
    [
        ({"safe/threshold": 0.25}, False),  # short, sure or surprising, and within the budget
        ({"safe/threshold": 0.25, "objective/kl": 0.375}, False),  # 1.5 x the threshold
        ({"safe/threshold": 0.25, "objective/kl": 0.376}, True),
        ({"safe/threshold": 0.25, "objective/kl": 0.376, "objective/kl_exact": 0.25}, False),
        ({"safe/threshold": 0.25, "completions/distinct_2": 0.25}, False),  # 0.5 of the start
        ({"safe/threshold": 0.25, "completions/distinct_2": 0.249}, True),
        ({"safe/threshold": 0.25, "completions/distinct_2": None}, False),  # completions of one token
        ({"safe/threshold": 0.25, "objective/kl": None}, True),
        ({"safe/threshold": None}, True),  # no budget says what is allowed
    ],
)
def test_what_the_budget_allows_with_varied_texts_is_no_collapse(figure, rule: str, others, is_one: bool) -> None:
    config = GuardConfig(patience=1)
    _, (verdict,) = run(config, [{**HEALTHY, **figure, **others}], started(config))
    assert verdict.rule == (rule if is_one else "")


def test_figures_that_are_none_or_missing_break_no_rule() -> None:
    config = GuardConfig(patience=1)
    nothing: Figures = dict.fromkeys(HEALTHY)
    for figures in (nothing, {}):
        state, (verdict,) = run(config, [figures], started(config))
        assert verdict == Verdict(action=Action.GO_ON)
        assert state == dataclasses.replace(started(config), streaks=dict.fromkeys(RULES, 0))


# -- the start ------------------------------------------------------------------------------------------------------


def test_levels_are_measured_against_the_mean_of_the_first_five() -> None:
    entropies = [3.0, 5.0, 4.0, 2.0, 6.0, 100.0]
    steps: list[Figures] = [
        {"objective/entropy": h, "completions/distinct_2": h / 8, "completions/mean_length": 2 * h} for h in entropies
    ]
    state, _ = run(GuardConfig(), steps)
    assert (state.entropy.mean, state.distinct.mean, state.length.mean) == pytest.approx((4.0, 0.5, 8.0), rel=1e-15)
    assert [level.count for level in (state.entropy, state.distinct, state.length)] == [START] * 3


def test_before_the_start_is_known_only_the_kl_and_what_is_not_finite_are_judged() -> None:
    config = GuardConfig(patience=1, min_explained_variance=-2.0)
    wild: Figures = {**HEALTHY, "objective/entropy": 4.0, "val/explained_variance": -100.0}
    collapsed: Figures = {**wild, "objective/entropy": 0.0, "completions/distinct_2": 0.0}
    _, verdicts = run(config, [wild, wild, wild, collapsed, wild])
    assert [verdict.action for verdict in verdicts] == [Action.GO_ON] * 4 + [Action.ROLL_BACK]
    assert verdicts[4].rule == "min_explained_variance"
    assert run(config, [{**HEALTHY, "objective/kl": 2.1}])[1][0].rule == "max_kl"


def test_a_level_that_is_never_there_does_not_hold_up_the_others() -> None:
    """Completions of one token have no word pairs; their entropy collapses as any other."""
    config = GuardConfig(patience=1)
    short: Figures = {**HEALTHY, "completions/distinct_2": None}
    _, verdicts = run(config, [short] * START + [{**short, "objective/entropy": 0.1}])
    assert [verdict.rule for verdict in verdicts] == [""] * START + ["min_entropy"]


def test_an_entropy_that_begins_at_nothing_is_above_any_multiple_of_it() -> None:
    config = GuardConfig(patience=1)
    sure: Figures = {**HEALTHY, "objective/entropy": 0.0}
    assert {verdict.action for verdict in run(config, [sure] * 20)[1]} == {Action.GO_ON}


# -- patience, order, what follows ----------------------------------------------------------------------------------

LOW: Figures = {**HEALTHY, "objective/entropy": 0.1}
SKIPPED: Figures = {**HEALTHY, "policy/skipped_steps": 2}


def test_patience_counts_steps_in_a_row_and_a_good_one_begins_anew() -> None:
    config = GuardConfig(patience=3)
    state, verdicts = run(config, [LOW, LOW, HEALTHY, LOW, LOW, LOW], started(config))
    assert [verdict.action for verdict in verdicts] == [Action.GO_ON] * 5 + [Action.ROLL_BACK]
    assert [verdict.suspect for verdict in verdicts] == [True, True, False, True, True, True]
    assert state.streaks == dict.fromkeys(RULES, 0) | {"min_entropy": 3}


def test_a_step_that_is_skipped_is_an_incident_each_time_and_a_roll_back_after_patience() -> None:
    config = GuardConfig(patience=3)
    _, verdicts = run(config, [SKIPPED, HEALTHY, SKIPPED, SKIPPED, SKIPPED], started(config))
    actions = [verdict.action for verdict in verdicts]
    assert actions == [Action.SKIP, Action.GO_ON, Action.SKIP, Action.SKIP, Action.ROLL_BACK]
    assert {verdict.rule for verdict in verdicts} == {"skipped_steps", ""}
    assert verdicts[0].seen == "2 optimiser steps had a gradient that is not finite and were not taken"


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_after_as_many_roll_backs_as_are_allowed_the_next_stops(allowed: int) -> None:
    config = GuardConfig(max_rollbacks=allowed)
    state, verdicts = run(config, [{**HEALTHY, "objective/kl": 9.0}] * (allowed + 2))
    assert [v.action for v in verdicts] == [Action.ROLL_BACK] * allowed + [Action.STOP] * 2
    assert state.rollbacks == allowed


def test_of_two_rules_the_one_that_is_heard_first_is_named() -> None:
    config = GuardConfig(patience=1, min_explained_variance=-2.0)
    beyond = {figure: value for _, figure, _, value in AT_THE_BOUND if figure != "objective/entropy"}
    order = []
    everything: dict[str, float | None] = {**HEALTHY, **beyond, "objective/entropy": 0.1, "loss/value_avg": math.nan}
    for _ in range(7):
        rule = run(config, [everything], started(config))[1][0].rule
        order.append(rule)
        figure = {"non_finite": "loss/value_avg"} | {name: figure for name, figure, _, _ in AT_THE_BOUND}
        everything[figure[rule]] = HEALTHY.get(figure[rule])
    assert order == [name for name in RULES if name not in ("max_entropy", "max_drawdown")]
    assert [name for name, rule in RULES.items() if rule.at_once] == ["non_finite", "max_kl"]


def test_a_rule_that_is_due_is_heard_before_one_that_only_begins() -> None:
    config = GuardConfig(patience=2)
    both = {**LOW, "policy/skipped_steps": 1}
    _, verdicts = run(config, [LOW, both], started(config))
    assert (verdicts[1].action, verdicts[1].rule) == (Action.ROLL_BACK, "min_entropy")


# -- the state ------------------------------------------------------------------------------------------------------

FIGURE = st.none() | st.floats(-10, 10) | st.sampled_from([math.nan, math.inf])


@settings(max_examples=40)
@given(st.lists(st.fixed_dictionaries(dict.fromkeys(HEALTHY, FIGURE)), max_size=12), st.integers(0, 12))
def test_a_state_that_went_through_json_judges_the_same(steps: list[Figures], cut: int) -> None:
    config = GuardConfig(patience=2, max_rollbacks=100)
    whole, verdicts = run(config, steps)
    half, first = run(config, steps[:cut])
    back: Any = from_dict(GuardState, json.loads(json.dumps(dataclasses.asdict(half), allow_nan=False)), "guard state")
    assert back == half
    other, second = run(config, steps[cut:], back)
    assert (other, first + second) == (whole, verdicts)


# -- the shell ------------------------------------------------------------------------------------------------------


def test_the_guard_judges_as_the_pure_function_does_over_its_own_state() -> None:
    config, steps = GuardConfig(patience=2), [HEALTHY] * START + [LOW, SKIPPED, LOW, LOW, HEALTHY]
    guard = Guard(config)
    state, verdicts = run(config, steps)
    assert [guard.judge(figures) for figures in steps] == verdicts
    assert (guard.state, guard.state.rollbacks) == (state, 1)


def test_a_guard_that_is_off_judges_nothing() -> None:
    guard = Guard(GuardConfig(enabled=False))
    for figures in ({**HEALTHY, "objective/kl": 9.0}, {"objective/kl": math.nan}, SKIPPED):
        assert guard.judge(figures) == Verdict(action=Action.GO_ON)
    assert guard.state == GuardState()


def test_a_guard_that_was_saved_and_loaded_judges_the_same() -> None:
    config = GuardConfig(patience=3)
    guard, other = Guard(config), Guard(config)
    for figures in [HEALTHY] * START + [LOW, LOW]:
        guard.judge(figures)
    saved = json.loads(json.dumps(guard.state_dict(), allow_nan=False))
    assert saved["streaks"] == {
        "non_finite": 0,
        "max_kl": 0,
        "skipped_steps": 0,
        "min_entropy": 2,
        "max_entropy": 0,
        "min_distinct": 0,
        "min_length": 0,
        "max_drawdown": 0,
        "min_explained_variance": 0,
    }
    other.load_state_dict(saved)
    assert other.state == guard.state
    assert (other.judge(LOW), other.state) == (guard.judge(LOW), guard.state)
    saved["streaks"]["max_kl"] = 99
    assert other.state == guard.state  # it shares nothing with what it was given


@pytest.mark.parametrize(
    ("streaks", "sentence"),
    [
        ({"max_kl": None}, " has unknown keys [] and lacks ['max_kl']: load a state saved by this version of the "),
        ({"max_speed": 1}, " has unknown keys ['max_speed'] and lacks []: load a state saved by this version of the "),
        ({"max_kl": 1.5}, ".max_kl is 1.5: expected a finite int."),
        ([0] * 9, " is [0, 0, 0, 0, 0, 0, 0, 0, 0]: expected a mapping of names to numbers."),
    ],
)
def test_a_saved_state_whose_rules_are_others_is_refused_and_changes_nothing(streaks: Any, sentence: str) -> None:
    guard = Guard(GuardConfig())
    guard.judge(LOW)
    before = guard.state
    bad = guard.state_dict()
    if isinstance(streaks, dict):
        streaks = {name: count for name, count in (bad["streaks"] | streaks).items() if count is not None}
    with pytest.raises(ValueError, match=r"^guard state") as caught:
        guard.load_state_dict({**bad, "streaks": streaks})
    assert str(caught.value).startswith(f"guard state.streaks{sentence}")
    assert guard.state is before


def test_a_roll_back_takes_the_snapshots_state_but_keeps_the_count_of_roll_backs() -> None:
    guard = Guard(GuardConfig(patience=1, rollback_factor=0.25))
    for _ in range(START):
        guard.judge(HEALTHY)
    snapshot, good = guard.state_dict(), guard.state
    assert guard.judge({**HEALTHY, "objective/kl": 9.0}).action is Action.ROLL_BACK
    guard.roll_back(snapshot)
    assert guard.state == dataclasses.replace(good, rollbacks=1, factor=0.25)
    assert guard.judge({**HEALTHY, "objective/kl": 9.0}).action is Action.ROLL_BACK
    guard.roll_back(snapshot)
    assert guard.state == dataclasses.replace(good, rollbacks=2, factor=0.0625)
