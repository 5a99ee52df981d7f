"""The control of a run that another trainer makes: figures of a step in; a coefficient, a verdict and a reason out."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stable_rlhf.control import (
    Action,
    Decision,
    Guard,
    GuardConfig,
    Observation,
    RewardNormaliser,
    Verdict,
    controller_settings,
    make_controller,
)
from stable_rlhf.control.base import from_dict
from stable_rlhf.errors import ConfigError, RunError
from stable_rlhf.files import parsed, replace_text
from stable_rlhf.runs import METRICS, MetricsWriter, RunLock, decision_metrics, incidents
from stable_rlhf.text import counted

STATE_VERSION = 1
"""Of the layout of `RunMonitor.state_dict`."""

UNITS = ("deviation", "reward")

OWN = frozenset({"step", "objective/scores", "objective/kl", "objective/entropy", "objective/kl_error"})
"""Metrics that the arguments of `RunMonitor.observe` give."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What follows from the figures of a step."""

    kl_coef: float
    """Coefficient >= 0 of the KL term in the trainer's next update, in the units that the monitor was made with."""
    decision: Decision | None
    """The controller's decision; None before the first step whose figures are finite."""
    verdict: Verdict
    """The guard's verdict on the step."""

    @property
    def stop(self) -> bool:
        """Whether the guard asks for the run's end."""
        return self.verdict.action is Action.STOP

    @property
    def roll_back(self) -> bool:
        """Whether the guard asks to go back to an earlier state; only of a monitor with ``rolls_back=True``."""
        return self.verdict.action is Action.ROLL_BACK

    @property
    def reason(self) -> str:
        """One line for a person: the controller's, or what the guard saw."""
        if self.verdict.action is not Action.GO_ON:
            return f"{self.verdict.action.value}: {self.verdict.seen}. Try this: {self.verdict.advice}"
        return "" if self.decision is None else self.decision.reason


