"""SAFE's callback in TRL's own trainers, run for a few generations on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")

from transformers import TrainerCallback

from stable_rlhf import ConfigError
from stable_rlhf.control import GuardConfig
from stable_rlhf.integrations.trl import SAFECallback, figures, guarded, safe_trainer
from stable_rlhf.integrations.trl.last_good import LastGood
from stable_rlhf.integrations.trl.trust_region import SLACK
from stable_rlhf.runs import incidents, read_rows
from tests.integrations.trl_tiny import GENERATION, trainer, vowels

pytestmark = pytest.mark.filterwarnings("default")
"""TRL and Transformers warn of their own calls, each version of others."""


def rows_of(out: Path) -> list[dict[str, Any]]:
    return read_rows(out / "safe" / "metrics.jsonl")[0]


class Recorded:
    """A reward function that notes its scores and the beta that the trainer has when it is asked."""

    __name__ = "recorded"

    def __init__(self) -> None:
        self.trainer: Any = None
        self.scores: list[list[float]] = []
        self.betas: list[float] = []

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        self.scores.append(vowels(prompts, completions))
        self.betas.append(self.trainer.beta)
        return self.scores[-1]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
@pytest.mark.parametrize("every", [1, 3])
def test_each_generation_is_observed_once_and_its_decision_is_the_next_ones_beta(
    tmp_path: Path, kind: str, every: int
) -> None:
    """`every`: TRL's logging_steps, at which it clears its lists: it must not matter."""
    recorded = Recorded()
    made = recorded.trainer = trainer(tmp_path, kind, reward=recorded, logging_steps=every)
    callback = SAFECallback(made, budget=0.01)
    made.add_callback(callback)
    made.train()
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(6))
    means = [sum(scores) / len(scores) for scores in recorded.scores]
    assert [row["objective/scores"] for row in rows] == pytest.approx(means, abs=1e-6)
    unit = [1.0] * 6
    if kind == "rloo":  # the running deviation of all scores so far, in the scorer's units
        seen = [torch.tensor([each for scores in recorded.scores[: at + 1] for each in scores]) for at in range(6)]
        unit = [float(scores.std(correction=0)) for scores in seen]
    wanted = [max(1e-6, row["safe/kl_coef"] * one) for row, one in zip(rows, unit, strict=True)]
    assert recorded.betas[0] == 0.04
    assert recorded.betas[1:] == pytest.approx(wanted[:-1], rel=1e-5)
    assert made.beta == callback.monitor.coefficient
    assert made.beta == pytest.approx(wanted[-1], rel=1e-5)


def test_the_figures_are_the_means_of_what_trl_logged(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=3)
    made.add_callback(SAFECallback(made))
    made.train()
    logged = [entry for entry in made.state.log_history if "kl" in entry]
    assert len(logged) == 3 * GENERATION
    for row in rows_of(tmp_path):
        own = logged[row["step"] * GENERATION : (row["step"] + 1) * GENERATION]
        assert row["objective/kl"] == pytest.approx(sum(entry["kl"] for entry in own) / GENERATION, rel=1e-9)
        assert row["objective/entropy"] == pytest.approx(sum(entry["entropy"] for entry in own) / GENERATION, rel=1e-9)


