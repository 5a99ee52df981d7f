"""The rows that the preview looks at, when it looks, and the cost of that."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from stable_rlhf import Config
from stable_rlhf.learner import Preview, make_preview, update
from stable_rlhf.learner import step_preview as preview
from stable_rlhf.learner.microbatches import Grain, Lengths
from stable_rlhf.policy.actor_critic import ActorCritic
from tests import graphs_on_cpu as reruns
from tests import tiny_runs as runs
from tests.tiny_previews import (
    FULL_OR_LORA,
    HEALTHY,
    LIMIT,
    LOOSE,
    STEPS,
    TOO_HIGH,
    assert_identical,
    updated,
)
from tests.tiny_updates import (
    assert_same,
    decide,
    make_config,
    make_model,
    make_optimizer,
    make_rollout,
    measured_batch,
    passes_of,
    weights,
)

# -- what it costs, and where it runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "looks"), [(None, 0), (LIMIT, 2), (1e-3, 2 * STEPS)])
def test_it_costs_two_forwards_a_scaled_step_two_an_update_where_little_moves_and_none_where_it_is_off(
    tokenizer, limit: float | None, looks: int
) -> None:
    """The steps here move 0.003 to 0.005 nats, and one scaling by max / KL always ends within the bound."""
    rows: list[int] = []

    def prepare(model: ActorCritic, _: torch.optim.Optimizer) -> None:
        model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0].ids)))

    updated(tokenizer, limit, HEALTHY, prepare=prepare)
    assert rows.count(preview.FEWEST) == looks
    assert len(rows) == STEPS + looks


def test_a_step_whose_logits_are_not_finite_is_looked_at_once(tokenizer) -> None:
    """No share of it could be found by its KL, which is not a number."""
    rows: list[int] = []

    def prepare(model: ActorCritic, _: torch.optim.Optimizer) -> None:
        model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0].ids)))

    updated(tokenizer, LIMIT, 1e38, prepare=prepare)
    assert rows[:4] == [4, preview.FEWEST, 3, preview.FEWEST]  # two minibatches, a row of which has no reward


@FULL_OR_LORA
@pytest.mark.parametrize("learning_rate", [HEALTHY, TOO_HIGH])
def test_with_graphs_the_steps_are_those_without(
    tokenizer, learning_rate: float, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured = reruns.use(monkeypatch)
    monkeypatch.setattr(
        "stable_rlhf.learner.replayed.ROWS", 1
    )  # no rows or columns that only fill a shape: equal to the bit
    monkeypatch.setattr("stable_rlhf.learner.replayed.COLUMNS", 8)
    by_hand = updated(tokenizer, LIMIT, learning_rate, adapter=adapter)
    assert captured == []
    replayed = updated(tokenizer, LIMIT, learning_rate, adapter=adapter, model={"cuda_graphs": True})
    assert [work.__name__ for work in captured].count("look") == 1
    assert_identical(replayed, by_hand)
    assert replayed.metrics == by_hand.metrics


# -- the rows that are looked at ------------------------------------------------------------------------------------


GRAIN = Grain(columns=8, limit=64)


def probed(response: list[int], step: int = 0, **optim: Any) -> Any:
    """(the probe, the lengths) of a rollout with these responses."""
    config = make_config(optim=optim)
    lengths = Lengths(prompt=[3 + row % 5 for row in range(len(response))], response=response)
    return preview.probe(lengths, config.optim, config.seed, step, GRAIN), lengths


@pytest.mark.parametrize(("rows", "looked_at"), [(1, 1), (2, 2), (8, 2), (64, 2), (95, 2), (96, 3), (512, 16)])
def test_a_32nd_of_the_rows_is_looked_at_and_two_at_least(rows: int, looked_at: int) -> None:
    found, _ = probed([5] * rows)
    assert found.count == len(set(found.rows.tolist())) == looked_at


def test_the_rows_are_drawn_anew_at_every_step_from_those_with_a_reward() -> None:
    response = [0 if row % 3 == 0 else 1 + row % 7 for row in range(64)]
    found = [probed(response, step)[0] for step in range(240)]
    draws = [frozenset(probe.rows.tolist()) for probe in found if probe is not None]
    assert len(set(draws)) > 180  # of 861 pairs
    assert frozenset.union(*draws) == {row for row in range(64) if row % 3}  # 480 draws of 42: each comes up
    assert draws[7] == frozenset(probed(response, 7)[0].rows.tolist())  # a resumed run draws the same


def test_without_any_reward_there_is_nothing_to_look_at_and_of_one_row_there_is_that_one() -> None:
    assert probed([0] * 8)[0] is None
    assert probed([0, 0, 4, 0, 0, 0, 0, 0])[0].rows.tolist() == [2]


def test_the_pass_is_as_wide_as_its_longest_row_and_within_the_bound_on_a_passs_tokens() -> None:
    found, lengths = probed([1 + row for row in range(64)])
    exact = max(lengths.prompt[row] + lengths.response[row] - 1 for row in found.rows.tolist())
    assert exact <= found.width == min(-(-exact // 8) * 8, 64)
    assert found.length == -(-max(lengths.response[row] for row in found.rows.tolist()) // 8) * 8
    few, _ = probed([1 + row for row in range(64)], microbatch_tokens=2 * exact)
    assert few.rows.tolist() == found.rows.tolist()
    one, _ = probed([1 + row for row in range(64)], microbatch_tokens=2 * exact - 1)
    assert one.rows.tolist() == found.rows[:1].tolist()


def test_the_share_is_of_all_rows_of_the_rollout_and_one_row_is_looked_at_whatever_the_bound() -> None:
    third = [0 if row % 3 == 0 else 5 for row in range(96)]
    assert probed(third)[0].count == 3
    one, _ = probed([5] * 64, microbatch_tokens=1)
    assert one.count == len(one.rows) == 1


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


# -- from one update to the next ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Updates:
    """Updates on one rollout with one preview, and the rows of each pass of the last of them."""

    tokenizer: PreTrainedTokenizerFast
    config: Config
    skipped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.model = make_model(self.tokenizer, self.config)
        self.passes, self.optimizer = passes_of(self.model, self.config), make_optimizer(self.model, self.config)
        made = make_preview(self.passes)
        assert made is not None
        self.preview = made
        self.rows: list[int] = []
        self.model.register_forward_pre_hook(lambda _, inputs: self.rows.append(len(inputs[0].ids)))

    def update(self, step: int) -> dict[str, float | None]:
        rollout = make_rollout(len(self.tokenizer), self.skipped)
        batch = measured_batch(self.passes, rollout, 0.3, step)
        self.rows.clear()
        return update(self.passes, self.optimizer, batch, decide(0.3), step, self.preview).metrics

    @property
    def looks(self) -> int:
        return self.rows.count(preview.FEWEST)


def looked(tokenizer: PreTrainedTokenizerFast, limit: float, **sections: Any) -> Updates:
    return Updates(tokenizer, make_config(optim={"max_preview_kl": limit, "learning_rate": HEALTHY}, **sections))


@pytest.mark.parametrize(
    ("limit", "quiet", "looks", "beyond", "stays"),
    [
        (LOOSE, False, 2, False, True),
        (LOOSE, True, 1, False, True),
        (0.015, True, 1, True, True),  # all four together are beyond it, and within four times it
        (1e-3, True, 2, True, False),  # beyond that, and scaled once
    ],
)
def test_an_update_after_one_within_the_bound_looks_at_its_end_alone(
    tokenizer, limit: float, quiet: bool, looks: int, beyond: bool, stays: bool
) -> None:
    run = looked(tokenizer, limit)
    run.preview.load_state_dict({"quiet": quiet})
    metrics = run.update(0)
    assert run.looks == looks
    assert run.preview.state_dict() == {"quiet": stays}
    kl = metrics["safe/preview_kl"]
    assert kl is not None
    assert (kl > limit) is beyond
    assert metrics["safe/scaled_steps"] == (0 if stays else STEPS)


def test_the_figures_are_of_one_update_and_not_of_those_before(tokenizer) -> None:
    run = looked(tokenizer, 1e-3)
    first, second = run.update(0), run.update(1)
    assert first["safe/scaled_steps"] == second["safe/scaled_steps"] == STEPS
    assert first["safe/preview_kl"] != second["safe/preview_kl"]


def test_the_critics_warm_up_is_not_looked_at_and_the_update_after_it_looks_at_its_first_step(tokenizer) -> None:
    run = looked(tokenizer, LOOSE, critic={"warmup_steps": 5, "learning_rate": HEALTHY})
    run.preview.load_state_dict({"quiet": True})
    before = weights(run.model)
    assert not FIGURES & run.update(4).keys()
    assert run.looks == 0
    assert run.preview.state_dict() == {"quiet": False}
    after = weights(run.model)
    assert not torch.equal(after["heads.0.up.weight"], before["heads.0.up.weight"])  # the steps were taken
    assert run.update(5).keys() >= FIGURES
    assert run.looks == 2  # after the first step and at the end


def test_a_rollout_without_any_reward_is_not_looked_at_and_the_next_update_looks_at_its_first_step(tokenizer) -> None:
    run = looked(tokenizer, LOOSE)
    run.preview.load_state_dict({"quiet": True})
    batch = measured_batch(run.passes, make_rollout(len(tokenizer)), 0.3)
    run.preview.begin(batch, Lengths(prompt=[4] * 8, response=[0] * 8), 0)
    assert run.preview.metrics() == {}
    assert run.preview.state_dict() == {"quiet": False}


def test_an_update_that_was_interrupted_leaves_nothing_to_the_next(tokenizer) -> None:
    """The next is scaled towards its own first weights, over its own steps, as by a preview that is new."""
    same, new = (looked(tokenizer, 1e-3) for _ in range(2))
    for run in (same, new):
        steps: list[Any] = []

        def interrupt(*_: Any, steps: list[Any] = steps) -> None:
            steps.append(None)
            if len(steps) == 2:
                raise InterruptedError

        handle = run.optimizer.register_step_post_hook(interrupt)
        run.preview.load_state_dict({"quiet": True})
        with pytest.raises(InterruptedError):
            run.update(0)
        handle.remove()
    fresh = make_preview(new.passes)
    assert fresh is not None
    fresh.load_state_dict(new.preview.state_dict())
    new.preview = fresh
    metrics = same.update(1)
    assert metrics["safe/scaled_steps"] == STEPS
    assert metrics == new.update(1)
    assert_same(weights(same.model), weights(new.model), 0.0)


def test_no_preview_is_made_where_it_is_off(tokenizer) -> None:
    config = make_config(optim={"max_preview_kl": None})
    assert make_preview(passes_of(make_model(tokenizer, config), config)) is None


def test_a_resumed_run_looks_when_the_uninterrupted_one_does(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the second half the policy moves slowly, so that its first look waits; a preview that has forgotten this
    finds another KL."""
    settings = {"optim": {"learning_rate": HEALTHY, "max_preview_kl": LOOSE}}
    whole = runs.finished(runs.settings(tmp_path / "run", **settings), tokenizer)
    expected = (whole.run_dir / "metrics.jsonl").read_bytes()
    checkpoint = whole.run_dir / "checkpoints" / "step-000002"
    kept = tmp_path / "kept"
    shutil.copytree(checkpoint, kept)

    def resumed() -> bytes:
        shutil.copytree(kept, checkpoint, dirs_exist_ok=True)
        run = runs.trainer(runs.settings(tmp_path / "run", **settings), tokenizer)
        run.train(resume_from_checkpoint=checkpoint)
        return (run.run_dir / "metrics.jsonl").read_bytes()

    assert resumed() == expected
    monkeypatch.setattr(Preview, "load_state_dict", lambda *_: None)
    forgotten = resumed()
    assert forgotten != expected
    assert forgotten.splitlines()[:2] == expected.splitlines()[:2]