class RunMonitor:
    """Controller and guard for a run that is not ours. It writes metrics.jsonl, incidents.jsonl and config.yaml to
    ``run_dir``, so `stable-rlhf report` and `compare` read it as a run.

    A step is a rollout: what is sampled from one policy. ``observe`` takes its figures once, in order.

    Args:
        run_dir: folder of the files; a run that is in it already is refused, unless its state is loaded.
        controller: name of one of `stable_rlhf.control.CONTROLLERS`.
        settings: settings of the controller, such as ``{"budget": 0.3}``; what is left out keeps its default.
        guard: settings of the guard; ``GuardConfig(enabled=False)`` judges nothing.
        units: ``deviation`` where the trainer divides rewards by their deviation (GRPO), so that a coefficient is for
            rewards of unit deviation; ``reward`` where it does not (RLOO, PPO of others): the coefficient is then
            multiplied by the running deviation of the rewards, and ``observe`` needs ``reward_std``.
        rolls_back: whether the trainer can go back to an earlier state, and calls `rolled_back` when it has. If not,
            the guard stops a run where it would roll one back.
        planned: number of steps that the run is to have; for the report.
        overwrite: whether a run that is in the folder is replaced.
        about: settings of the trainer that a reader should see, plain JSON values, nested by section.

    Raises ConfigError (a ValueError) for a setting that is unknown or out of range, and for a folder with a run.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        controller: str = "safe",
        settings: Mapping[str, Any] | None = None,
        guard: GuardConfig | None = None,
        units: str = "deviation",
        rolls_back: bool = False,
        planned: int | None = None,
        overwrite: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if units not in UNITS:
            raise ConfigError(f"units={units!r}: choose one of {', '.join(UNITS)}")
        self.run_dir, self.units, self._overwrite = Path(run_dir), units, overwrite
        try:
            self.controller = make_controller(controller, **(settings or {}))
            whole = controller_settings(controller, settings or {})
        except ValueError as error:
            raise ConfigError(str(error)) from error
        given = guard or GuardConfig()
        self.guard = Guard(given if rolls_back or not given.enabled else dataclasses.replace(given, max_rollbacks=0))
        self.rewards = RewardNormaliser()
        self.steps = 0
        """Steps observed so far."""
        self._decision: Decision | None = None
        self._row: dict[str, Any] = {}
        self._verdict: Verdict | None = None
        self._writer: MetricsWriter | None = None
        self._loaded = False
        self._lock = RunLock(self.run_dir, "run_dir")
        self._config = {
            **({} if planned is None else {"max_steps": planned}),
            **(about or {}),
            "kl": {"controller": controller, "settings": whole},
            "guard": dataclasses.asdict(self.guard.settings),
        }

    @property
    def update_kl(self) -> float | None:
        """Most that the next update may move the policy, KL(before || after) in nats per token, with what the
        roll-backs leave of it; None where the controller sets no bound, or not before its first step."""
        if self._decision is not None:
            limit = self._decision.update_kl
        else:
            own = self.controller.settings
            per_token = getattr(own, "budget_per", None) == "token"
            limit = own.update_share * own.budget if per_token else None
        return None if limit is None else limit * self.factor

    @property
    def factor(self) -> float:
        """The product of the roll-backs' factors: what is left of the learning rate and of `Decision.update_kl`."""
        return self.guard.state.factor

    def observe(
        self,
        reward: float,
        kl: float,
        entropy: float,
        *,
        kl_error: float = 0.0,
        length: float | None = None,
        reward_std: float | None = None,
        rows: int | None = None,
        figures: Mapping[str, float | None] | None = None,
        seconds: float | None = None,
    ) -> Seen:
        """Takes the figures of the next step; gives the coefficient for the update that follows.

        Args:
            reward: mean score of the completions, in the scorer's units, before any KL term.
            kl: mean over completion tokens of KL(policy || reference), or of an estimate of it; nats per token.
            entropy: mean over completion tokens, nats per token.
            kl_error: standard error of ``kl``; 0 where it is not known.
            length: mean number of completion tokens; a budget per sequence needs it.
            reward_std: standard deviation of the scores, and ``rows`` their number: the guard compares a fall of the
                reward with its error, and without them it does not watch for one.
            figures: further metrics by the names of docs/metrics.md, such as ``completions/distinct_2``.
            seconds: of the whole step.

        A reward, KL or entropy that is not finite is no error: the controller keeps its decision, and the guard acts.
        Raises ValueError for an unknown metric, and for ``units="reward"`` without ``reward_std``.
        """
        self.begin()
        assert self._writer is not None
        if self.units == "reward" and (reward_std is None or rows is None):
            raise ValueError("units='reward' needs reward_std and rows: the coefficient is in units of that deviation")
        seen = {"objective/scores": reward, "objective/kl": kl, "objective/entropy": entropy}
        row = {"step": self.steps, **{name: _known(value) for name, value in seen.items()}}
        more = {"objective/kl_error": kl_error or None, "objective/scores_std": reward_std}
        more["completions/mean_length"] = length
        row |= {name: _known(value) for name, value in more.items() if value is not None}
        for name in figures or {}:
            if name in OWN or name not in METRICS:
                raise ValueError(f"figures has {name!r}: give one of the names in docs/metrics.md that has no argument")
        row |= {name: _known(value) for name, value in (figures or {}).items()}
        if all(math.isfinite(value) for value in seen.values()):
            self._decide(reward, kl, entropy, _known(kl_error) or 0.0, _known(length), reward_std, rows)
        if self._decision is not None:
            row |= decision_metrics(self._decision)
        row["safe/rollbacks"] = self.guard.state.rollbacks
        self._writer.write(row, {} if seconds is None else {"total_s": seconds})
        numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
        verdict = _foreign(self.guard.judge({**numbers, **seen, "rows": rows}))
        self._row, self._verdict = numbers, verdict
        self.steps += 1
        if verdict.action is Action.STOP:
            incidents.record(self.run_dir, self._incident("asked the trainer to stop"))
        return Seen(kl_coef=self.coefficient, decision=self._decision, verdict=verdict)

    @property
    def decided(self) -> bool:
        """Whether there is a decision: not before the first step, nor after going back to before it."""
        return self._decision is not None

    @property
    def coefficient(self) -> float:
        """The coefficient in force, in the trainer's units; 0 before the first step."""
        if self._decision is None:
            return 0.0
        return self._decision.kl_coef * (self.rewards.unit if self.units == "reward" else 1.0)

    def _decide(
        self,
        reward: float,
        kl: float,
        entropy: float,
        kl_error: float,
        length: float | None,
        reward_std: float | None,
        rows: int | None,
    ) -> None:
        if self.units == "reward" and reward_std is not None and rows is not None and math.isfinite(reward_std):
            self.rewards.add(reward, reward_std**2, rows)
        at = self.controller.next_step
        self._decision = self.controller.observe(
            Observation(step=at, reward=reward, kl=kl, entropy=entropy, kl_error=kl_error, length=length)
        )

    def rolled_back(self, saved: Mapping[str, Any]) -> None:
        """Says that the trainer went back to the state whose `state_dict` was ``saved``; controller and guard follow.

        The steps stay counted. Raises ValueError unless the last step asked for a roll-back.
        """
        if self._verdict is None or self._verdict.action is not Action.ROLL_BACK:
            raise ValueError("the last step did not ask for a roll-back: call rolled_back after a Seen with roll_back")
        most = self.guard.settings.max_rollbacks
        done = (
            f"went back to the state after {counted(saved['steps'], 'step')} (roll-back {self.guard.state.rollbacks} "
            f"of {most}) and continues with the learning rate and the bound on an update at {self.factor:g} x"
        )
        entry = self._incident(done)
        self.controller.load_state_dict(saved["controller"])
        self.guard.roll_back(saved["guard"])
        self._decision = _decision(saved["decision"])
        incidents.record(self.run_dir, entry)
        self._verdict = None

    def _incident(self, done: str) -> dict[str, Any]:
        assert self._verdict is not None
        return incidents.of_verdict(self.steps - 1, self._verdict, self._verdict.action, done, self._row)

    def begin(self) -> None:
        """Takes the folder's lock and begins its files, unless that is done. `observe` does it by itself.

        Raises ConfigError for a folder that another process uses, or that holds a run whose state was not loaded.
        """
        if self._writer is not None:
            return
        self._lock.take()
        writer = MetricsWriter(self.run_dir)
        if not self._loaded and self.steps == 0 and not self._overwrite and (self.run_dir / "metrics.jsonl").exists():
            self._lock.release()
            raise ConfigError(
                f"run_dir={str(self.run_dir)!r}: holds a run already; choose another folder, set overwrite=True, or "
                "load the state that was saved with its checkpoint"
            )
        writer.truncate(self.steps)
        incidents.truncate(self.run_dir, self.steps)
        replace_text(self.run_dir / "config.yaml", yaml.safe_dump(self._config, sort_keys=False))
        self._writer = writer

    def close(self) -> None:
        """Releases the folder. A later `observe` takes it again."""
        self._lock.release()
        self._writer = None

    def state_dict(self) -> dict[str, Any]:
        """Everything that future decisions and verdicts depend on except the settings, as plain JSON values."""
        return {
            "version": STATE_VERSION,
            "steps": self.steps,
            "controller": self.controller.state_dict(),
            "guard": self.guard.state_dict(),
            "rewards": self.rewards.state_dict(),
            "decision": None if self._decision is None else dataclasses.asdict(self._decision),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()`: later decisions are those of a monitor that was never stopped.

        Rows and incidents of later steps are removed when the run begins. Raises ValueError for a state that does not
        fit.
        """
        expected = set(self.state_dict())
        if not isinstance(saved, Mapping) or set(saved) != expected or saved["version"] != STATE_VERSION:
            raise ValueError(f"the monitor's state is not one of this version: expected {sorted(expected)}")
        decision = _decision(saved["decision"])
        self.rewards.load_state_dict(saved["rewards"])
        self.guard.load_state_dict(saved["guard"])
        self.controller.load_state_dict(saved["controller"])
        self._decision, self.steps, self._loaded = decision, saved["steps"], True
        self.close()

    def save(self, file: str | Path) -> None:
        """Writes the state as JSON, whole or not at all."""
        replace_text(Path(file), json.dumps(self.state_dict(), allow_nan=False) + "\n")

    def load(self, file: str | Path) -> None:
        """Continues from a file of `save`. Raises RunError, with the file, for one that cannot be used."""
        try:
            self.load_state_dict(parsed(Path(file).read_bytes()))
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{file}: {error}; resume from another checkpoint") from error


NAMES = {
    "optim.learning_rate": "the learning rate",
    "kl.settings.budget": "the KL budget",
    "optim.max_grad_norm": "the gradient's norm",
    "optim.num_iterations": "the passes over a rollout",
    "set optim.entropy_coef to 0": "leave out an entropy bonus",
    "model.dtype": "the model's dtype",
    "reward.missing_eos_penalty acts the other way": "a penalty for answers without an end acts the other way",
    "critic.learning_rate": "the critic's learning rate",
    "set critic.warmup_steps": "train the critic first",
}
"""Our settings in the guard's advice -> words for a trainer that has other names."""


def _foreign(verdict: Verdict) -> Verdict:
    advice = verdict.advice
    for name, words in NAMES.items():
        advice = advice.replace(name, words)
    return dataclasses.replace(verdict, advice=advice)


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _decision(saved: Any) -> Decision | None:
    return None if saved is None else from_dict(Decision, saved, "monitor state.decision")