def test_the_rows_do_not_depend_on_when_trl_logs(tmp_path: Path) -> None:
    for every in (1, 3):
        made = trainer(tmp_path / str(every), logging_steps=every)
        made.add_callback(SAFECallback(made, budget=0.01))
        made.train()
    one, three = ((tmp_path / name / "safe" / "metrics.jsonl").read_bytes() for name in ("1", "3"))
    assert one == three


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, kind: str) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3 * GENERATION}
    whole = trainer(tmp_path / "whole", kind, **saving)
    whole.add_callback(SAFECallback(whole, budget=0.05))
    whole.train()
    first = trainer(tmp_path / "run", kind, **saving)
    first.add_callback(SAFECallback(first, budget=0.05))
    first.add_callback(StopAt(4 * GENERATION))
    first.train()
    assert len(rows_of(tmp_path / "run")) == 4
    second = trainer(tmp_path / "run", kind, **saving)
    second.add_callback(SAFECallback(second, budget=0.05))
    second.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{3 * GENERATION}"))
    for name in ("metrics.jsonl", "config.yaml"):
        assert (tmp_path / "run/safe" / name).read_bytes() == (tmp_path / "whole/safe" / name).read_bytes()
    assert second.beta == whole.beta
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_checkpoint_without_the_controllers_state_is_refused(tmp_path: Path) -> None:
    plain = trainer(tmp_path, steps=1, save_strategy="steps", save_steps=GENERATION)
    plain.train()
    resumed = trainer(tmp_path, steps=2)
    resumed.add_callback(SAFECallback(resumed))
    with pytest.raises(ConfigError, match=r"checkpoint-4/safe_state\.json does not exist"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


WILD = {"learning_rate": 3e-2}
"""A rate at which eight completions throw the policy away in two generations."""


def test_a_run_that_fails_is_stopped_with_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, steps=12, **WILD)
    callback = SAFECallback(made, budget=0.02, trust_region=False)
    made.add_callback(callback)
    made.train()
    (incident,) = incidents.read(tmp_path / "safe")
    step = incident["step"]
    assert (incident["action"], incident["rule"]) == ("stop", "max_kl")
    assert made.state.global_step == (step + 1) * GENERATION < 12 * GENERATION
    assert callback.stopped is not None
    assert callback.stopped.startswith("stop: the KL is")
    assert json.loads((tmp_path / f"checkpoint-{made.state.global_step}" / "safe_state.json").read_text())
    assert "SAFE's guard stops the run at a checkpoint: stop: the KL is" in capsys.readouterr().err


