"""Passes replayed as graphs, or compiled, are the passes run directly: the same figures, gradients and runs."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stable_rlhf import Config
from stable_rlhf.errors import ConfigError
from stable_rlhf.learner import make_preview, optimizer_groups, update
from stable_rlhf.learner import replayed as learner_replayed
from stable_rlhf.learner.objective import Scale
from stable_rlhf.learner.passes import Passes
from stable_rlhf.ops import objective
from stable_rlhf.policy.actor_critic import ActorCritic, Output
from stable_rlhf.policy.transformer import causal_lm
from stable_rlhf.records import Batch
from tests import graphs_on_cpu as reruns
from tests import tiny_runs as runs
from tests.tiny_updates import (
    assert_same,
    decide,
    make_config,
    make_model,
    make_optimizer,
    make_rollout,
    measured_batch,
    passes_of,
    some_batch,
    some_tokens,
    weights,
)

GRAPHS = {"model": {"cuda_graphs": True}}
RUNS: dict[str, dict[str, Any]] = {
    "safe": {"preset": "safe"},
    "paper": {"preset": "paper"},
    "ppo": {"preset": "ppo"},
    "warm-up of the critic": {"preset": "safe", "critic": {"warmup_steps": 2}, "optim": {"weight_decay": 0.1}},
    "exact KL in the loss": {"preset": "safe", "kl": {"in_reward": False, "in_loss": "exact"}},
    "passes of a few tokens": {"preset": "safe", "optim": {"microbatch_tokens": 20}},
    "recomputed layers": {"preset": "safe", "model": {"gradient_checkpointing": True}},
}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return reruns.use(monkeypatch)


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            whole[name] = {**whole.get(name, {}), **value} if isinstance(value, dict) else value
    return whole


def rows_of(folder: Path, tokenizer: PreTrainedTokenizerFast, adapter: bool = False, **settings: Any) -> list[dict]:
    """The metrics of a finished run, without its times."""
    model = runs.lora(runs.policy(tokenizer)) if adapter else runs.policy(tokenizer)
    run = runs.finished(runs.settings(folder, **settings), tokenizer, model=model)
    timed = ("time/", "memory/", "throughput/", "eta")
    return [{n: v for n, v in row.items() if not n.startswith(timed)} for row in runs.rows(run.run_dir)]


def assert_close(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert one.keys() == two.keys()
        for name, figure in two.items():
            if isinstance(figure, float):
                figure = pytest.approx(figure, abs=tolerance, rel=tolerance)
            assert one[name] == figure, name


# -- whole runs -----------------------------------------------------------------------------------------------------


def test_graphs_are_captured_where_they_are_asked_for(
    captured: list[Any], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    counts = {}
    for asked in (True, False, None):
        before = len(captured)
        rows_of(tmp_path / str(asked), tokenizer, max_steps=2, model={"cuda_graphs": asked, "device": "cpu"})
        counts[asked] = len(captured) - before
    assert counts[True] > 0
    assert counts[False] == counts[None] == 0  # None is for CUDA alone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_graphs_without_a_cuda_device_are_refused_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.cuda_graphs=true: needs a CUDA device"):
        runs.trainer(runs.settings(tmp_path / "run", **GRAPHS), tokenizer)


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_graphs_is_the_run_without(
    name: str,
    adapter: bool,
    captured: list[Any],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last bit, where a graph's shape is that of the microbatch; what padding does is rounding alone."""
    plain = rows_of(tmp_path / "plain", tokenizer, adapter, **RUNS[name])
    assert captured == []
    # Less of what is rounded comes back, and no look is at the edge of its limit (the preview has tests of its own).
    gentle = merged(RUNS[name], {"optim": {"learning_rate": 1e-3, "preview": False}})
    beside = rows_of(tmp_path / "beside", tokenizer, adapter, **gentle)
    padded = rows_of(tmp_path / "padded", tokenizer, adapter, **merged(gentle, GRAPHS))
    assert_close(padded, beside, 1e-4)
    monkeypatch.setattr(learner_replayed, "ROWS", 1)
    monkeypatch.setattr(learner_replayed, "COLUMNS", 8)
    captured.clear()
    replayed = rows_of(tmp_path / "graphs", tokenizer, adapter, **merged(RUNS[name], GRAPHS))
    assert len(captured) > 4
    assert len(plain) == 4
    assert_close(replayed, plain, 0.0)


