"""The preview: steps within its bound are untouched, longer ones are taken in part, broken ones not at all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stable_rlhf import optimize, preview
from stable_rlhf.microbatches import Lengths
from stable_rlhf.models import ActorCritic
from stable_rlhf.passes import Passes
from stable_rlhf.records import Tokens
from tests import reruns, runs
from tests.oracles import objective as oracle
from tests.updates import assert_same, decide, make_config, make_model, make_rollout, weights

LIMIT = 0.05
LOOSE = 0.2  # nats per token: also within it are all steps of a healthy update together, in bfloat16 too
HEALTHY = 1e-3
"""Learning rate at which the tiny policy's optimiser steps stay below 0.006 nats per token."""
TOO_HIGH = 100 * HEALTHY
STEPS = 4  # 2 passes x 2 minibatches
FULL_OR_LORA = pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
Weights = dict[str, Tensor]


@dataclasses.dataclass
class Seen:
    """One update, step by step."""

    model: ActorCritic
    metrics: dict[str, float | None]
    tokens: Tokens
    optimizer: torch.optim.Optimizer
    states: list[Weights]
    """Weights before each optimiser step, and after the last."""
    moments: list[list[Weights]]
    """AdamW's state of every parameter, likewise."""
    proposed: list[Weights]
    """Weights as AdamW left them, before the preview's scaling."""
    probed: list[int]
    """Rows of the probe."""


def updated(
    tokenizer: PreTrainedTokenizerFast,
    limit: float | None,
    learning_rate: float,
    *,
    adapter: bool = False,
    prepare: Callable[[ActorCritic, torch.optim.Optimizer], Any] = lambda *_: None,
    optim: dict[str, Any] | None = None,
    **sections: Any,
) -> Seen:
    """One update of 2 x 2 optimiser steps; ``prepare`` may put hooks on the model and the optimiser before it."""
    sections.setdefault("critic", {"learning_rate": HEALTHY})
    optim = {"max_preview_kl": limit, "learning_rate": learning_rate, **(optim or {})}
    config = make_config(optim=optim, **sections)
    model = make_model(tokenizer, config, adapter)
    made = Passes(model, config)
    optimizer = torch.optim.AdamW(optimize.optimizer_groups(model, config), fused=True)
    rollout = make_rollout(len(tokenizer), skipped=(1,))
    measured = optimize.measure(made, rollout, config, 0)
    batch, _ = optimize.make_batch(model, measured, rollout.scores, decide(0.3), config)
    probed = preview.probe(optimize.lengths(batch.tokens), config, 0, made)
    states: list[Weights] = []
    moments: list[list[Weights]] = []
    proposed: list[Weights] = []

    def note(*_: Any) -> None:
        states.append(weights(model))
        moments.append([{name: kept.clone() for name, kept in own.items()} for own in optimizer.state.values()])

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(lambda *_: proposed.append(weights(model)))
    prepare(model, optimizer)
    stats = optimize.update(made, optimizer, batch, decide(0.3), config, 0)
    note()
    rows = [] if probed is None else probed.rows.tolist()
    return Seen(model, stats.metrics, batch.tokens, optimizer, states, moments, proposed, rows)


def of(part: str, state: Weights) -> Weights:
    return {name: tensor for name, tensor in state.items() if name.startswith(part)}


@torch.no_grad()
def distributions(seen: Seen, state: Weights, row: int) -> Tensor:
    """[t, V] float64 log-probs at each response token of a row, by the model's own forward of that row alone."""
    for name, parameter in seen.model.named_parameters():
        parameter.copy_(state[name])
    start, length = int(seen.tokens.start[row]), int(seen.tokens.mask[row].sum())
    logits = seen.model.policy(input_ids=seen.tokens.ids[row : row + 1, : start + length]).logits[0]
    return logits[start - 1 : start - 1 + length].double().log_softmax(-1)


def estimated(seen: Seen, before: Weights, after: Weights) -> float:
    """The preview's KL of a step, token by token over the probe's rows; states[0] sampled."""
    terms = []
    for row in seen.probed:
        three = [distributions(seen, state, row) for state in (before, after, seen.states[0])]
        for t in range(len(three[0])):
            token = int(seen.tokens.response[row, t])
            terms.append(oracle.step_kl_token(*(float(one[t, token]) for one in three)))
    return math.fsum(terms) / len(terms)


def exact(seen: Seen, before: Weights, after: Weights) -> float:
    """KL(before || after) over the whole vocabulary, the mean over all response tokens of the rollout."""
    terms = []
    for row in range(len(seen.tokens.start)):
        one, two = distributions(seen, before, row), distributions(seen, after, row)
        terms += (one.exp() * (one - two)).sum(-1).tolist()
    return math.fsum(terms) / len(terms)