class Weights(TrainerCallback):
    """Notes the weights after each generation; add it before the callback that may change them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.after: list[list[torch.Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % GENERATION == 0:
            self.after.append([weight.detach().clone() for weight in self.model.parameters()])


def test_a_guarded_run_goes_back_to_the_last_good_state_with_half_the_rate(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=6, **WILD)
    seen = Weights(made.model)
    made.add_callback(seen)
    assert guarded(made, 0.02, trust_region=False, guard=GuardConfig(max_rollbacks=10)) is made
    made.train()
    found = incidents.read(tmp_path / "safe")
    first = found[0]["step"]
    assert {each["action"] for each in found} == {"roll back"}
    assert "went back to the state after 0 steps (roll-back 1 of 10)" in found[0]["done"]
    for back, start in zip(seen.after[first + 1], seen.after[0], strict=True):
        assert torch.equal(back, start)
    rows = rows_of(tmp_path)
    assert len(rows) == 6  # it went on
    undone = [each["step"] for each in found]
    rates = [3e-2 * 0.5 ** sum(step < row["step"] for step in undone) for row in rows]
    assert [row["lr"] for row in rows] == pytest.approx(rates, rel=1e-12)
    assert made.optimizer.param_groups[0]["lr"] == pytest.approx(3e-2 * 0.5 ** len(undone), rel=1e-12)


class Fails(TrainerCallback):
    """Makes the KL of generation `at` ten nats; add it before the callback."""

    def __init__(self, made: Any, at: int) -> None:
        self.made, self.at = made, at
        self.moments: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % GENERATION == 0:
            states = list(self.made.optimizer.state.values())
            self.moments.append(states[0]["exp_avg"].clone() if states else torch.zeros(0))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == (self.at + 1) * GENERATION:
            self.made._metrics["train"]["kl"].append(1000.0)


def test_a_later_failure_goes_back_to_the_state_before_it_optimiser_and_controller_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=6, lr_scheduler_type="linear")
    seen, fails = Weights(made.model), Fails(made, 3)
    made.add_callback(seen)
    made.add_callback(fails)
    guarded(made, 0.1, guard=GuardConfig(snapshot_steps=1))
    made.train()
    (incident,) = incidents.read(tmp_path / "safe")
    assert "went back to the state after 2 steps" in incident["done"]  # that after 3 was only a candidate
    for back, good in zip(seen.after[4], seen.after[2], strict=True):
        assert torch.equal(back, good)
    assert torch.equal(fails.moments[4], fails.moments[2])
    rows = rows_of(tmp_path)
    assert rows[4]["safe/rollbacks"] == 1
    # a linear schedule from 1e-4 over 24 steps, halved after the roll-back, of each generation's last step
    wanted = [1e-4 * (1 - (GENERATION * (row["step"] + 1) - 1) / 24) * (0.5 if row["step"] > 3 else 1) for row in rows]
    assert [row["lr"] for row in rows] == pytest.approx(wanted, rel=1e-9)


def test_a_state_that_the_next_verdict_finds_suspect_is_not_gone_back_to(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.create_optimizer_and_scheduler(10)
    weight, good = next(made.model.parameters()), LastGood(made)
    first = weight.detach().clone()
    for step, suspect in ((0, False), (1, True)):
        good.keep({"steps": step})
        good.judge(suspect)
        with torch.no_grad():
            weight += 1.0
    assert good.restore(0.5) == {"steps": 0}
    assert torch.equal(weight, first)


def test_an_adapter_goes_back_too_and_the_rest_is_never_touched(tmp_path: Path) -> None:
    from peft import LoraConfig

    made = trainer(tmp_path, steps=5, peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    seen = Weights(made.model)
    made.add_callback(seen)
    made.add_callback(Fails(made, 2))
    guarded(made, 0.1, guard=GuardConfig(snapshot_steps=1))
    made.train()
    assert len(incidents.read(tmp_path / "safe")) == 1
    for (name, weight), back, good, start in zip(
        made.model.named_parameters(), seen.after[3], seen.after[1], seen.after[0], strict=True
    ):
        assert torch.equal(back, good), name
        assert weight.requires_grad or torch.equal(weight, start), name
    assert any(not torch.equal(one, other) for one, other in zip(seen.after[1], seen.after[0], strict=True))


class Poisons(TrainerCallback):
    """Makes one gradient of generation `at` NaN."""

    def __init__(self, model: Any, at: int) -> None:
        self.model, self.at = model, at

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at * GENERATION:
            next(weight for weight in self.model.parameters() if weight.grad is not None).grad[:] = float("nan")


def test_a_step_to_weights_that_are_not_finite_is_undone(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=3)
    made.add_callback(Poisons(made.model, 1))
    made.add_callback(SAFECallback(made, 0.1))
    made.train()
    assert all(torch.isfinite(weight).all() for weight in made.model.parameters())
    rows = rows_of(tmp_path)
    assert rows[1]["safe/step_scale"] <= 0.75  # one of the generation's four steps is gone
    assert len(rows) == 3


def test_an_infinite_kl_reaches_the_guard(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=4)
    fails = Fails(made, 2)
    fails.on_step_end = lambda args, state, control, **_: (  # type: ignore[method-assign]
        made._metrics["train"]["kl"].append(float("inf")) if state.global_step == 3 * GENERATION else None
    )
    made.add_callback(fails)
    made.add_callback(SAFECallback(made))
    made.train()
    (incident,) = incidents.read(tmp_path / "safe")
    assert (incident["step"], incident["rule"]) == (2, "non_finite")


def test_completions_that_are_all_cut_off_and_left_out_decide_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(tmp_path, steps=2, mask_truncated_completions=True, max_completion_length=2)
    made.add_callback(SAFECallback(made))
    made.train()
    assert made.beta == 0.04
    assert capsys.readouterr().err.count("every completion was cut off and left out; SAFE keeps beta as it is") == 2


def test_a_failing_start_keeps_the_trainers_own_beta(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=2)
    made.add_callback(Fails(made, 0))
    guarded(made, 0.1)
    betas: list[float] = []
    made.add_callback(Notes(lambda: betas.append(made.beta)))
    made.train()
    assert betas[0] == 0.04


class Notes(TrainerCallback):
    """Calls `note` at each generation's end, or at each optimiser step's beginning."""

    def __init__(self, note: Any, at: str = "end") -> None:
        self.note, self.at = note, at

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.at == "begin":
            self.note()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.at == "end" and state.global_step % GENERATION == 0:
            self.note()


def test_nothing_of_an_interrupted_generation_is_left_when_the_trainer_trains_again(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=4, save_strategy="steps", save_steps=GENERATION)
    callback = SAFECallback(made, 0.02)
    made.add_callback(callback)
    made.add_callback(StopAt(2 * GENERATION + 2))
    made.train()
    region = callback._trust_region
    assert region is not None
    assert region.begun  # of the generation that was interrupted
    begun: list[bool] = []
    made.pop_callback(StopAt)
    made.add_callback(Notes(lambda: begun.append(region.begun), at="begin"))
    made.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{GENERATION}"))
    assert begun[0] is False  # or the first step would be pulled back to where that generation began
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert all(row["objective/scores"] is not None for row in rows)


def test_a_checkpoint_of_another_run_is_not_taken_for_ones_own(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        made = trainer(tmp_path / name, steps=1, seed=seed, save_strategy="steps", save_steps=GENERATION)
        made.add_callback(SAFECallback(made))
        made.train()
    resumed = trainer(tmp_path / "one", steps=2)
    resumed.add_callback(SAFECallback(resumed))
    with pytest.raises(ConfigError, match="is of another run than the checkpoint that is resumed from"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-4"))


def distributions(model: Any, rows: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Naive: log-probabilities at every completion token of the first four rows, one row at a time, float64."""
    found = []
    for at in range(4):
        ids = torch.cat([rows["prompt_ids"][at], rows["completion_ids"][at]])[None]
        mask = torch.cat([rows["prompt_mask"][at], rows["completion_mask"][at]])[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[0].double()
        for token in range(int(rows["completion_mask"][at].sum())):
            found.append(logits[len(rows["prompt_ids"][at]) + token - 1].log_softmax(-1))
    return found


class Moves(TrainerCallback):
    """Measures, by itself, how far each generation moved the policy; add it after the callback."""

    def __init__(self, made: Any) -> None:
        self.made = made
        self.moved: list[float] = []

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in self.made.model.state_dict().items()}

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % GENERATION == 0:
            self.before = self.weights()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % GENERATION == 0:
            model, rows, after = self.made.model, self.made._buffered_inputs[0], self.weights()
            model.eval()
            new = distributions(model, rows)
            model.load_state_dict(self.before)
            old = distributions(model, rows)
            model.load_state_dict(after)
            model.train()
            kls = [float((p.exp() * (p - q)).sum()) for p, q in zip(old, new, strict=True)]
            self.moved.append(sum(kls) / len(kls))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_the_trust_region_bounds_what_a_generation_moves(tmp_path: Path, kind: str) -> None:
    made = trainer(tmp_path, kind, steps=5, **WILD)
    made.add_callback(SAFECallback(made, budget=0.1))
    moves = Moves(made)
    made.add_callback(moves)
    made.train()
    rows = rows_of(tmp_path)
    assert [row["safe/moved_kl"] for row in rows] == pytest.approx(moves.moved, rel=1e-3, abs=1e-7)
    bounds = [0.02 * 0.1, *(row["safe/update_kl"] for row in rows[:-1])]
    assert all(moved <= SLACK * bound * 1.001 for moved, bound in zip(moves.moved, bounds, strict=True))
    assert all(row["safe/step_scale"] < 0.5 for row in rows)
    assert max(moves.moved) > 0.3 * max(bounds)  # it is shortened, and not undone


