"""Every figure and every gradient of an update against loops in float64, at a temperature of sampling that is not 1."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stable_rlhf import errors
from stable_rlhf.data.chat import prompt_text
from stable_rlhf.learner import figures as learner_figures
from stable_rlhf.learner.batch import make_batch
from stable_rlhf.learner.measure import check_finite, measure, observe
from stable_rlhf.learner.microbatches import permutation
from stable_rlhf.learner.update import optimizer_groups, update
from stable_rlhf.records import Batch
from stable_rlhf.training.rows import completion_rows
from tests.oracles import reductions
from tests.oracles import update as oracle
from tests.tiny_updates import (
    ONE_STEP,
    ROWS,
    decide,
    learn,
    learning,
    make_config,
    make_model,
    make_rollout,
    passes_of,
    weights,
)

TEMPERATURE = 0.6
KL_COEF = 0.4
SKIPPED = (1, 5)

CASES: dict[str, dict[str, Any]] = {
    "safe": {"critic": {"vf_coef": 0.7, "cliprange_value": 0.05, "backbone_gradient": True}},
    "two heads": {"critic": {"heads": 2, "vf_coef": 0.7, "cliprange_value": 0.05, "backbone_gradient": True}},
    "each head": {
        "critic": {
            "heads": 2,
            "regress": "each",
            "loss": "huber",
            "huber_delta": 0.8,
            "cliprange_value": 0.1,
            "clip_reduction": "max",
        }
    },
    "paper": {"preset": "paper", "optim": {"epsilon": 0.05}},
    "exact": {"kl": {"in_reward": False, "in_loss": "exact"}, "critic": {"heads": 2, "regress": "soft_min"}},
    "ppo": {"preset": "ppo", "critic": {"cliprange_value": 0.2}, "optim": {"entropy_coef": 0.2}},
    "no clip of the values": {"critic": {"heads": 2, "cliprange_value": None, "vf_coef": 2.0}},
}


@dataclasses.dataclass
class Step:
    state: dict[str, Tensor]
    """Weights before it."""
    gradients: dict[str, Tensor]
    """As the optimiser was given them: clipped."""


def settings(case: str) -> Any:
    given = CASES[case]
    optim = {"epsilon": 0.1, "learning_rate": 6e-4, "max_grad_norm": 0.3, "microbatch_tokens": 20}
    return make_config(
        given.get("preset", "safe"),
        optim={**optim, **given.get("optim", {})},
        critic={"max_grad_norm": 0.03, "learning_rate": 2e-2, **given.get("critic", {})},
        rollout={"temperature": TEMPERATURE},
        **({"kl": given["kl"]} if "kl" in given else {}),
    )


def updated(tokenizer, case: str, adapter: bool) -> tuple[Any, Batch, dict[str, float], list[Step], Any]:
    """(model, batch, metrics, steps, configuration) of an update of 2 passes of 2 minibatches."""
    config = settings(case)
    model = make_model(tokenizer, config, adapter)
    made, rollout = passes_of(model, config), make_rollout(len(tokenizer), SKIPPED)
    measured = measure(made, rollout, 3)
    batch, _ = make_batch(model, measured, rollout.scores, decide(KL_COEF), learning(config))
    optimizer = torch.optim.AdamW(optimizer_groups(model, config.optim, config.critic), fused=True)
    steps: list[Step] = []
    optimizer.register_step_pre_hook(
        lambda *_: steps.append(
            Step(weights(model), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    )
    metrics = update(made, optimizer, batch, decide(KL_COEF), 3).metrics
    return model, batch, metrics, steps, config


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_and_figures_of_every_step_are_those_of_the_loss_token_by_token(
    tokenizer, case: str, adapter: bool
) -> None:
    """The later steps too, where ratios and values have moved, and some of them beyond their clips."""
    model, batch, metrics, steps, config = updated(tokenizer, case, adapter)
    minibatches = [rows.tolist() for turn in (0, 1) for rows in permutation(ROWS, config.seed, 3, turn).chunk(2)]
    assert len(steps) == len(minibatches) == 4
    found: list[dict[str, float]] = []
    ratios: list[list[float]] = []
    for step, rows in zip(steps, minibatches, strict=True):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(step.state[name])
        wide = oracle.in_float64(model)
        loss, figures, ratio = oracle.step(wide, batch, rows, config, KL_COEF)
        loss.backward()
        expected = {name: p.grad for name, p in wide.named_parameters() if p.grad is not None}
        assert step.gradients.keys() == expected.keys()
        for group, prefix, most in (
            ("policy", "policy.", config.optim.max_grad_norm),
            ("critic", "heads.", config.critic.max_grad_norm),
        ):
            own = {name: gradient for name, gradient in expected.items() if name.startswith(prefix)}
            norm = math.sqrt(math.fsum(gradient.square().sum().item() for gradient in own.values()))
            figures[f"grad_norm/{group}"] = norm
            assert norm > 0.01
            share = min(1.0, most / norm)
            for name, gradient in own.items():
                torch.testing.assert_close(
                    step.gradients[name].double(), share * gradient, atol=1e-5 * min(norm, most), rtol=1e-4,
                    msg=lambda text, name=name: f"{name}: {text}",
                )  # fmt: skip
        found.append(figures)
        ratios.append(ratio)
    means = {name: math.fsum(figures[name] for figures in found) / len(found) for name in found[0]}
    # Each step weighs the same, whatever its number of tokens.
    spread = math.fsum(reductions.mean([(r - means["val/ratio"]) ** 2 for r in ratio]) for ratio in ratios) / 4
    expected_row = {**means, "val/ratio_var": spread, "policy/skipped_steps": 0}
    assert metrics == pytest.approx(expected_row, rel=2e-4, abs=2e-6)
    # There is something to see in each of them.
    assert means["policy/clipfrac_avg"] > 0.02
    assert (means["val/clipfrac_avg"] > 0.02) == (config.critic.cliprange_value is not None)
    assert spread > 1e-3
    assert metrics["grad_norm/policy"] > config.optim.max_grad_norm


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_a_rollout_is_measured_at_the_temperature_that_it_was_sampled_at(tokenizer, adapter: bool) -> None:
    config = settings("exact")
    model, rollout = make_model(tokenizer, config, adapter), make_rollout(len(tokenizer), SKIPPED)
    measured = measure(passes_of(model, config), rollout, 3)
    seen = 0
    for row, t, expected in oracle.measured(oracle.in_float64(model), measured.tokens, TEMPERATURE):
        for name in ("logp", "ref_logp", "entropy"):
            assert getattr(measured, name)[row, t].item() == pytest.approx(expected[name], abs=1e-5), name
        assert measured.values[:, row, t].tolist() == pytest.approx(expected["values"], abs=1e-5)
        assert measured.targets[:, row, t].tolist() == pytest.approx(expected["targets"], abs=1e-5)
        seen += 1
    assert seen == measured.tokens.mask.sum() == 31 - 1 - 2


@pytest.mark.parametrize("bootstrap", ["online", "target", "mixed"])
@pytest.mark.parametrize("heads", [1, 2])
def test_the_figures_of_a_batch_are_those_of_loops_over_its_tokens(tokenizer, heads: int, bootstrap: str) -> None:
    optim = {"gamma": 0.9, "lam": 0.8}
    config = make_config(optim=optim, critic={"bootstrap": bootstrap, "heads": heads, "lam": 0.7})
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer), SKIPPED)
    measured = measure(passes_of(model, config), rollout, 0)
    batch, found = make_batch(model, measured, rollout.scores, decide(KL_COEF), learning(config))
    mask = measured.tokens.mask
    heads_of = [measured.values[head].double() for head in range(heads)]
    online, target = (
        [
            oracle.soft_min([all_heads[head, row, t] for head in range(heads)], config.critic.temperature).item()
            for row, t in mask.nonzero().tolist()
        ]
        for all_heads in (measured.values.double(), measured.targets.double())
    )
    returns = reductions.kept(batch.returns, mask)
    left = [g - v for g, v in zip(returns, online, strict=True)]
    expected = {
        "objective/non_score_reward": -KL_COEF
        * math.fsum(reductions.kept(measured.logp.double() - measured.ref_logp.double(), mask))
        / (ROWS - len(SKIPPED)),
        "val/explained_variance": 1 - reductions.variance(left) / reductions.variance(returns),
        "val/mean": reductions.mean(online),
        "val/returns_mean": reductions.mean(returns),
        "safe/target_gap": reductions.mean([abs(a - b) for a, b in zip(online, target, strict=True)]),
    }
    if heads == 2:
        expected["safe/head_gap"] = reductions.mean(reductions.kept((heads_of[0] - heads_of[1]).abs(), mask))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_kl_part_of_the_reward_is_0_where_the_kl_acts_in_the_loss(tokenizer) -> None:
    config = make_config(kl={"in_reward": False, "in_loss": "k2"})
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer))
    measured = measure(passes_of(model, config), rollout, 0)
    _, found = make_batch(model, measured, rollout.scores, decide(KL_COEF), learning(config))
    assert found["objective/non_score_reward"] == 0.0


@pytest.mark.parametrize("observed", ["k1", "exact"])
def test_the_controller_is_given_the_kl_its_error_and_the_entropy_at_the_temperature(tokenizer, observed: str) -> None:
    config = make_config(kl={"observe": observed}, rollout={"temperature": TEMPERATURE})
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer), SKIPPED)
    measured = measure(passes_of(model, config), rollout, 0)
    places = list(oracle.measured(oracle.in_float64(model), measured.tokens, TEMPERATURE))
    rows = [figures for *_, figures in places]
    seen = observe(11, rollout, measured)
    ratios = [figures["logp"] - figures["ref_logp"] for figures in rows]
    assert min(ratios) < 0 < max(ratios)
    kls = ratios if observed == "k1" else [figures["exact_kl"] for figures in rows]
    assert seen.kl == pytest.approx(reductions.mean(kls), abs=1e-5)
    by_row = [
        [kl for (row, *_), kl in zip(places, kls, strict=True) if row == one]
        for one in sorted({row for row, *_ in places})
    ]
    squares = math.fsum((math.fsum(of_row) - seen.kl * len(of_row)) ** 2 for of_row in by_row)
    count = len(by_row)
    assert seen.kl_error == pytest.approx(math.sqrt(squares * count / (count - 1)) / len(kls), rel=1e-4)
    assert seen.length == pytest.approx(len(kls) / count)
    assert seen.entropy == pytest.approx(reductions.mean([figures["entropy"] for figures in rows]), abs=1e-5)
    scores = [score for row, score in enumerate(rollout.scores) if row not in SKIPPED]
    assert (seen.step, seen.reward) == (11, pytest.approx(math.fsum(scores) / len(scores)))


@pytest.mark.parametrize("step", [0, 5, 8])
def test_a_rollout_is_measured_by_the_passes_that_the_first_of_its_update_makes_again(tokenizer, step: int) -> None:
    """The same rows in the same shapes, so that the ratio is exactly 1, whatever a device rounds."""
    config = make_config(
        optim={"num_iterations": 1, "num_mini_batches": 2, "learning_rate": 1e-30, "microbatch_tokens": 24},
        rollout={"temperature": TEMPERATURE},
    )
    model = make_model(tokenizer, config)
    passes: list[tuple[list[list[int]], list[list[int]]]] = []
    model.register_forward_pre_hook(
        lambda _, inputs: passes.append((inputs[0].ids.tolist(), inputs[0].response.tolist()))
    )
    metrics, _ = learn(model, make_rollout(len(tokenizer)), config, step=step)
    assert len(passes) > 4
    assert passes[: len(passes) // 2] == passes[len(passes) // 2 :]
    assert {len(row) % 8 for grids in passes for rows in grids for row in rows} == {
        0
    }  # whole groups of columns: few shapes
    assert metrics["policy/approxkl_avg"] == 0.0


def test_the_variance_of_a_ratio_that_rounding_alone_moves_is_never_negative(tokenizer) -> None:
    """A row a pass: 5/9 + 3/9 + 1/9 in float32 is not exactly 1, and the squares about 1 add up to 0."""
    config = make_config(optim={**ONE_STEP, "microbatch_tokens": 1, "learning_rate": 1e-30})
    means = []
    for kept in ((0, 1, 4), (1, 3, 4), (1, 4, 6), (0, 1, 2, 6)):
        rollout = make_rollout(len(tokenizer), skipped=tuple(row for row in range(ROWS) if row not in kept))
        metrics, _ = learn(make_model(tokenizer, config), rollout, config)
        assert metrics["val/ratio_var"] == 0.0
        means.append(metrics["val/ratio"])
    assert means != [1.0] * 4


# -- figures of a rollout -------------------------------------------------------------------------------------------


def test_what_a_rollout_says_of_itself_is_in_its_figures(tokenizer) -> None:
    """Prompts cut, completions cut, and the rewards of each function over the rows that it gave one."""
    config = make_config()
    rollout = dataclasses.replace(
        make_rollout(len(tokenizer), SKIPPED),
        truncated=3,
        ended=[True, False, True, True, True, False, True, True],
        per_function={
            "some": [1.0, None, 0.5, 2.5, 0.0, None, None, -1.0],
            "none": [None] * ROWS,
        },
    )
    found = learner_figures.rollout_metrics(
        rollout, measure(passes_of(make_model(tokenizer, config), config), rollout, 0)
    )
    assert found["prompts/truncated"] == 3
    assert found["completions/clipped_ratio"] == 2 / 8
    assert found["completions/skipped"] == 2
    assert found["rewards/some/mean"] == (1.0 + 0.5 + 2.5 + 0.0 - 1.0) / 5
    assert "rewards/none/mean" not in found


def test_lengths_are_of_all_completions_and_the_kl_of_those_with_a_reward(tokenizer) -> None:
    """The row left out is the only one of a single token; with it the mean and the least length differ."""
    config = make_config(rollout={"temperature": TEMPERATURE})
    rollout = make_rollout(len(tokenizer), skipped=(1,))
    model = make_model(tokenizer, config)
    measured = measure(passes_of(model, config), rollout, 0)
    found = learner_figures.rollout_metrics(rollout, measured)
    rows: dict[int, list[tuple[float, float]]] = {}
    for row, _, figures in oracle.measured(oracle.in_float64(model), measured.tokens, TEMPERATURE):
        rows.setdefault(row, []).append((figures["logp"], figures["ref_logp"]))
    ratios = [logp - ref for pairs in rows.values() for logp, ref in pairs]
    expected = {
        "completions/mean_length": 31 / 8,
        "completions/min_length": 1,
        "objective/kl": reductions.mean(ratios),
        "objective/kl_k3": reductions.mean([math.exp(-ratio) - 1 + ratio for ratio in ratios]),
        "objective/kl_per_sequence": math.fsum(ratios) / 7,
        "objective/ref_nll": -reductions.mean([ref for pairs in rows.values() for _, ref in pairs]),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_a_stored_completion_of_a_chat_has_its_messages_as_text(tokenizer) -> None:
    config = make_config()
    rollout = make_rollout(len(tokenizer))
    chat = [{"role": "user", "content": "a question"}]
    rollout = dataclasses.replace(rollout, prompts=[chat, *rollout.prompts[1:]])
    measured = measure(passes_of(make_model(tokenizer, config), config), rollout, 0)
    stored = completion_rows(rollout, measured)
    assert stored[0]["prompt"] == prompt_text(chat) != str(chat)
    mask = measured.tokens.mask
    for row, one in enumerate(stored):
        kl = math.fsum(reductions.kept(measured.logp[row] - measured.ref_logp[row], mask[row])) / int(mask[row].sum())
        assert one["kl"] == pytest.approx(kl, abs=1e-6)


# -- figures that are not numbers -----------------------------------------------------------------------------------


def test_undefined_figures_are_none_and_broken_ones_stay_not_numbers() -> None:
    found = learner_figures.plain(
        {"val/explained_variance": math.nan, "reward_se": math.nan, "objective/kl": math.nan, "val/mean": -0.5}
    )
    assert math.isnan(found.pop("objective/kl") or 0.0)
    assert found == {"val/explained_variance": None, "reward_se": None, "val/mean": -0.5}


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_the_first_figure_that_is_not_finite_is_named_with_the_step(odd: float) -> None:
    figures = {"fine": 1.0, "undefined": None, "broken": odd, "later": math.nan}
    with pytest.raises(errors.DivergenceError, match=rf"step 4: broken is {odd}, so the policy") as raised:
        check_finite(4, figures)
    assert raised.value.figures.keys() == figures.keys()
    check_finite(4, {"fine": 1.0, "undefined": None})


@pytest.mark.parametrize(("figure", "observed"), [("logp", "k1"), ("kl", "exact"), ("entropy", "exact")])
def test_a_controller_is_given_no_figure_that_is_not_finite(tokenizer, figure: str, observed: str) -> None:
    config = make_config(kl={"observe": observed})
    rollout = make_rollout(len(tokenizer))
    measured = measure(passes_of(make_model(tokenizer, config), config), rollout, 0)
    broken = getattr(measured, figure).clone()
    broken[3, 1] = math.inf
    with pytest.raises(errors.DivergenceError, match=r"step 2: objective/(kl|kl_exact|entropy) is inf"):
        observe(2, rollout, dataclasses.replace(measured, **{figure: broken}))
