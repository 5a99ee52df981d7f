"""The rows that the preview looks at, when it looks, and the cost of that."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from stable_rlhf import Config
from stable_rlhf.learner import Preview, make_preview, update
from stable_rlhf.learner import step_preview as preview
from stable_rlhf.learner.microbatches import Grain, Lengths
from stable_rlhf.records import Tokens
from tests import graphs_on_cpu as reruns
from tests import tiny_runs as runs
from tests.tiny_previews import (
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


@pytest.mark.parametrize("adapter", [False, True])
def test_with_graphs_the_update_is_the_one_without(tokenizer, adapter: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = reruns.use(monkeypatch)
    monkeypatch.setattr(
        "stable_rlhf.learner.replayed.ROWS", 1
    )  # no rows or columns that only fill a shape: equal to the bit
    monkeypatch.setattr("stable_rlhf.learner.replayed.COLUMNS", 8)
    by_hand = updated(tokenizer, LIMIT, TOO_HIGH, adapter=adapter)
    assert captured == []
    replayed = updated(tokenizer, LIMIT, TOO_HIGH, adapter=adapter, model={"cuda_graphs": True})
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


@pytest.mark.parametrize(("rows", "looked_at"), [(1, 1), (2, 2), (8, 4), (64, 4), (79, 4), (80, 5), (512, 32)])
def test_a_16th_of_the_rows_is_looked_at_and_four_at_least(rows: int, looked_at: int) -> None:
    found, _ = probed([5] * rows)
    assert found.count == len(set(found.rows.tolist())) == looked_at


def test_the_rows_are_drawn_anew_at_every_step_from_those_with_a_reward() -> None:
    response = [0 if row % 3 == 0 else 1 + row % 7 for row in range(64)]
    found = [probed(response, step)[0] for step in range(240)]
    draws = [frozenset(probe.rows.tolist()) for probe in found if probe is not None]
    assert len(set(draws)) > 230  # of 111,930 sets of four
    assert frozenset.union(*draws) == {row for row in range(64) if row % 3}  # 960 draws of 42: each comes up
    assert draws[7] == frozenset(probed(response, 7)[0].rows.tolist())  # a resumed run draws the same


def test_without_any_reward_there_is_nothing_to_look_at_and_of_one_row_there_is_that_one() -> None:
    assert probed([0] * 8)[0] is None
    assert probed([0, 0, 4, 0, 0, 0, 0, 0])[0].rows.tolist() == [2]


def test_the_pass_is_as_wide_as_its_longest_row_and_within_the_bound_on_a_passs_tokens() -> None:
    found, lengths = probed([1 + row for row in range(64)])
    exact = max(lengths.prompt[row] + lengths.response[row] - 1 for row in found.rows.tolist())
    assert exact <= found.width == min(-(-exact // 8) * 8, 64)
    assert found.length == -(-max(lengths.response[row] for row in found.rows.tolist()) // 8) * 8
    few, _ = probed([1 + row for row in range(64)], microbatch_tokens=4 * exact)
    assert few.rows.tolist() == found.rows.tolist()
    fewer, _ = probed([1 + row for row in range(64)], microbatch_tokens=4 * exact - 1)
    assert fewer.rows.tolist() == found.rows[:3].tolist()


def test_the_share_is_of_all_rows_of_the_rollout_and_one_row_is_looked_at_whatever_the_bound() -> None:
    third = [0 if row % 3 == 0 else 5 for row in range(96)]
    assert probed(third)[0].count == 6
    one, _ = probed([5] * 64, microbatch_tokens=1)
    assert one.count == len(one.rows) == 1


# -- whole runs -----------------------------------------------------------------------------------------------------

FIGURES = {"safe/update_kl", "safe/moved_kl", "safe/step_scale", "safe/looks"}


def test_a_run_records_what_it_did_from_the_policys_first_step_on(tokenizer, tmp_path: Path) -> None:
    settings = {"optim": {"learning_rate": TOO_HIGH}, "critic": {"warmup_steps": 1}, "max_steps": 3}
    run = runs.finished(runs.settings(tmp_path / "run", **settings), tokenizer)
    first, *rows = runs.rows(run.run_dir)
    assert first["safe/update_kl"] == rows[0]["safe/update_kl"]  # the controller's, also where nothing is looked at
    assert not (FIGURES - {"safe/update_kl"}) & first.keys()
    for row in rows:
        assert 0 < row["safe/moved_kl"] <= row["safe/update_kl"]
        assert 0 < row["safe/step_scale"] < 1
        assert row["policy/skipped_steps"] == 0


# -- from one update to the next ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Updates:
    """Updates on one rollout with one preview, and the rows of each pass of the last of them."""

    tokenizer: PreTrainedTokenizerFast
    config: Config

    def __post_init__(self) -> None:
        self.model = make_model(self.tokenizer, self.config)
        self.passes, self.optimizer = passes_of(self.model, self.config), make_optimizer(self.model, self.config)
        made = make_preview(self.passes)
        assert made is not None
        self.preview = made
        self.rates: list[float] = []
        self.optimizer.register_step_pre_hook(lambda *_: self.rates.append(self.optimizer.param_groups[0]["lr"]))

    def update(self, step: int) -> dict[str, float | None]:
        batch = measured_batch(self.passes, make_rollout(len(self.tokenizer)), 0.3, step, self.preview)
        self.rates.clear()
        limit = self.config.optim.max_update_kl
        return update(self.passes, self.optimizer, batch, decide(0.3, limit), step, self.preview).metrics


def looked(tokenizer: PreTrainedTokenizerFast, limit: float, rate: float = HEALTHY, **sections: Any) -> Updates:
    optim = {"preview": True, "max_update_kl": limit, "learning_rate": rate, **sections.pop("optim", {})}
    return Updates(tokenizer, make_config(optim=optim, **sections))


@pytest.mark.parametrize(("wary", "looks"), [(True, STEPS), (False, 1)])
def test_an_update_whose_length_was_predicted_is_looked_at_at_its_end_alone(tokenizer, wary: bool, looks: int) -> None:
    run = looked(tokenizer, 20 * LOOSE)
    run.preview.load_state_dict({"gain": 1.0, "floor": 0.0, "floors": 2, "wary": wary})
    assert run.update(0)["safe/looks"] == looks
    assert run.preview.wary is False


def test_the_steps_of_the_next_update_are_shortened_before_they_are_taken(tokenizer) -> None:
    """By sqrt(AIM limit / (gain rate^2)), the gain that of the last update: literal arithmetic on its own figures."""
    run = looked(tokenizer, LIMIT, TOO_HIGH)
    first = run.update(0)
    gain = first["safe/moved_kl"] / (first["safe/step_scale"] * TOO_HIGH) ** 2  # pyright: ignore[reportOperatorIssue]
    assert run.preview.gain == pytest.approx(gain)
    second = run.update(1)
    share = math.sqrt(0.8 * LIMIT / (gain * TOO_HIGH**2))
    assert run.rates == pytest.approx([share * TOO_HIGH] * STEPS)
    assert run.optimizer.param_groups[0]["lr"] == TOO_HIGH
    assert 0.5 * LIMIT <= second["safe/moved_kl"] <= LIMIT  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]


def test_an_update_that_was_shortened_too_much_is_made_longer_but_not_than_its_whole_steps(tokenizer) -> None:
    whole = looked(tokenizer, 20 * LOOSE)
    whole.update(0)
    run = looked(tokenizer, 20 * LOOSE)
    run.preview.load_state_dict({"gain": 1e12, "floor": 0.0, "floors": 2, "wary": False})
    metrics = run.update(0)
    assert run.rates[0] < 1e-2 * HEALTHY
    assert metrics["safe/step_scale"] == pytest.approx(1.0)
    ends, starts = weights(run.model), weights(looked(tokenizer, LIMIT).model)
    name = "policy.model.layers.0.mlp.up_proj.weight"
    moved, wanted = ends[name] - starts[name], weights(whole.model)[name] - starts[name]
    assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.9
    assert float(moved.norm() / wanted.norm()) == pytest.approx(1.0, abs=0.2)


def test_an_update_far_beyond_its_bound_has_the_next_one_looked_at_step_by_step(tokenizer) -> None:
    run = looked(tokenizer, LIMIT, TOO_HIGH)
    run.preview.load_state_dict({"gain": 1e-9, "floor": 0.0, "floors": 2, "wary": False})
    run.update(0)
    assert run.preview.wary is True
    assert run.update(1)["safe/looks"] >= STEPS  # pyright: ignore[reportOperatorIssue]


def test_what_rounding_alone_does_is_measured_twice_and_is_in_no_size(tokenizer) -> None:
    """In bfloat16 it is far above a small bound, within which an update would never be found."""
    run = looked(tokenizer, 1e-5, TOO_HIGH, model={"dtype": "bfloat16"})
    before = weights(run.model)
    metrics = run.update(0)
    assert 1e-6 < run.preview.floor < 1e-3
    assert metrics["safe/step_scale"] > 0  # pyright: ignore[reportOptionalOperand]
    assert 0 < metrics["safe/moved_kl"] <= 1e-5  # pyright: ignore[reportOptionalOperand, reportOperatorIssue]
    name = "policy.model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(weights(run.model)[name], before[name])
    floor = run.preview.floor
    run.update(1)
    second = run.preview.floor
    assert second >= floor
    run.update(2)
    assert (run.preview.floor, run.preview.floors) == (second, 2)
    exact = looked(tokenizer, 1e-5, TOO_HIGH)
    exact.update(0)
    assert exact.preview.floor < 1e-6


def test_an_update_that_moves_little_halves_the_gain_at_most_and_one_that_moves_nothing_leaves_it(tokenizer) -> None:
    """Or one whose gradient said little would let the next one leap."""
    run = looked(tokenizer, LIMIT)
    run.preview.load_state_dict({"gain": 1e7, "floor": 0.0, "floors": 2, "wary": False})
    run.preview._share = 1.0
    run.preview._learn_gain(0.0, HEALTHY)
    assert run.preview.gain == 1e7
    run.preview._learn_gain(1e-9, HEALTHY)
    assert run.preview.gain == 0.5e7


def test_a_batch_that_says_nothing_is_not_looked_at_and_the_first_that_does_is_at_every_step(tokenizer) -> None:
    """A first update that moved nothing must not let the next one go whole and unwatched."""
    run = looked(tokenizer, LIMIT, TOO_HIGH)
    batch = measured_batch(run.passes, make_rollout(len(tokenizer)), 0.0, preview=run.preview)
    batch = dataclasses.replace(batch, advantages=torch.zeros_like(batch.returns))
    quiet = update(run.passes, run.optimizer, batch, decide(0.0, LIMIT), 0, run.preview)
    assert not FIGURES & quiet.metrics.keys()
    assert (run.preview.gain, run.preview.wary) == (None, True)
    assert run.update(1)["safe/looks"] >= 2 + STEPS - 1  # pyright: ignore[reportOperatorIssue]


def test_a_rate_of_zero_leaves_the_next_update_watched(tokenizer) -> None:
    run = looked(tokenizer, LIMIT, TOO_HIGH)
    run.optimizer.param_groups[0]["lr"] = 0.0
    assert run.update(0)["safe/moved_kl"] == 0.0
    assert (run.preview.gain, run.preview.wary) == (None, True)


def test_the_critics_warm_up_is_not_looked_at(tokenizer) -> None:
    run = looked(tokenizer, LOOSE, critic={"warmup_steps": 5, "learning_rate": HEALTHY})
    before = weights(run.model)
    assert not FIGURES & run.update(4).keys()
    after = weights(run.model)
    assert not torch.equal(after["heads.0.up.weight"], before["heads.0.up.weight"])  # the steps were taken
    assert run.update(5).keys() >= FIGURES


def test_a_rollout_without_any_reward_is_not_looked_at(tokenizer) -> None:
    run = looked(tokenizer, LOOSE)
    batch = measured_batch(run.passes, make_rollout(len(tokenizer)), 0.3)
    run.preview.draw(Lengths(prompt=[4] * 8, response=[0] * 8), 0)
    run.preview.begin(batch, LOOSE, STEPS)
    assert run.preview.metrics() == {}


def test_an_update_that_was_interrupted_leaves_nothing_to_the_next(tokenizer) -> None:
    """The next is shortened towards its own first weights, over its own steps, as by a preview that is new."""
    same, new = (looked(tokenizer, LIMIT, TOO_HIGH) for _ in range(2))
    for run in (same, new):
        steps: list[Any] = []

        def interrupt(*_: Any, steps: list[Any] = steps) -> None:
            steps.append(None)
            if len(steps) == 2:
                raise InterruptedError

        handle = run.optimizer.register_step_post_hook(interrupt)
        with pytest.raises(InterruptedError):
            run.update(0)
        handle.remove()
        assert run.optimizer.param_groups[0]["lr"] == TOO_HIGH
    fresh = make_preview(new.passes)
    assert fresh is not None
    fresh.load_state_dict(new.preview.state_dict())
    new.preview = fresh
    assert same.update(1) == new.update(1)
    assert_same(weights(same.model), weights(new.model), 0.0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_is_compared_with_what_was_measured(tokenizer, dtype: str) -> None:
    """Row by row the hidden states of a forward of that row alone, with what a microbatch of another shape rounds."""
    run = looked(tokenizer, LIMIT, model={"dtype": dtype}, optim={"microbatch_tokens": 24})
    batch = measured_batch(run.passes, make_rollout(len(tokenizer)), 0.3, preview=run.preview)
    rows, kept = run.preview._rows, run.preview._before
    assert rows is not None
    assert kept is not None
    for number, row in enumerate(rows.rows.tolist()):
        length = int(batch.tokens.mask[row].sum())
        alone = run.passes.hidden(batch.tokens.rows(torch.tensor([row])))[0, :length].float()
        torch.testing.assert_close(kept[number, :length], alone, atol=1e-5 if dtype == "float32" else 0.05, rtol=0)


def test_an_update_whose_rollout_was_not_measured_with_the_preview_is_refused(tokenizer) -> None:
    """The first, and one after an update: the hidden states of that one's rollout are not its own."""
    run = looked(tokenizer, LIMIT)
    for measured in (False, True):
        if measured:
            run.update(0)
        batch = measured_batch(run.passes, make_rollout(len(tokenizer)), 0.3)
        with pytest.raises(RuntimeError, match="give `measure` the preview"):
            update(run.passes, run.optimizer, batch, decide(0.3, LIMIT), 1, run.preview)


