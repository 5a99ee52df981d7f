"""The learner is given sections: each of its objects follows its own, and none sees the whole configuration."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from stable_rlhf import learner
from stable_rlhf.config import ModelConfig
from stable_rlhf.learner import Learning, make_batch, make_passes, measure
from stable_rlhf.learner.measure import learns_policy, lengths
from stable_rlhf.learner.microbatches import EXACT, plan
from stable_rlhf.policy.transformer import causal_lm
from tests.tiny_updates import decide, learning, make_config, make_model, make_rollout


def functions() -> Iterator[Callable[..., Any]]:
    """Every function and method that is written in a file of the learner."""
    for found in pkgutil.iter_modules(learner.__path__, "stable_rlhf.learner."):
        module = importlib.import_module(found.name)
        own = [thing for thing in vars(module).values() if getattr(thing, "__module__", None) == found.name]
        for thing in own:
            yield from (f for f in (vars(thing).values() if inspect.isclass(thing) else [thing]) if callable(f))


def test_no_function_of_the_learner_is_given_the_whole_configuration() -> None:
    checked = 0
    for function in functions():
        annotations = [str(kind) for kind in inspect.get_annotations(inspect.unwrap(function)).values()]
        assert not [kind for kind in annotations if kind in ("Config", "Any | Config")], function
        checked += len(annotations)
    assert checked > 150


def test_the_passes_of_a_run_hold_the_settings_that_they_learn_by(tokenizer) -> None:
    config = make_config()
    given = learning(config)
    passes = make_passes(make_model(tokenizer, config), ModelConfig(), given)
    assert passes.learning is given
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.seed = 1  # pyright: ignore


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_log_probs_and_the_references_are_of_the_distribution_at_the_temperature(tokenizer, temperature: float) -> None:
    config = make_config()
    model, rollout = make_model(tokenizer, config), make_rollout(len(tokenizer))
    measured = measure(make_passes(model, config.model, changed(learning(config), temperature=temperature)), rollout, 0)
    with torch.no_grad(), model.reference() as reference:
        for row in range(8):
            start, length = int(rollout.tokens.start[row]), int(rollout.tokens.mask[row].sum())
            ids, response = rollout.tokens.ids[row : row + 1, : start + length], rollout.tokens.response[row, :length]
            for of, found in ((model.policy, measured.logp), (reference, measured.ref_logp)):
                logits = causal_lm(of)(input_ids=ids).logits[0, start - 1 : start - 1 + length]
                expected = (logits / temperature).log_softmax(-1).gather(1, response[:, None])[:, 0]
                torch.testing.assert_close(found[row, :length], expected, atol=1e-5, rtol=0)


def changed(given: Learning, **fields: Any) -> Learning:
    """``given`` with fields of its sections changed: ``optim={"gamma": 0.5}``."""
    sections = {
        name: dataclasses.replace(getattr(given, name), **value) if isinstance(value, dict) else value
        for name, value in fields.items()
    }
    return dataclasses.replace(given, **sections)


@pytest.mark.parametrize(
    "fields",
    [{"optim": {"gamma": 0.5}}, {"critic": {"bootstrap": "target"}}, {"kl": {"length_neutral": False}}],
    ids=["optim", "critic", "kl"],
)
def test_a_batch_follows_each_of_its_sections(tokenizer, fields: dict[str, Any]) -> None:
    config = make_config()
    model, given, rollout = make_model(tokenizer, config), learning(config), make_rollout(len(tokenizer))
    measured = measure(make_passes(model, config.model, given), rollout, 0)
    plain, other = (
        make_batch(model, measured, rollout.scores, decide(0.5), one)[0].returns
        for one in (given, changed(given, **fields))
    )
    assert (plain - other).abs().max() > 0.01


def test_the_rows_of_the_steps_are_given_by_the_seed(tokenizer) -> None:
    of_rows, optim = lengths(make_rollout(len(tokenizer)).tokens), make_config().optim
    orders = [
        [
            micro.rows.tolist()
            for minibatch in plan(of_rows, optim, seed, 0, 0, torch.device("cpu"), EXACT)
            for micro in minibatch
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def test_the_policy_learns_from_the_step_after_the_critics_warm_up() -> None:
    critic = make_config(critic={"warmup_steps": 3}).critic
    assert [learns_policy(critic, step) for step in range(5)] == [False, False, False, True, True]
