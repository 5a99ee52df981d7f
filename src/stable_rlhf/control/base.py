"""The base of every controller: observation and decision, the checks on settings, and the shell that holds the state.

A controller is a pure function `advance(settings, state, observation) -> (state, decision)` over frozen dataclasses.
The shell below is the only place where something changes, and it only replaces one frozen state by the next.

The rules of the shell:
1. `observe` takes the steps 0, 1, 2, ... once each; a repeated or skipped step is an error that names the expected one.
2. `state_dict` holds plain JSON values only; saved, loaded and continued, a run takes the same decisions bit for bit.
3. `load_state_dict` refuses another version, another controller, an unknown key and a missing key.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

STATE_VERSION = 3  # of the layout of state_dict(): raise it whenever a field of any state changes its meaning


@dataclass(frozen=True)
class Observation:
    """The figures of one rollout, reduced over all ranks, before the update that uses it.

    Raises ValueError if a figure is not finite or out of its range, or the step is not a whole number >= 0.
    """

    step: int
    """Rollout number, counted from 0."""
    reward: float
    """Mean score of the rollout's responses, in the scorer's units, before any KL term."""
    kl: float
    """Mean over response tokens of the exact KL(pi || ref) at each, or of the signed estimate k1 = logp - ref, which
    may be negative; nats per token."""
    entropy: float
    """Mean entropy of the policy over response tokens, nats per token."""
    kl_error: float = 0.0
    """Standard error of ``kl``, nats per token; 0 where it is not known."""
    length: float | None = None
    """Mean number of response tokens in a sequence; None where it is not known."""

    def __post_init__(self) -> None:
        if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 0:
            raise ValueError(f"Observation.step is {self.step!r}: it counts rollouts, give a whole number from 0 up.")
        for name in ("reward", "kl", "entropy"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(
                    f"Observation.{name} is {value!r} at step {self.step}: a controller needs a finite number. "
                    "Look at this rollout's scores and log-probs; skip the step or roll back before observing it."
                )
        if not (self.kl_error >= 0.0 and math.isfinite(self.kl_error)):
            raise ValueError(
                f"Observation.kl_error is {self.kl_error!r} at step {self.step}: give a finite number, 0 or more."
            )
        if self.length is not None and not (self.length > 0.0 and math.isfinite(self.length)):
            raise ValueError(
                f"Observation.length is {self.length!r} at step {self.step}: give a finite number above 0, or None."
            )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How hard to pull the policy towards the reference during the update that follows.

    It carries a coefficient and never a penalty: only an objective, where the KL has a gradient, turns it into a loss.
    Every field is a plain JSON value.
    """

    kl_coef: float
    """Coefficient >= 0 of the KL term, in reward per nat."""
    threshold: float | None
    """KL budget in force, nats per token; None for a rule that has none."""
    excess: float
    """max(0, KL - threshold), nats per token, of the KL that the rule compares with its threshold."""
    kl_short: float
    """Quickly filtered KL, nats per token."""
    kl_long: float
    """Slowly filtered KL, nats per token."""
    gate: float
    """Factor by which low entropy multiplies the coefficient; 1 where nothing acts."""
    phase: str
    """Phase of the reward curve (see `phase.Phase`)."""
    pid_p: float
    """Proportional term of the threshold's PID."""
    pid_i: float
    """Integral term of the threshold's PID."""
    pid_d: float
    """Derivative term of the threshold's PID."""
    entropy_floor: float | None
    """Entropy below which the gate tightens, nats per token; None while there is none."""
    reason: str
    """One line for a person: what was seen and what follows from it."""
    update_kl: float | None = None
    """Most that the update may move the policy, KL(before || after) in nats per token; None where the rule sets no
    bound."""


class Settings(Protocol):
    """Any frozen dataclass whose fields are made by `setting` or hold plain values."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


def setting(
    default: Any,
    low: float | None = None,
    high: float | None = None,
    *,
    above: float | None = None,
    choices: tuple[str, ...] = (),
    switch: str | None = None,
) -> Any:
    """A dataclass field with a default and its range: low <= value <= high, value > above; None is no limit.

    A text has ``choices`` in the place of a range. ``switch`` names the setting without which this one has no effect.
    """
    limits = {"low": low, "high": high, "above": above}
    return dataclasses.field(default=default, metadata={**limits, "choices": choices, "switch": switch})


_WANTED = {bool: "true or false", int: "a whole number", float: "a number"}


def as_whole(value: Any) -> Any:
    """A float without a fraction as an int, so that 1e2 is 100 where a whole number is wanted; else the same value."""
    return int(value) if type(value) is float and value.is_integer() else value


def check_settings(settings: Settings) -> None:
    """Raises ValueError for the first field that is not finite, out of range, or of another type than its default.

    Then for the first that is given although its switch is off. A whole number may be given as a float; it becomes an
    int.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        wanted = type(field.default)
        if wanted is str:
            choices = field.metadata["choices"]
            if value not in choices:
                raise ValueError(f"{field.name}={value!r}: choose one of {', '.join(choices)}.")
            continue
        if wanted is int:
            value = as_whole(value)
            object.__setattr__(settings, field.name, value)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if (wanted is float and not number) or (wanted is not float and type(value) is not wanted):
            raise ValueError(f"{field.name}={value!r}: give {_WANTED[wanted]}, such as {field.default}.")
        if not number:
            continue
        low, high, above = (field.metadata[key] for key in ("low", "high", "above"))
        in_range = (
            (low is None or value >= low) and (high is None or value <= high) and (above is None or value > above)
        )
        if not math.isfinite(value) or not in_range:
            bounds = [
                f"{sign} {bound}" for sign, bound in ((">=", low), (">", above), ("<=", high)) if bound is not None
            ]
            raise ValueError(
                f"{field.name}={value!r} is out of range: give a finite number {' and '.join(bounds)} "
                f"(the default is {field.default})."
            )
    for field in dataclasses.fields(settings):
        value, switch = getattr(settings, field.name), field.metadata["switch"]
        if switch is not None and value != field.default and not getattr(settings, switch):
            raise ValueError(
                f"{field.name}={value!r} has no effect, since {switch} is false: set {switch}=true, or leave it out."
            )


