"""The guard's settings refuse, with a sentence of their own, what the configuration refuses with the same."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from stable_rlhf.config import Config
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.control import GuardConfig
from stable_rlhf.errors import ConfigError

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"enabled": 1}, "guard.enabled=1: give true or false"),
    ({"max_kl": -1.0}, "guard.max_kl=-1.0: must be greater than 0"),
    ({"max_kl": math.nan}, "guard.max_kl=nan: give a finite number, or null"),
    ({"max_kl": True}, "guard.max_kl=True: give a finite number, or null"),
    ({"min_explained_variance": "0"}, "guard.min_explained_variance='0': give a finite number, or null"),
    ({"min_entropy": 1.0}, "guard.min_entropy=1.0: must be below 1, the start itself"),
    ({"max_entropy": 1}, "guard.max_entropy=1: must be above 1, the start itself"),
    ({"patience": 5.5}, "guard.patience=5.5: give a whole number"),
    ({"patience": 0}, "guard.patience=0: must be greater than 0"),
    ({"patience": None}, "guard.patience=None: give a whole number"),
    ({"max_rollbacks": -1}, "guard.max_rollbacks=-1: must be 0 or more"),
    ({"rollback_factor": math.inf}, "guard.rollback_factor=inf: give a finite number"),
    ({"rollback_factor": 0}, "guard.rollback_factor=0: must be in (0, 1]"),
    ({"enabled": False, "patience": 3}, "guard.patience=3: has no effect unless guard.enabled=true; leave it out"),
]


@pytest.mark.parametrize(("given", "sentence"), REFUSED)
def test_a_bad_value_is_refused_with_one_sentence_by_the_class_and_by_the_configuration(
    given: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=r"^guard") as own:
        GuardConfig(**given)
    with pytest.raises(ConfigError) as configured:
        Config.from_preset(guard=given)
    assert str(own.value) == str(configured.value) == sentence


def test_there_is_one_class_of_the_guards_settings() -> None:
    assert SECTIONS["guard"] is GuardConfig is type(Config().guard)


def test_every_bound_may_be_left_out_and_a_whole_number_is_a_number() -> None:
    bounds = [field.name for field in dataclasses.fields(GuardConfig) if "None" in str(field.type)]
    assert len(bounds) == 8
    assert all(getattr(GuardConfig(**{name: None}), name) is None for name in bounds)
    assert GuardConfig(max_kl=3, rollback_factor=1).max_kl == 3
