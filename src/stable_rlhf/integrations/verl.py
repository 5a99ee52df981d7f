"""The controller `safe` inside verl, whose KL penalty is in the reward.

verl asks `core_algos.get_kl_controller` for a controller with a `value` and an `update`, and its `apply_kl_penalty`
subtracts value * (logp - ref) from the token rewards. Here, once a rollout and before that subtraction:

1. `measure` takes mean reward, KL with its standard error, entropy and length from the batch;
2. `SafeKLController.observe` gives them to the law and gets a coefficient for rewards of unit deviation;
3. value = max(coefficient, min_coef) * running deviation of the rewards: verl's rewards are raw.

Its settings are those of `algorithm.kl_ctrl`, its state is a file in verl's checkpoint; `verl_attach` puts it into
verl. Importing this module imports neither verl nor torch.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_rlhf.control import Decision, Observation, RewardNormaliser, SafeSettings, controller_of, make_controller
from stable_rlhf.control.base import check_keys
from stable_rlhf.errors import CheckpointError, ConfigError
from stable_rlhf.files import parsed, replace_text

logger = logging.getLogger(__name__)

SUPPORTED = ("0.9.1",)
"""Versions of verl whose functions and checkpoints were looked at and tested with; others are refused by name."""

TYPE = "safe"
"""Value of `algorithm.kl_ctrl.type` that turns this on."""

STATE_FILE = "stable_rlhf_safe.json"
"""The controller's state, in verl's folder `global_step_N`."""

KL_PENALTIES = ("kl", "k1")
"""Values of `algorithm.kl_penalty` that are the log-ratio. The other estimates have another gradient in the reward."""

UNUSED: Mapping[str, Any] = {"kl_coef": 0.001, "horizon": 10000, "target_kl": 0.1}
"""verl's own settings of `algorithm.kl_ctrl` with their defaults: always there, and without effect on `safe`."""

WITHOUT_STATE = "resume_without_state"
"""Setting of `algorithm.kl_ctrl`: whether a checkpoint without STATE_FILE may be resumed, with a new controller."""

SAVED = ("controller", "global_step", "normaliser", "value")
"""Keys of STATE_FILE."""

FIGURES = ("kl_coef", "threshold", "excess", "kl_short", "kl_long", "gate", "pid_p", "pid_i", "pid_d")
"""Fields of a decision that verl's logger is given, as `safe/...`."""


# -- the controller -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RolloutFigures:
    """The figures of one rollout. Rewards in the scorer's units, one a response; the others as in `Observation`."""

    rewards: tuple[float, ...]
    kl: float
    entropy: float
    kl_error: float = 0.0
    length: float | None = None


def measure(batch: Mapping[str, Any]) -> RolloutFigures:
    """The figures of a batch as verl has it before the KL penalty.

    Args:
        batch: `DataProto.batch`, or any mapping, with `response_mask`, `token_level_scores`, `old_log_probs` and
            `ref_log_prob`, all [B, T]; a nonzero mask marks response tokens. Rows without one are left out.

    Returns:
        kl is the mean of logp - ref over response tokens, with its standard error over the rows. The entropy is the
        mean of `entropys` or `entropy` where the batch has it. Else it is the mean of -logp over response tokens: an
        unbiased estimate, since the tokens were drawn from that policy.
    """
    from stable_rlhf.ops.masked import masked_mean, ratio_error

    mask = batch["response_mask"].bool()
    rows = mask.any(-1)
    logp = batch["old_log_probs"].double().masked_fill(~mask, 0.0)
    log_ratio = logp - batch["ref_log_prob"].double().masked_fill(~mask, 0.0)
    exact = next((batch[name] for name in ("entropys", "entropy") if name in batch.keys()), None)  # noqa: SIM118
    entropy = -logp if exact is None else exact.double().masked_fill(~mask, 0.0)
    return RolloutFigures(
        rewards=tuple(batch["token_level_scores"].double().sum(-1)[rows].tolist()),
        kl=masked_mean(log_ratio, mask).item(),
        entropy=masked_mean(entropy, mask).item(),
        kl_error=ratio_error(log_ratio, mask),
        length=(mask.sum() / rows.sum()).item(),
    )


