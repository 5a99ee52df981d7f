"""The rewards of a run: those that it learns from, and gold rewards, which are only measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from stable_rlhf.config import Config
from stable_rlhf.policy import ActorCritic
from stable_rlhf.rewards import Scorer, make_gold, make_scorer
from stable_rlhf.user_code import RandomStream, Shield


class GivenRewards(NamedTuple):
    """SAFETrainer's arguments of these names."""

    reward_funcs: Any
    reward_processing_classes: Sequence[Any] | None
    gold_funcs: Any
    gold_processing_classes: Sequence[Any] | None


def make_scorers(
    config: Config,
    given: GivenRewards,
    model: ActorCritic,
    shield: Shield,
    stopping: Callable[[], bool],
    trainer_state: Callable[[], Any],
) -> tuple[Scorer, Scorer | None]:
    """(rewards, gold rewards or None). Raises ConfigError or RewardInputError.

    ``shield``: of the run's user code. Gold rewards have one of their own: what they set of the process, rewards and
    callbacks must not find, or a run with them would be another one.
    """
    scorer = make_scorer(
        config.reward,
        given.reward_funcs,
        given.reward_processing_classes,
        model.device,
        stopping=stopping,
        shield=shield,
        random=RandomStream(config.seed),
        trainer_state=trainer_state,
        alone=False,
    )
    gold = make_gold(
        config.reward,
        given.gold_funcs,
        given.gold_processing_classes,
        model.device,
        scorer,
        stopping=stopping,
        shield=Shield(model.dropout_off),
        trainer_state=trainer_state,
    )
    config.check_best(gold.names if gold is not None else [])
    return scorer, gold
