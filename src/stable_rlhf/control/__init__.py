"""Controllers and the guard: figures of one rollout in, one decision or verdict out. Standard library only.

`make_controller(name, **settings)` makes one of `none`, `fixed`, `adaptive`, `asymmetric`, `pid-lagrangian`, `safe`,
`paper`; `.observe(observation)` returns its decision for the update that follows.
`Guard(GuardConfig(...)).judge(figures)` returns the verdict on a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from stable_rlhf.control import baselines, paper, safe
from stable_rlhf.control.base import Controller, Decision, Observation, as_whole
from stable_rlhf.control.baselines import (
    AdaptiveSettings,
    AsymmetricSettings,
    FixedSettings,
    NoneSettings,
    PidLagrangianSettings,
)
from stable_rlhf.control.guard import Action, Guard, Verdict
from stable_rlhf.control.guard_config import GuardConfig
from stable_rlhf.control.guard_rules import WINDOW, observed_kl, standard_error
from stable_rlhf.control.normaliser import RewardNormaliser
from stable_rlhf.control.paper import PaperSettings
from stable_rlhf.control.rescored import Rescored
from stable_rlhf.control.safe import SafeSettings

__all__ = [
    "CONTROLLERS",
    "WINDOW",
    "Action",
    "AdaptiveSettings",
    "AsymmetricSettings",
    "Controller",
    "ControllerSettings",
    "Decision",
    "FixedSettings",
    "Guard",
    "GuardConfig",
    "NoneSettings",
    "Observation",
    "PaperSettings",
    "PidLagrangianSettings",
    "Rescored",
    "RewardNormaliser",
    "SafeSettings",
    "Verdict",
    "as_whole",
    "controller_of",
    "controller_settings",
    "has_threshold",
    "make_controller",
    "observed_kl",
    "settings_class",
    "standard_error",
]

ControllerSettings: TypeAlias = (
    NoneSettings
    | FixedSettings
    | AdaptiveSettings
    | AsymmetricSettings
    | PidLagrangianSettings
    | SafeSettings
    | PaperSettings
)
"""The settings of any controller: the class says which one."""


@dataclasses.dataclass(frozen=True)
class _Rule:
    settings: type[ControllerSettings]
    start: Callable[[Any], Any]
    advance: Callable[[Any, Any, Observation], tuple[Any, Decision]]
    has_threshold: bool
    """Whether its decisions have a KL threshold, which the guard's ceiling then follows."""


_RULES = {
    "none": _Rule(NoneSettings, lambda _: baselines.KlAverages(), baselines.advance_none, False),
    "fixed": _Rule(FixedSettings, lambda _: baselines.KlAverages(), baselines.advance_fixed, False),
    "adaptive": _Rule(AdaptiveSettings, lambda _: baselines.AdaptiveState(), baselines.advance_adaptive, True),
    "asymmetric": _Rule(AsymmetricSettings, lambda _: baselines.AsymmetricState(), baselines.advance_asymmetric, True),
    "pid-lagrangian": _Rule(
        PidLagrangianSettings,
        lambda _: baselines.PidLagrangianState(),
        baselines.advance_pid_lagrangian,
        True,
    ),
    "safe": _Rule(SafeSettings, safe.initial_safe_state, safe.advance_safe, True),
    "paper": _Rule(PaperSettings, lambda _: paper.PaperState(), paper.advance_paper, True),
}
CONTROLLERS = tuple(_RULES)


def settings_class(name: str) -> type[ControllerSettings]:
    """The settings class of a controller, by the controller's name. Raises ValueError for an unknown name."""
    if name not in _RULES:
        raise ValueError(f"controller {name!r} is unknown: choose one of {', '.join(CONTROLLERS)}.")
    return _RULES[name].settings


def has_threshold(name: str) -> bool:
    """Whether the decisions of a controller have a KL threshold. Raises KeyError for an unknown name."""
    return _RULES[name].has_threshold


def _settings(name: str, settings: Mapping[str, Any]) -> ControllerSettings:
    cls = settings_class(name)
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
    return controller_of(_settings(name, settings))


def controller_of(settings: ControllerSettings) -> Controller[Any, Any]:
    """A new controller at step 0, of the kind that the settings belong to."""
    name, rule = next((name, rule) for name, rule in _RULES.items() if rule.settings is type(settings))
    return Controller(name, settings, rule.start(settings), rule.advance)


def controller_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of the controller with its value, given and default, checked.

    Raises as `make_controller` does.
    """
    return dataclasses.asdict(_settings(name, settings))