class SafeKLController:
    """verl's interface to a KL controller, over the law `safe`.

    `observe` each rollout first; `value` is then the coefficient of its penalty, in reward per nat, and never 0. verl's
    own `update` only checks that the rollout was observed.
    """

    def __init__(self, settings: SafeSettings | None = None, *, resume_without_state: bool = False) -> None:
        settings = settings or SafeSettings()
        self.controller = controller_of(settings)
        self.normaliser = RewardNormaliser("running")
        self.least = settings.min_coef
        self.value = settings.initial_coef
        self.resume_without_state = resume_without_state
        self.decision: Decision | None = None
        self.figures: RolloutFigures | None = None
        self._fresh = False

    def observe(self, figures: RolloutFigures) -> Decision:
        """Takes a rollout's figures and sets `value` for its penalty.

        Raises ValueError for a figure or reward that is not finite, and where no response has a token.
        """
        rewards = figures.rewards
        if not rewards:
            raise ValueError("the rollout has no response with a token: look at verl's batch and its response_mask.")
        observation = Observation(
            step=self.controller.next_step,
            reward=sum(rewards) / len(rewards),
            kl=figures.kl,
            entropy=figures.entropy,
            kl_error=figures.kl_error,
            length=figures.length,
        )
        self.normaliser.update(rewards)
        decision = self.controller.observe(observation)
        self.value = max(decision.kl_coef, self.least) * self.unit
        self.decision, self.figures, self._fresh = decision, figures, True
        logger.info("rollout %d: %s", observation.step, decision.reason)
        return decision

    @property
    def unit(self) -> float:
        """Running deviation of the rewards, in the scorer's units; 1 while all rewards so far were equal."""
        return self.normaliser.unit or 1.0

    def update(self, current_kl: float, n_steps: int) -> None:
        """verl's call after the penalty. Raises RuntimeError where this rollout was not observed."""
        if not self._fresh:
            raise RuntimeError(
                "verl asked the controller `safe` for an update without showing it the rollout: this trainer has an "
                "apply_kl_penalty of its own. Let it call verl.trainer.ppo.ray_trainer.apply_kl_penalty."
            )
        self._fresh = False

    def metrics(self) -> dict[str, float]:
        """The last rollout's figures and decision, with the names of docs/metrics.md; empty before the first."""
        if self.decision is None or self.figures is None:
            return {}
        fields = {name: getattr(self.decision, name) for name in FIGURES}
        return {
            "objective/scores": sum(self.figures.rewards) / len(self.figures.rewards),
            "objective/kl": self.figures.kl,
            "objective/kl_error": self.figures.kl_error,
            "objective/entropy": self.figures.entropy,
            "safe/reward_std": self.normaliser.moments.deviation,
            **{f"safe/{name}": value for name, value in fields.items() if value is not None},
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that later values depend on except the settings, as plain JSON values."""
        return {
            "controller": self.controller.state_dict(),
            "normaliser": self.normaliser.state_dict(),
            "value": self.value,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()`. Raises ValueError, and changes nothing, if it does not fit."""
        check_keys(saved, ("controller", "normaliser", "value"), "state of safe")
        value = saved["value"]
        if not isinstance(value, float) or value <= 0.0:
            raise ValueError(f"state of safe has value={value!r}: expected a number above 0.")
        normaliser = RewardNormaliser("running")
        normaliser.load_state_dict(saved["normaliser"])
        self.controller.load_state_dict(saved["controller"])
        self.normaliser, self.value, self._fresh = normaliser, value, False


# -- settings -------------------------------------------------------------------------------------------------------


def controller_from(kl_ctrl: Mapping[str, Any]) -> SafeKLController:
    """The controller that `algorithm.kl_ctrl` asks for: its settings are those of `SafeSettings`.

    Raises ConfigError for an unknown setting, a wrong value, and one that would have no effect.
    """
    given = {name: kl_ctrl[name] for name in kl_ctrl if name not in ("_target_", "type")}
    for name, default in UNUSED.items():
        value = given.pop(name, default)
        if value != default:
            raise ConfigError(
                f"algorithm.kl_ctrl.{name}={value!r} has no effect on type={TYPE}: leave it out. The KL that is "
                "allowed is algorithm.kl_ctrl.budget, the first coefficient algorithm.kl_ctrl.initial_coef."
            )
    if "update_share" in given:
        raise ConfigError(
            f"algorithm.kl_ctrl.update_share={given['update_share']!r} has no effect in verl, which cannot bound what "
            "one update moves the policy: leave it out."
        )
    without = given.pop(WITHOUT_STATE, False)
    if not isinstance(without, bool):
        raise ConfigError(f"algorithm.kl_ctrl.{WITHOUT_STATE}={without!r}: give true or false.")
    try:
        controller = make_controller(TYPE, **given)
    except ValueError as error:
        raise ConfigError(f"algorithm.kl_ctrl: {error}") from error
    return SafeKLController(controller.settings, resume_without_state=without)


def check_config(config: Any, version: str) -> None:
    """Checks verl's whole configuration before anything starts. Does nothing unless `safe` is asked for.

    Raises ConfigError.
    """
    algorithm = config.get("algorithm") or {}
    kl_ctrl = algorithm.get("kl_ctrl") or {}
    if kl_ctrl.get("type") != TYPE:
        return
    check_version(version)
    if not algorithm.get("use_kl_in_reward"):
        raise ConfigError(
            f"algorithm.kl_ctrl.type={TYPE} has no effect, since algorithm.use_kl_in_reward is false: set it to true."
        )
    check_penalty(algorithm.get("kl_penalty"))
    controller_from(kl_ctrl)


def check_version(version: str) -> None:
    """Raises ConfigError unless this version of verl is supported."""
    if version not in SUPPORTED:
        raise ConfigError(
            f"algorithm.kl_ctrl.type={TYPE} is not supported on verl {version}: install verl {' or '.join(SUPPORTED)}, "
            "or take another type."
        )


def check_penalty(kl_penalty: str | None) -> None:
    """Raises ConfigError for an estimate whose gradient, in the reward, is not that of the KL."""
    if kl_penalty not in KL_PENALTIES:
        raise ConfigError(
            f"algorithm.kl_penalty={kl_penalty!r} does not go with type={TYPE}: in the reward only the log-ratio has "
            f"the gradient of the KL. Choose {' or '.join(KL_PENALTIES)}, which are the same."
        )


# -- the checkpoint -------------------------------------------------------------------------------------------------


def save_state(controller: SafeKLController, folder: Path, global_step: int) -> None:
    """Writes STATE_FILE into verl's checkpoint folder, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    saved = {"global_step": global_step, **controller.state_dict()}
    replace_text(folder / STATE_FILE, json.dumps(saved, indent=1, allow_nan=False) + "\n")


def load_state(controller: SafeKLController, folder: Path, global_step: int) -> None:
    """Continues from the STATE_FILE of a checkpoint.

    Raises CheckpointError where it is missing (unless the controller may begin anew), damaged, or of another step.
    """
    path = folder / STATE_FILE
    if not path.exists():
        if controller.resume_without_state:
            logger.warning("%s is missing: the controller `safe` begins anew (%s)", path, WITHOUT_STATE)
            return
        raise CheckpointError(
            f"{path} is missing, so the controller `safe` cannot continue: resume from a checkpoint that has it. Where "
            f"the run had another controller, set algorithm.kl_ctrl.{WITHOUT_STATE}=true to begin with a new one."
        )
    try:
        saved = parsed(path.read_bytes())
        check_keys(saved, SAVED, "the file")
        step = saved.pop("global_step")
        if step != global_step:
            raise ValueError(f"it is of step {step!r}, the checkpoint of step {global_step}")
        controller.load_state_dict(saved)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; resume from an older checkpoint") from error