def compiler() -> str | None:
    return shutil.which("g++") or shutil.which("clang++")


# Of torch's own modules, that compiling imports, and of what Dynamo looks at as it traces.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", r"ignore:The \.grad attribute of a Tensor:UserWarning")
@pytest.mark.skipif(compiler() is None, reason="torch.compile needs a C++ compiler on the CPU: no g++ or clang++")
def test_a_compiled_model_gives_the_figures_of_the_plain_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    settings = {"max_steps": 1, "save_steps": 0}
    plain = rows_of(tmp_path / "plain", tokenizer, **settings)
    programs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled = rows_of(tmp_path / "compiled", tokenizer, model={"torch_compile": True}, **settings)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > programs
    assert_close(compiled, plain, 1e-5)


# -- one update -----------------------------------------------------------------------------------------------------


def updated(
    tokenizer: PreTrainedTokenizerFast, config: Config, adapter: bool, times: int = 3, step: int = 0, onward: int = 0
) -> tuple[list[dict[str, float]], ActorCritic, list[dict[str, tuple[int, Tensor]]]]:
    """(metrics of each of some updates on one rollout, the model, addresses and values of gradients at each step)."""
    model = make_model(tokenizer, config, adapter)
    made = passes_of(model, config)
    preview, groups = make_preview(made), optimizer_groups(model, config.optim, config.critic)
    optimizer = torch.optim.SGD([{**group, "lr": 0.05} for group in groups], fused=True)
    seen: list[dict[str, tuple[int, Tensor]]] = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            {n: (p.grad.data_ptr(), p.grad.clone()) for n, p in model.named_parameters() if p.grad is not None}
        )
    )
    rollout, metrics = make_rollout(len(tokenizer), skipped=(1,)), []
    for turn in range(times):
        at = step + turn * onward
        batch = measured_batch(made, rollout, 0.3, at, preview)
        metrics.append(update(made, optimizer, batch, decide(0.3), at, preview).metrics)
        assert all(parameter.grad is None for parameter in model.parameters())
    return metrics, model, seen


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("optim", [{}, {"microbatch_tokens": 20}, {"num_mini_batches": 1}, {"num_mini_batches": 4}])
def test_updates_with_graphs_have_the_gradients_and_weights_of_those_without(
    tokenizer: PreTrainedTokenizerFast, optim: dict[str, Any], adapter: bool
) -> None:
    """Minibatches of 2, 4 and 8 rows, where a graph has 8: what is left over must change nothing."""
    plain, own, by_hand = updated(tokenizer, make_config("paper", optim=optim), adapter)
    replayed, other, replays = updated(tokenizer, make_config("paper", optim=optim, **GRAPHS), adapter)
    assert_close(replayed, plain, 1e-5)
    assert_same(weights(other), weights(own), 2e-6)
    assert len(by_hand) == len(replays) > 2
    for one, two in zip(by_hand, replays, strict=True):
        assert_same({n: g for n, (_, g) in two.items()}, {n: g for n, (_, g) in one.items()}, 2e-5)


@pytest.mark.usefixtures("captured")
def test_gradients_are_the_same_tensors_from_the_first_step_to_the_last(tokenizer: PreTrainedTokenizerFast) -> None:
    _, model, seen = updated(tokenizer, make_config(**GRAPHS), adapter=False)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(set(step) == trained for step in seen)
    addresses = [{name: address for name, (address, _) in step.items()} for step in seen]
    assert all(step == addresses[0] for step in addresses)
    assert len(set(addresses[0].values())) == len(trained)


@pytest.mark.usefixtures("captured")
def test_during_the_critics_warm_up_the_optimiser_is_given_the_critics_gradients_alone(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    config = make_config(critic={"warmup_steps": 1}, optim={"entropy_coef": 0.1}, **GRAPHS)
    model = make_model(tokenizer, config)
    before = weights(model)
    _, model, seen = updated(tokenizer, config, adapter=False, step=0)
    assert all(set(step) == {n for n, _ in model.named_parameters() if n.startswith("heads.")} for step in seen)
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("policy."))
    assert not torch.equal(after["heads.0.up.weight"], before["heads.0.up.weight"])