def by_step(seen: Seen, kl: Callable[[Seen, Weights, Weights], float]) -> list[float]:
    return [kl(seen, before, after) for before, after in zip(seen.states, seen.states[1:], strict=False)]


def assert_identical(first: Seen, second: Seen) -> None:
    assert_same(first.states[-1], second.states[-1], 0.0)
    for one, two in zip(first.moments[-1], second.moments[-1], strict=True):
        assert_same(one, two, 0.0)


# -- the bound ------------------------------------------------------------------------------------------------------


@FULL_OR_LORA
def test_at_a_learning_rate_100_times_too_high_every_step_stays_within_the_bound(tokenizer, adapter: bool) -> None:
    """On the probe's rows by the estimate; over the rollout and the vocabulary the exact KL is at most twice that."""
    seen = updated(tokenizer, LIMIT, TOO_HIGH, adapter=adapter)
    assert len(seen.states) == STEPS + 1
    assert 0 < min(by_step(seen, estimated)) < max(by_step(seen, estimated)) <= LIMIT
    assert max(by_step(seen, exact)) <= 2 * LIMIT
    assert seen.metrics["safe/scaled_steps"] == STEPS
    proposals = [estimated(seen, *pair) for pair in zip(seen.states, seen.proposed, strict=False)]
    assert seen.metrics["safe/preview_kl"] == pytest.approx(max(proposals), rel=1e-4)


@FULL_OR_LORA
def test_without_the_preview_the_same_learning_rate_goes_far_beyond_the_bound(tokenizer, adapter: bool) -> None:
    seen = updated(tokenizer, None, TOO_HIGH, adapter=adapter)
    assert max(by_step(seen, estimated)) > 20 * LIMIT
    assert min(by_step(seen, exact)) > 10 * LIMIT
    assert not any(name.startswith("safe/") for name in seen.metrics)


@FULL_OR_LORA
def test_a_scaled_step_is_that_share_of_the_proposed_one_for_the_policy_alone(tokenizer, adapter: bool) -> None:
    optim = {"num_iterations": 1, "num_mini_batches": 1, "weight_decay": 0.1}
    seen = updated(tokenizer, LIMIT, TOO_HIGH, adapter=adapter, optim=optim)
    whole = updated(tokenizer, None, TOO_HIGH, adapter=adapter, optim=optim)
    before, taken = seen.states
    assert_same(seen.proposed[0], whole.proposed[0], 0.0)
    share = seen.metrics["safe/step_scale"]
    assert share is not None
    assert 0 < share < 0.1
    moved = 0
    for name, tensor in of("policy.", taken).items():
        start, end = before[name].double(), seen.proposed[0][name].double()
        # Two roundings of a float32 of this size for each scaling, of which there were at most two.
        rounding = 4 * torch.finfo(torch.float32).eps * torch.maximum(start.abs(), end.abs())
        assert ((tensor - (start + share * (end - start))).abs() <= rounding).all(), name
        moved += int((tensor != before[name]).any())
    assert moved > 0
    assert_same(of("heads.", taken), of("heads.", whole.states[-1]), 0.0)
    assert_same(of("target_heads.", taken), of("target_heads.", whole.states[-1]), 0.0)
    for one, two in zip(seen.moments[-1], whole.moments[-1], strict=True):
        assert_same(one, two, 0.0)  # AdamW's are of the step that it proposed


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"model": {"dtype": "bfloat16"}},
    "recomputed layers": {"model": {"gradient_checkpointing": True}},
    "a critic that reaches the transformer": {"critic": {"backbone_gradient": True}},
    "the exact KL in the loss": {"kl": {"in_reward": False, "in_loss": "exact"}},
    "passes of a few tokens": {"optim": {"microbatch_tokens": 20}},
}


@FULL_OR_LORA
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_within_the_bound_is_to_the_last_bit_the_step_without_the_preview(
    tokenizer, variant: str, adapter: bool
) -> None:
    on = updated(tokenizer, LOOSE, HEALTHY, adapter=adapter, **VARIANTS[variant])
    off = updated(tokenizer, None, HEALTHY, adapter=adapter, **VARIANTS[variant])
    assert_identical(on, off)
    own = {name: on.metrics[name] for name in on.metrics if name.startswith("safe/")}
    assert {name: figure for name, figure in on.metrics.items() if name not in own} == off.metrics
    kl = own.pop("safe/preview_kl")
    assert own == {"safe/step_scale": 1.0, "safe/scaled_steps": 0}
    assert kl is not None
    assert 0 < kl < LOOSE