def from_dict(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """Restores a frozen dataclass from the values that `dataclasses.asdict` gave, after a trip through JSON.

    Raises ValueError for an unknown key, a missing key, or a value of another type; `where` begins the message.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is a {type(values).__name__}: expected a mapping saved by state_dict().")
    names = sorted(field.name for field in dataclasses.fields(cls))
    check_keys(values, names, where)
    hints = typing.get_type_hints(cls)
    return cls(**{name: _restore(hints[name], values[name], f"{where}.{name}") for name in names})


def check_keys(values: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Raises ValueError unless the keys of a saved mapping are exactly ``names``."""
    unknown, missing = sorted(set(values) - set(names)), sorted(set(names) - set(values))
    if unknown or missing:
        raise ValueError(
            f"{where} has unknown keys {unknown} and lacks {missing}: load a state saved by this version of the "
            "same class."
        )


def _restore(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    if typing.get_origin(hint) is tuple:  # always of one type, tuple[float, ...]: JSON brings it back as a list
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is {value!r}: expected a list of numbers.")
        return tuple(_restore(typing.get_args(hint)[0], item, where) for item in value)
    if typing.get_origin(hint) is dict:  # always by text, dict[str, int]
        if not isinstance(value, Mapping):
            raise ValueError(f"{where} is {value!r}: expected a mapping of names to numbers.")
        return {key: _restore(typing.get_args(hint)[1], item, f"{where}.{key}") for key, item in value.items()}
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in allowed or (isinstance(value, float) and not math.isfinite(value)):
        expected = " or ".join(
            "null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in allowed
        )
        raise ValueError(f"{where} is {value!r}: expected a finite {expected}.")
    return value


SettingsT = TypeVar("SettingsT", bound=Settings)
StateT = TypeVar("StateT", bound=Settings)


class Controller(Generic[SettingsT, StateT]):
    """Holds one controller's settings and state; the rule itself is the pure function `advance`."""

    def __init__(
        self,
        name: str,
        settings: SettingsT,
        state: StateT,
        advance: Callable[[SettingsT, StateT, Observation], tuple[StateT, Decision]],
    ) -> None:
        self.name = name
        self.settings = settings
        self.state = state
        self.next_step = 0
        self._advance = advance

    def observe(self, observation: Observation) -> Decision:
        """Takes the next step's figures, gives the decision for its update. Raises ValueError for another step."""
        if observation.step != self.next_step:
            raise ValueError(
                f"Observation.step is {observation.step}, expected step {self.next_step}: observe every rollout once "
                "and in order; after a resume or a roll-back, load the controller's state that was saved with the "
                "weights."
            )
        self.state, decision = self._advance(self.settings, self.state, observation)
        self.next_step += 1
        return decision

    def state_dict(self) -> dict[str, Any]:
        """Everything that future decisions depend on except the settings, as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "controller": self.name,
            "next_step": self.next_step,
            "state": dataclasses.asdict(self.state),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()`. Raises ValueError, and changes nothing, if it does not fit."""
        expected = {"version", "controller", "next_step", "state"}
        if set(saved) != expected:
            raise ValueError(f"controller state has the keys {sorted(saved)}: expected {sorted(expected)}.")
        if saved["version"] != STATE_VERSION:
            raise ValueError(
                f"controller state has version {saved['version']!r}, this code reads {STATE_VERSION}: resume with the "
                "release that wrote it."
            )
        if saved["controller"] != self.name:
            raise ValueError(
                f"controller state is of {saved['controller']!r}, this run's controller is {self.name!r}: resume with "
                "the configuration that the run was started with."
            )
        step = saved["next_step"]
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"controller state has next_step={step!r}: expected a whole number from 0 up.")
        self.state = from_dict(type(self.state), saved["state"], "controller state")
        self.next_step = step