@pytest.mark.usefixtures("captured")
def test_after_the_policy_has_not_stepped_a_graphs_gradients_are_where_it_writes(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critic's gradient reaches the policy; in the warm-up it is dropped, and moves nothing."""
    seen: list[list[int | None]] = []
    real = torch.nn.utils.clip_grad_norm_

    def watched(parameters: list[Tensor], *rest: Any) -> Tensor:
        seen.append([None if p.grad is None else p.grad.data_ptr() for p in parameters])
        return real(parameters, *rest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    config = make_config(critic={"warmup_steps": 1, "backbone_gradient": True}, **GRAPHS)
    metrics, _, steps = updated(tokenizer, config, adapter=False, onward=1)
    assert metrics[0]["grad_norm/policy"] == 0
    assert all(figures["grad_norm/policy"] > 0 for figures in metrics[1:])
    policys, critics = seen[::2], seen[1::2]
    assert len(policys) == len(critics) == len(steps) > 4
    quiet = len(steps) // len(metrics)  # the warm-up's
    assert all(set(addresses) == {None} for addresses in policys[:quiet])
    for addresses in (policys[quiet:], critics):
        assert None not in addresses[0]
        assert all(step == addresses[0] for step in addresses)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("mini_batches", [1, 2, 4])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_first_minibatchs_ratio_is_exactly_1_with_graphs(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, adapter: bool, mini_batches: int
) -> None:
    """Also where a shape is measured directly, at its first sighting, and learned from by its graphs."""
    ratios: list[Tensor] = []
    real = objective.ppo_clip_loss

    def watched(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, *rest: Any) -> Any:
        result = real(logp, old_logp, advantages, mask, *rest)
        if mask.any():  # not a warm-up
            ratios.append(result.ratio[mask])
        return result

    monkeypatch.setattr("stable_rlhf.learner.objective.ppo_clip_loss", watched)
    config = make_config(optim={"num_mini_batches": mini_batches, "num_iterations": 1, "learning_rate": 1e-2}, **GRAPHS)
    model, rollout = make_model(tokenizer, config, adapter), make_rollout(len(tokenizer))
    made, optimizer = passes_of(model, config), make_optimizer(model, config)
    for step in range(4):
        ratios.clear()
        update(made, optimizer, measured_batch(made, rollout, 0.1, step), decide(0.1), step)
        assert torch.equal(ratios[0], torch.ones_like(ratios[0])), f"step {step}"


# -- shapes ---------------------------------------------------------------------------------------------------------


def learned(made: Passes, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """(figures, gradients) of one microbatch."""
    tokens = batch.tokens.mask.sum().float()
    with made.training():
        _, figures = made.learn(
            batch, Scale(kl_coef=torch.tensor(0.3), tokens=tokens, policy=tokens), learns_policy=True
        )
        trained = [p for p in made.model.parameters() if p.requires_grad]
        return figures, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]


@pytest.mark.parametrize("rows", [1, 3, 7, 8])
def test_rows_left_over_in_a_shape_change_nothing_whatever_they_hold(
    captured: list[Any], tokenizer: PreTrainedTokenizerFast, rows: int
) -> None:
    config = make_config("paper", **GRAPHS)
    made = passes_of(make_model(tokenizer, config), config)
    direct = passes_of(made.model, make_config("paper"))
    full = some_batch(8, 32, 8, seed=1, heads=2)
    # What they leave: ratios of e^90, and values that are not finite.
    wild = dataclasses.replace(full, logp=full.logp - 90, values=full.values * float("inf"), returns=full.returns / 0)
    for batch in (wild, wild):
        learned(made, batch)
    assert len(captured) == 3
    few = some_batch(rows, 32, 8, seed=2, heads=2)
    figures, gradients = learned(made, few)
    expected_figures, expected = learned(direct, few)
    assert len(captured) == 3
    torch.testing.assert_close(figures, expected_figures, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)
    out, ref_logp = made.measure(few.tokens, learns_policy=True)
    own, own_ref_logp = direct.measure(few.tokens, learns_policy=True)
    mask = few.tokens.mask
    torch.testing.assert_close(ref_logp[:rows][mask], own_ref_logp[mask], atol=1e-5, rtol=0)
    for name in ("logp", "entropy"):
        torch.testing.assert_close(getattr(out, name)[:rows][mask], getattr(own, name)[mask], atol=1e-5, rtol=0)


def test_a_measurement_replays_the_very_forward_that_is_learned_from(
    captured: list[Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = make_config(**GRAPHS)
    made = passes_of(make_model(tokenizer, config), config)
    tokens = some_tokens(8, 32, 8)
    for _ in range(2):
        made.measure(tokens, learns_policy=True)
    assert len(captured) == 3
    learned(made, some_batch(8, 32, 8))
    assert len(captured) == 3


def test_a_shape_is_captured_when_it_comes_again_and_the_one_not_used_for_longest_goes(
    captured: list[Any], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner_replayed, "GRAPHS", 2)
    config = make_config(**GRAPHS)
    made = passes_of(make_model(tokenizer, config), config)

    def comes(width: int, rows: int = 8, learns_policy: bool = True) -> int:
        """Shapes captured, after tokens of this shape."""
        made.measure(some_tokens(rows, width, 4), learns_policy)
        return len(captured) // 3

    assert [comes(16), comes(16), comes(16)] == [0, 1, 1]
    assert [comes(24), comes(24)] == [1, 2]
    assert [comes(16), comes(32), comes(32)] == [2, 2, 3]  # 24 goes
    assert [comes(16), comes(32)] == [3, 3]
    assert [comes(24), comes(32), comes(16)] == [4, 4, 5]  # seen before: captured at once, and 16 goes
    assert [comes(16, rows=16), comes(16, rows=16)] == [5, 6]
    assert [comes(16, learns_policy=False), comes(16, learns_policy=False)] == [6, 7]


def test_without_graphs_no_row_is_added_and_no_gradient_is_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    config = make_config()
    made = passes_of(make_model(tokenizer, config), config)
    assert made.grain == (1, 8, 64)  # the tiny policy has 64 positions
    out, _ = made.measure(some_tokens(3, 16, 4), learns_policy=True)
    assert isinstance(out, Output)
    assert out.logp.shape == (3, 4)
    assert not out.logp.requires_grad


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("settings", [{}, GRAPHS], ids=["free", "graphs"])
def test_gradients_left_by_others_are_not_added_to(tokenizer: PreTrainedTokenizerFast, settings: dict) -> None:
    config = make_config(**settings)
    made = passes_of(make_model(tokenizer, config), config)
    batch = some_batch(4, 32, 8)
    _, expected = learned(made, batch)
    trained = [p for p in made.model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.full_like(parameter, 7.0)
    _, gradients = learned(made, batch)
    torch.testing.assert_close(gradients, expected, atol=1e-6, rtol=0)
    assert all(p.grad is None for p in trained)


def test_the_warm_up_measures_and_learns_by_the_same_graphs(
    captured: list[Any], tokenizer: PreTrainedTokenizerFast
) -> None:
    config = make_config(critic={"warmup_steps": 1}, optim={"num_iterations": 1, "num_mini_batches": 1}, **GRAPHS)
    updated(tokenizer, config, adapter=False, times=2)
    assert len(captured) == 3


@pytest.mark.parametrize("in_loss", ["k2", "exact"])
def test_the_reference_runs_for_the_kl_over_the_vocabulary_only_while_the_policy_learns(
    tokenizer: PreTrainedTokenizerFast, in_loss: str
) -> None:
    config = make_config(kl={"in_reward": False, "in_loss": in_loss})
    model = make_model(tokenizer, config, adapter=True)  # policy and reference are one decoder
    made, batch = passes_of(model, config), some_batch(3, 16, 4)
    scale = Scale(kl_coef=torch.tensor(0.3), tokens=torch.tensor(9.0), policy=torch.tensor(9.0))
    ran: list[int] = []
    causal_lm(model.policy).get_decoder().register_forward_pre_hook(lambda *_: ran.append(1))
    counts = []
    for learns_policy in (False, True):
        ran.clear()
        with made.training():
            made.learn(batch, scale, learns_policy)
        counts.append(len(ran))
    ran.clear()
    made.hidden(batch.tokens)
    assert (counts, len(ran)) == ([1, 2 if in_loss == "exact" else 1], 1)


@pytest.mark.usefixtures("captured")
@pytest.mark.parametrize("settings", [{}, GRAPHS], ids=["free", "graphs"])
def test_a_failed_update_leaves_no_gradient(tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any]) -> None:
    config = make_config(**settings)
    made = passes_of(make_model(tokenizer, config), config)

    def fails() -> None:
        with made.training():
            scale = Scale(kl_coef=torch.tensor(0.1), tokens=torch.tensor(9.0), policy=torch.tensor(9.0))
            made.learn(some_batch(8, 32, 8), scale, learns_policy=True)
            assert all(p.grad is not None for p in made.model.parameters() if p.requires_grad)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fails()
    assert all(p.grad is None for p in made.model.parameters())