def test_steps_that_are_looked_at_together_are_bounded_together(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that the first step keeps, and that the three others together exceed three times."""
    monkeypatch.setattr(preview, "QUIET", 1)
    whole = updated(tokenizer, 10.0, HEALTHY)
    first, others = (estimated(whole, whole.states[a], whole.states[b]) for a, b in ((0, 1), (1, STEPS)))
    limit = (first + others / 3) / 2
    assert first < limit < others / 3
    seen = updated(tokenizer, limit, HEALTHY)
    assert estimated(seen, seen.states[1], seen.states[STEPS]) <= 3 * limit * (1 + 1e-6)
    assert seen.metrics["safe/scaled_steps"] == STEPS - 1
    scale = (seen.metrics["safe/step_scale"] * STEPS - 1) / (STEPS - 1)
    for name, start in of("policy.", seen.states[1]).items():
        wanted = start + scale * (seen.proposed[-1][name] - start)
        torch.testing.assert_close(seen.states[STEPS][name], wanted, atol=1e-7, rtol=1e-6)


# -- steps that are not taken ---------------------------------------------------------------------------------------


def test_a_proposed_step_whose_logits_are_not_finite_is_not_taken(tokenizer) -> None:
    """A learning rate at which the weights themselves are finite and every product with them is not."""
    seen = updated(tokenizer, LIMIT, 1e38)
    assert not torch.isfinite(distributions(seen, seen.proposed[0], 0)).all()
    assert_same(of("policy.", seen.states[-1]), of("policy.", seen.states[0]), 0.0)
    assert not torch.equal(seen.states[-1]["heads.0.up.weight"], seen.states[0]["heads.0.up.weight"])
    safe = {name: figure for name, figure in seen.metrics.items() if name.startswith("safe/")}
    assert safe == {"safe/preview_kl": None, "safe/step_scale": 0.0, "safe/scaled_steps": STEPS}
    assert all(figure is None or math.isfinite(figure) for figure in seen.metrics.values())
    assert seen.metrics["val/ratio"] == pytest.approx(1.0, abs=1e-6)  # the policy is the one that sampled


def test_a_step_that_is_beyond_the_bound_after_every_scaling_is_not_taken(tokenizer) -> None:
    """10,000 times too high, a bound of 2 nats: the KL stays near 2.2 as the step is scaled by 2 / 2.2 each time."""
    seen = updated(tokenizer, 2.0, 1e4 * HEALTHY, adapter=True)
    before, after = seen.states[0], seen.states[1]
    assert 2.0 < estimated(seen, before, seen.proposed[0]) < 2.5
    assert_same(of("policy.", after), of("policy.", before), 0.0)
    assert not torch.equal(after["heads.0.up.weight"], before["heads.0.up.weight"])
    assert seen.metrics["safe/scaled_steps"] >= 1
    assert max(by_step(seen, estimated)) <= 2.0


def broken(part: str, *at: int) -> Callable[[ActorCritic, torch.optim.Optimizer], None]:
    """Makes a gradient of the policy or the critic infinite at these optimiser steps."""

    def prepare(model: ActorCritic, optimizer: torch.optim.Optimizer) -> None:
        done: list[Any] = []
        optimizer.register_step_post_hook(lambda *_: done.append(None))
        parameter = model.policy_parameters()[0] if part == "policy" else model.critic_parameters()[0]

        def spoil(gradient: Tensor) -> Tensor | None:
            if len(done) not in at:
                return None
            return gradient.index_fill(0, torch.tensor([0]), torch.inf)

        parameter.register_hook(spoil)

    return prepare


@pytest.mark.parametrize("limit", [None, LIMIT], ids=["no preview", "preview"])
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_a_gradient_that_is_not_finite_costs_its_own_step_and_no_other(
    tokenizer, part: str, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[tuple[list[str], Tensor]] = []
    real = Passes.learn

    def watched(self: Passes, *arguments: Any) -> tuple[list[str], Tensor]:
        shares.append(real(self, *arguments))
        return shares[-1]

    monkeypatch.setattr(Passes, "learn", watched)
    seen = updated(tokenizer, limit, TOO_HIGH, prepare=broken(part, 2))
    assert len(shares) == STEPS
    assert_same(seen.states[3], seen.states[2], 0.0)
    for one, two in zip(seen.moments[3], seen.moments[2], strict=True):
        assert_same(one, two, 0.0)
    for before, after in ((0, 1), (1, 2), (3, 4)):
        for name in ("policy.model.layers.0.mlp.up_proj.weight", "heads.0.up.weight", "target_heads.0.up.weight"):
            assert not torch.equal(seen.states[before][name], seen.states[after][name]), (before, name)
    assert seen.metrics["policy/skipped_steps"] == 1
    taken = [figures.double() for i, (_, figures) in enumerate(shares) if i != 2]
    means = dict(zip(shares[0][0], torch.stack(taken).mean(0).tolist(), strict=True))
    for name in ("val/ratio", "loss/value_avg", "loss/policy_avg", "policy/entropy_avg"):
        assert seen.metrics[name] == pytest.approx(means[name], rel=1e-5, abs=1e-6), name
    assert all(figure is not None and math.isfinite(figure) for figure in seen.metrics.values())
    if limit is not None:
        assert seen.metrics["safe/scaled_steps"] == STEPS - 1
        kls = [estimated(seen, seen.states[i], seen.proposed[i]) for i in range(STEPS)]
        assert kls[2] == 0
        assert seen.metrics["safe/preview_kl"] == pytest.approx(max(kls), rel=1e-4)


def test_a_step_that_was_not_taken_is_in_no_mean_of_the_shares(tokenizer) -> None:
    """Two steps scaled to almost nothing, two passed over: the mean is of the two."""
    seen = updated(tokenizer, 1e-9, TOO_HIGH, prepare=broken("policy", 0, 3))
    assert seen.metrics["policy/skipped_steps"] == seen.metrics["safe/scaled_steps"] == 2
    share = seen.metrics["safe/step_scale"]
    assert share is not None
    assert share < 1e-3


@pytest.mark.parametrize("limit", [None, LIMIT], ids=["no preview", "preview"])
@pytest.mark.parametrize("part", ["policy", "critic"])
def test_where_no_gradient_is_finite_nothing_moves_and_no_mean_has_a_value(
    tokenizer, part: str, limit: float | None
) -> None:
    seen = updated(tokenizer, limit, TOO_HIGH, prepare=broken(part, *range(STEPS)))
    assert_same(seen.states[-1], seen.states[0], 0.0)
    for state in seen.moments[-1]:
        assert all(not kept.any() for kept in state.values())
    known = {name: figure for name, figure in seen.metrics.items() if figure is not None}
    assert known == {"policy/skipped_steps": STEPS} | ({} if limit is None else {"safe/scaled_steps": 0})
    own = {"safe/preview_kl", "safe/step_scale", "safe/scaled_steps"}
    assert own & seen.metrics.keys() == (set() if limit is None else own)
    assert {"val/ratio", "grad_norm/policy"} <= seen.metrics.keys()


# -- what it costs, and where it runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "looks"), [(None, 0), (LIMIT, 2), (0.01, STEPS)])
def test_it_costs_a_forward_a_step_two_where_little_moves_and_none_where_it_is_off(
    tokenizer, limit: float | None, looks: int
) -> None:
    rows: list[int] = []

    def prepare(model: ActorCritic, _: torch.optim.Optimizer) -> None:
        model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0].ids)))

    updated(tokenizer, limit, HEALTHY, prepare=prepare)
    assert rows.count(preview.FEWEST) == looks
    assert len(rows) == STEPS + looks


@FULL_OR_LORA
@pytest.mark.parametrize("learning_rate", [HEALTHY, TOO_HIGH])
def test_with_graphs_the_steps_are_those_without(
    tokenizer, learning_rate: float, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = reruns.use(monkeypatch)
    monkeypatch.setattr("stable_rlhf.passes.ROWS", 1)  # no rows or columns that only fill a shape: equal to the bit
    monkeypatch.setattr("stable_rlhf.passes.COLUMNS", 8)
    by_hand = updated(tokenizer, LIMIT, learning_rate, adapter=adapter)
    assert captured == []
    replayed = updated(tokenizer, LIMIT, learning_rate, adapter=adapter, model={"cuda_graphs": True})
    assert [work.__name__ for work in captured].count("look") == 1
    assert_identical(replayed, by_hand)
    assert replayed.metrics == by_hand.metrics


# -- the rows that are looked at ------------------------------------------------------------------------------------


def probed(tokenizer: PreTrainedTokenizerFast, response: list[int], step: int = 0, **optim: Any) -> Any:
    """(the probe, the lengths) of a rollout with these responses."""
    config = make_config(optim=optim)
    made = Passes(make_model(tokenizer, config), config)
    lengths = Lengths(prompt=[3 + row % 5 for row in range(len(response))], response=response)
    return preview.probe(lengths, config, step, made), lengths


@pytest.mark.parametrize(("rows", "looked_at"), [(1, 1), (2, 2), (8, 2), (64, 2), (95, 2), (96, 3), (512, 16)])
def test_a_32nd_of_the_rows_is_looked_at_and_two_at_least(tokenizer, rows: int, looked_at: int) -> None:
    found, _ = probed(tokenizer, [5] * rows)
    assert found.count == len(set(found.rows.tolist())) == looked_at


def test_the_rows_are_drawn_anew_at_every_step_from_those_with_a_reward(tokenizer) -> None:
    response = [0 if row % 3 == 0 else 1 + row % 7 for row in range(64)]
    config, lengths = make_config(), Lengths(prompt=[4] * 64, response=response)
    made = Passes(make_model(tokenizer, config), config)
    found = [preview.probe(lengths, config, step, made) for step in range(240)]
    draws = [frozenset(probe.rows.tolist()) for probe in found if probe is not None]
    assert len(set(draws)) > 180  # of 861 pairs
    assert frozenset.union(*draws) == {row for row in range(64) if row % 3}  # 480 draws of 42: each comes up
    assert draws[7] == frozenset(probed(tokenizer, response, 7)[0].rows.tolist())  # a resumed run draws the same


def test_without_any_reward_there_is_nothing_to_look_at_and_of_one_row_there_is_that_one(tokenizer) -> None:
    assert probed(tokenizer, [0] * 8)[0] is None
    assert probed(tokenizer, [0, 0, 4, 0, 0, 0, 0, 0])[0].rows.tolist() == [2]


def test_the_pass_is_as_wide_as_its_longest_row_and_within_the_bound_on_a_passs_tokens(tokenizer) -> None:
    found, lengths = probed(tokenizer, [1 + row for row in range(64)])
    exact = max(lengths.prompt[row] + lengths.response[row] - 1 for row in found.rows.tolist())
    assert exact <= found.width == min(-(-exact // 8) * 8, 64)  # the tiny policy has 64 positions
    assert found.length == -(-max(lengths.response[row] for row in found.rows.tolist()) // 8) * 8
    few, _ = probed(tokenizer, [1 + row for row in range(64)], microbatch_tokens=2 * exact)
    assert few.rows.tolist() == found.rows.tolist()
    one, _ = probed(tokenizer, [1 + row for row in range(64)], microbatch_tokens=2 * exact - 1)
    assert one.rows.tolist() == found.rows[:1].tolist()


# -- whole runs -----------------------------------------------------------------------------------------------------

FIGURES = {"safe/preview_kl", "safe/step_scale", "safe/scaled_steps"}


def test_a_run_records_what_it_did_from_the_policys_first_step_on(tokenizer, tmp_path: Path) -> None:
    settings = {"optim": {"learning_rate": TOO_HIGH}, "critic": {"warmup_steps": 1}}
    run = runs.finished(runs.settings(tmp_path / "run", **settings), tokenizer)
    first, *rows = runs.rows(run.run_dir)
    assert not FIGURES & first.keys()
    assert len(rows) == 3
    for row in rows:
        assert row["safe/preview_kl"] > LIMIT
        assert 0 <= row["safe/step_scale"] < 1
        assert 1 <= row["safe/scaled_steps"] <= STEPS
        assert row["policy/skipped_steps"] == 0


def test_the_ablation_without_it_has_none_of_its_figures(tokenizer, tmp_path: Path) -> None:
    run = runs.finished(runs.settings(tmp_path / "run", preset="safe-no-preview", max_steps=2), tokenizer)
    assert not FIGURES & set().union(*runs.rows(run.run_dir))


@pytest.mark.parametrize(("quiet", "looks"), [(False, 2), (True, 1)])
def test_an_update_after_a_quiet_one_looks_at_its_end_alone(tokenizer, quiet: bool, looks: int) -> None:
    config = make_config(optim={"max_preview_kl": LOOSE, "learning_rate": HEALTHY})
    model = make_model(tokenizer, config)
    made, rollout = Passes(model, config), make_rollout(len(tokenizer))
    optimizer = torch.optim.AdamW(optimize.optimizer_groups(model, config), fused=True)
    measured = optimize.measure(made, rollout, config, 0)
    batch, _ = optimize.make_batch(model, measured, rollout.scores, decide(0.3), config)
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0].ids)))
    stats = optimize.update(made, optimizer, batch, decide(0.3), config, 0, quiet)
    assert rows.count(preview.FEWEST) == looks
    assert stats.quiet