def test_a_small_rate_is_not_touched(tmp_path: Path) -> None:
    weights = []
    for name, on in (("free", False), ("bounded", True)):
        made = trainer(tmp_path / name, steps=3, learning_rate=1e-6)
        made.add_callback(SAFECallback(made, trust_region=on))
        made.train()
        weights.append(list(made.model.parameters()))
    assert [row["safe/step_scale"] for row in rows_of(tmp_path / "bounded")] == [1.0] * 3
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_a_trainer_that_trains_again_is_observed_again(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=2)
    made.add_callback(SAFECallback(made, overwrite=True))
    made.train()
    made.args.max_steps = 3 * GENERATION
    made.train()
    assert made.state.global_step == 3 * GENERATION
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 2, 3, 4]  # goes on: it is the same controller


def test_a_safe_trainer_is_made_with_the_arguments_of_its_class(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=2, wrap=lambda cls: safe_trainer(cls, 0.05, settings={"gain": 0.2}))
    assert type(made).__name__ == "SAFEGRPOTrainer"
    made.train()
    assert made.safe.monitor.controller.settings.budget == 0.05
    assert made.safe.monitor.controller.settings.gain == 0.2
    assert made.safe.monitor.guard.settings.max_rollbacks == 3
    assert len(rows_of(tmp_path)) == 2


