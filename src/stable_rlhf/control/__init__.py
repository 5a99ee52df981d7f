"""Controllers: one observation per rollout in, one decision out. Standard library only.

`make_controller(name, **settings)` makes one of `none`, `fixed`, `adaptive`, `asymmetric`, `safe`, `paper`;
`.observe(observation)` takes its decision for the update that follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from stable_rlhf.control import baselines, paper, safe
from stable_rlhf.control.base import Controller, Decision, Observation
from stable_rlhf.control.normaliser import RewardNormaliser

__all__ = [
    "CONTROLLERS",
    "Controller",
    "Decision",
    "Observation",
    "RewardNormaliser",
    "controller_settings",
    "make_controller",
]


@dataclasses.dataclass(frozen=True)
class _Rule:
    settings: type[Any]
    start: Callable[[Any], Any]
    advance: Callable[[Any, Any, Observation], tuple[Any, Decision]]
    tighter: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Settings that `Controller.tighten` multiplies by its factor to this power."""


_RULES = {
    "none": _Rule(baselines.NoneSettings, lambda _: baselines.KlAverages(), baselines.advance_none),
    "fixed": _Rule(baselines.FixedSettings, lambda _: baselines.KlAverages(), baselines.advance_fixed, {"beta": -1}),
    "adaptive": _Rule(
        baselines.AdaptiveSettings, lambda _: baselines.AdaptiveState(), baselines.advance_adaptive, {"target": 1}
    ),
    "asymmetric": _Rule(
        baselines.AsymmetricSettings,
        lambda _: baselines.AsymmetricState(),
        baselines.advance_asymmetric,
        {"threshold": 1},
    ),
    "safe": _Rule(safe.SafeSettings, safe.initial_safe_state, safe.advance_safe, {"budget": 1}),
    "paper": _Rule(
        paper.PaperSettings,
        lambda _: paper.PaperState(),
        paper.advance_paper,
        {"base_threshold": 1, "threshold_min": 1, "threshold_max": 1},
    ),
}
CONTROLLERS = tuple(_RULES)


def _settings(name: str, settings: Mapping[str, Any]) -> Any:
    if name not in _RULES:
        raise ValueError(f"controller {name!r} is unknown: choose one of {', '.join(CONTROLLERS)}.")
    cls = _RULES[name].settings
    known = [field.name for field in dataclasses.fields(cls)]
    for key, value in settings.items():
        if key not in known:
            choice = f"choose from {', '.join(known)}" if known else "it has none"
            raise ValueError(f"controller {name!r} has no setting {key!r} (given {value!r}): {choice}.")
    try:
        return cls(**settings)
    except ValueError as error:
        raise ValueError(f"controller {name!r}: {error}") from error


def make_controller(name: str, **settings: Any) -> Controller[Any, Any]:
    """A new controller at step 0. `settings` are the fields of its settings class; what is left out keeps its default.

    Raises ValueError for an unknown name, an unknown setting, or a value of the wrong type or out of range.
    """
    checked = _settings(name, settings)
    rule = _RULES[name]
    return Controller(name, checked, rule.start(checked), rule.advance, rule.tighter)


def controller_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the controller with its value, given and default, checked: what a run's config.yaml records.

    Raises as `make_controller` does.
    """
    return dataclasses.asdict(_settings(name, settings))