@pytest.mark.parametrize(("at", "steps"), [(1, 0), (2, 1)], ids=["of the rounding", "of a longer step"])
def test_a_look_that_is_interrupted_leaves_the_weights_as_they_were(
    tokenizer, at: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 and far below what it rounds, so that the look after a step is at one several times as long."""
    run = looked(tokenizer, 1e-6, HEALTHY, model={"dtype": "bfloat16"})
    states = [weights(run.model)]
    run.optimizer.register_step_post_hook(lambda *_: states.append(weights(run.model)))
    real, calls = run.passes.hidden, []

    def interrupted(tokens: Tokens) -> Tensor:
        calls.append(tokens)
        if len(calls) == at:
            raise InterruptedError
        return real(tokens)

    monkeypatch.setattr(run.passes, "hidden", interrupted)
    with pytest.raises(InterruptedError):
        run.update(0)
    assert len(states) == steps + 1
    assert_same(weights(run.model), states[-1], 1e-6 if steps else 0.0)


def test_no_preview_is_made_where_it_is_off(tokenizer) -> None:
    config = make_config(optim={"preview": False})
    assert make_preview(passes_of(make_model(tokenizer, config), config)) is None


def test_a_resumed_run_shortens_as_the_uninterrupted_one_does(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preview that has forgotten its gain finds another size."""
    settings = {"optim": {"learning_rate": TOO_HIGH}, "max_steps": 3}
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