def test_a_beta_of_zero_is_refused_since_nothing_would_be_measured(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"beta=0\.0: TRL then loads no reference"):
        SAFECallback(trainer(tmp_path, beta=0.0))


def test_another_trainer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dict is not supported: give a GRPOTrainer or an RLOOTrainer"):
        SAFECallback({})


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("grpo", {}, True),
        ("grpo", {"scale_rewards": "batch"}, True),
        ("grpo", {"scale_rewards": "none"}, False),
        ("grpo", {"scale_rewards": "none", "multi_objective_aggregation": "normalize_then_sum"}, True),
        ("rloo", {}, False),
        ("rloo", {"normalize_advantages": True}, False),
    ],
)
def test_beta_is_in_the_unit_of_what_it_is_set_against(
    tmp_path: Path, kind: str, more: dict[str, Any], expected: bool
) -> None:
    made = trainer(tmp_path, kind, **more)
    assert figures.is_unit(made) is expected
    assert SAFECallback(made).monitor.units == ("deviation" if expected else "reward")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"sync_ref_model": True}, "a budget needs a reference that stays what it is"),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, "steps_per_generation to a multiple of it"),
    ],
)
def test_arguments_under_which_it_cannot_work_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SAFECallback(trainer(tmp_path, **more))


def test_a_trust_region_without_a_bound_is_refused_and_other_controllers_work_without(tmp_path: Path) -> None:
    made = trainer(tmp_path, steps=2)
    with pytest.raises(ConfigError, match="controller='fixed': it bounds no update"):
        SAFECallback(made, controller="fixed")
    made.add_callback(SAFECallback(made, controller="fixed", settings={"beta": 0.07}, trust_region=False))
    made.train()
    assert made.beta == 0.07


@pytest.mark.parametrize(
    ("version", "fits"), [("1.11.3", False), ("1.12.0", True), ("1.16.1", True), ("1.17.0", False)]
)
def test_versions_that_were_not_tested_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, version: str, fits: bool
) -> None:
    monkeypatch.setattr(figures.importlib.metadata, "version", lambda name: version)
    if fits:
        assert figures.check_version() == version
        return
    with pytest.raises(ConfigError, match=rf"TRL {version} is not supported: pip install 'trl>=1\.12,<1\.17'"):
        figures.check_version()


def test_rewards_that_nobody_could_give_leave_beta_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def sometimes(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        calls.append(1)
        return [None] * len(completions) if len(calls) == 3 else vowels(prompts, completions)

    made = trainer(tmp_path, steps=4, reward=sometimes)
    made.add_callback(SAFECallback(made))
    made.train()
    assert len(rows_of(tmp_path)) == 3
    assert "no completion was scored; SAFE keeps beta as it is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "expected"),
    [(["a b a b"], 2 / 3), (["a b", "a b"], 0.5), (["a", ""], None), ([], None), (["x x x x"], 1 / 3)],
)
def test_distinct_2_is_over_words(texts: list[str], expected: float | None) -> None:
    assert figures.distinct_words(texts) == expected


def test_the_text_of_a_chat_is_what_its_messages_say() -> None:
    assert figures.text_of([{"role": "assistant", "content": "a b"}, {"role": "tool", "content": None}]) == "a b"


@pytest.mark.slow
def test_two_processes_have_the_same_beta_and_write_one_file(tmp_path: Path) -> None:
    script = Path(__file__).with_name("trl_two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run([*command, str(tmp_path)], check=True, env=environment, timeout=300)
    one, two = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert one == two
    rows = rows_of(tmp_path)
    assert len(rows) == 4
    assert one["betas"][1:] == [max(1e-6, row["safe/kl_coef"]) for row in rows[:3]]
