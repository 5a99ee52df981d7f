"""The guard's rules (algorithm.md, Guard), and the state they need.

A figure is compared with its mean over the run's first START steps, since normal values differ from model to model.
A figure that is None breaks no rule, and a rule that compares with the start is not broken before the start is known.
All state is frozen and JSON; it is bounded by the moving average's window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from stable_rlhf.control.guard_config import GuardConfig

WINDOW = 20  # rewards in the moving average R, here and in the definition of a reward crash (report/crashes.py)
FEWEST = 3
"""Least number of figures from which the error of their mean is known. Two rewards of 0 or 1 are mostly alike and would
have no error. In simulated runs of 1,000 steps whose rewards are 1 with probability 0.9, two of 20 were rolled back
with two rewards a step, none with 3, 4 or 8 (docs/LOG.md)."""
START = 5  # rollouts whose mean is the start: one is noisy, and by ten the policy has begun to move
ERRORS = 6.0
"""Standard errors that the fall must exceed. So many, because it is measured from the best of many windows: of 200
simulated runs of 5,000 steps of pure noise, 9 exceeded 5 of them for five steps in a row, and none exceeded 6."""
BEYOND = 1.5
"""Multiple of the threshold in force from which the KL is clearly beyond it. In 18 recorded runs of `safe` the most
that a run stayed above for five steps in a row is 1.27."""
REPETITIVE = 0.5
"""Share of the starting distinct-2 below which texts are repetitive. None of those runs was below 0.64 for five."""
RATIOS = {
    "entropy": "objective/entropy",
    "distinct": "completions/distinct_2",
    "length": "completions/mean_length",
}
"""Figures that are compared with their start, by the name that the state gives them."""
Figures = Mapping[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """The moving average R of the mean reward, and its highest value so far; squares of standard errors."""

    recent: tuple[float, ...] = ()
    """The last WINDOW mean rewards, oldest first."""
    errors: tuple[float, ...] = ()
    """The square of the standard error of each."""
    first: float | None = None
    """Mean of the first START rewards. The report's R_20 would not do: much may be gained before it."""
    best: float | None = None
    best_errors: tuple[float, ...] = ()
    """Squares of the best window's standard errors."""
    since: int = 0
    """Steps since the best."""

    def after(self, reward: float, error: float) -> Rewards:
        recent, errors = (*self.recent, reward)[-WINDOW:], (*self.errors, error**2)[-WINDOW:]
        if len(recent) < WINDOW:
            return replace(self, recent=recent, errors=errors)
        average = math.fsum(recent) / WINDOW
        first = math.fsum(recent[:START]) / START if self.first is None else self.first
        if self.best is None or average >= self.best:
            return Rewards(recent=recent, errors=errors, first=first, best=average, best_errors=errors)
        return replace(self, recent=recent, errors=errors, first=first, since=self.since + 1)

    def moved(self, drop: float) -> Rewards:
        """The moving average begun anew after the reward itself has moved down by ``drop``.

        A window must not mix scores of before and after. The start moves with it: what was gained stays what it was.
        """
        return Rewards(first=None if self.first is None else self.first - drop)

    @property
    def fall(self) -> tuple[float, float, float]:
        """(D = best R - R, the reward gained = best R - the start, standard error of D); zeros before a full window.

        Rewards of the steps that lie in both windows cancel: the error is of those in one of the two.
        """
        if self.best is None or self.first is None:
            return 0.0, 0.0, 0.0
        apart = min(self.since, WINDOW)
        alone = math.fsum(self.best_errors[:apart]) + math.fsum(self.errors[WINDOW - apart :])
        return self.best - math.fsum(self.recent) / WINDOW, self.best - self.first, math.sqrt(alone) / WINDOW


@dataclass(frozen=True, kw_only=True)
class Level:
    """Mean of the first START values of a figure: each has its own count, as one that is None now and then is late."""

    count: int = 0
    mean: float = 0.0

    @property
    def known(self) -> bool:
        return self.count == START

    def after(self, value: float | None) -> Level:
        if self.known or value is None or not math.isfinite(value):
            return self
        return Level(count=self.count + 1, mean=self.mean + (value - self.mean) / (self.count + 1))


@dataclass(frozen=True, kw_only=True)
class GuardState:
    """The guard's state between two steps."""

    entropy: Level = field(default_factory=Level)
    """Start of the entropy, nats per token."""
    distinct: Level = field(default_factory=Level)
    """Start of distinct-2."""
    length: Level = field(default_factory=Level)
    """Start of the mean length, tokens."""
    rewards: Rewards = field(default_factory=Rewards)
    streaks: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RULES, 0))
    """How many steps in a row each rule has been broken, by its name in RULES."""
    rollbacks: int = 0
    """Roll-backs of the run so far; a roll-back does not undo it."""
    factor: float = 1.0
    """Product of their rollback_factors."""

    def after(self, figures: Figures) -> GuardState:
        """The state with the step's reward added, and its levels while their starts are being measured."""
        reward, deviation, rows = (figures.get(name) for name in ("objective/scores", "objective/scores_std", "rows"))
        error, rewards = standard_error(deviation, rows), self.rewards
        if reward is not None and error is not None and math.isfinite(reward) and math.isfinite(error):
            rewards = rewards.after(reward, error)
        levels = {name: getattr(self, name).after(figures.get(metric)) for name, metric in RATIOS.items()}
        return replace(self, rewards=rewards, **levels)


def standard_error(deviation: float | None, count: float | None) -> float | None:
    """Standard error of the mean of ``count`` figures: deviation / sqrt(count - 1).

    ``deviation`` has the denominator ``count``. None for fewer than FEWEST figures, which do not show their error.
    """
    return None if deviation is None or count is None or count < FEWEST else deviation / math.sqrt(count - 1)


# -- the rules: (settings, state after this step's start and rewards, figures) -> what is seen, or None -------------


def non_finite(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """A figure of the policy, of its update or of the critic is NaN or infinite."""
    for name, value in figures.items():
        if value is not None and not math.isfinite(value):
            return f"{name} is {value}"
    return None


def skipped_steps(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """policy/skipped_steps > 0: optimiser steps whose gradient was not finite and that were not taken."""
    count = figures.get("policy/skipped_steps") or 0
    if not count:
        return None
    one = count == 1
    steps, taken = ("step", "was not taken") if one else ("steps", "were not taken")
    return f"{count:.0f} optimiser {steps} had a gradient that is not finite and {taken}"


def max_kl(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """KL > max_kl_ratio x the threshold in force; without a threshold, KL > max_kl, nats per token.

    The KL is the exact one where it is measured, since at a small budget the noise of objective/kl is not small.
    """
    kl, threshold = observed_kl(figures), figures.get("safe/threshold")
    if threshold is None:
        ceiling, words = config.max_kl, ""
    elif config.max_kl_ratio is None:
        return None
    else:
        ceiling, words = config.max_kl_ratio * threshold, f", {config.max_kl_ratio:g} x the threshold in force"
    if ceiling is None or kl is None or kl <= ceiling:
        return None
    return f"the KL is {kl:.3g} nats per token, above its ceiling of {ceiling:.3g}{words}"


def min_entropy(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """objective/entropy < min_entropy x its start, not _within_budget: collapse."""
    if _within_budget(state, figures):
        return None
    return _low(config.min_entropy, state, figures, "entropy", "the entropy", " nats per token")


def max_entropy(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """objective/entropy > max_entropy x its start, not _within_budget: gibberish."""
    if _within_budget(state, figures):
        return None
    entropy = figures.get("objective/entropy")
    start = state.entropy
    if config.max_entropy is None or not start.known or entropy is None or entropy <= config.max_entropy * start.mean:
        return None
    return (
        f"the entropy is {entropy:.3g} nats per token, above {config.max_entropy:g} x its {start.mean:.3g} at the start"
    )


def min_distinct(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """completions/distinct_2 < min_distinct x its start: the same words again and again."""
    return _low(config.min_distinct, state, figures, "distinct", "the share of distinct word pairs", "")


def min_length(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """completions/mean_length < min_length x its start, not _within_budget: answers that no longer say anything."""
    if _within_budget(state, figures):
        return None
    return _low(config.min_length, state, figures, "length", "the mean length", " tokens")


def max_drawdown(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """D > max_drawdown x the reward gained since the start, and D > ERRORS standard errors of D.

    A step that scored fewer than FEWEST completions is left out of R, since its error is not known.
    """
    fall, gained, error = state.rewards.fall
    if config.max_drawdown is None or fall <= config.max_drawdown * gained or fall <= ERRORS * error or fall <= 0.0:
        return None
    return (
        f"the reward, over {WINDOW} steps, has fallen by {fall:.3g} from its best, more than {config.max_drawdown:g} x "
        f"the {gained:.3g} that the run had gained"
    )


def min_explained_variance(config: GuardConfig, state: GuardState, figures: Figures) -> str | None:
    """val/explained_variance < min_explained_variance: the critic is far worse than a constant."""
    share = figures.get("val/explained_variance")
    if config.min_explained_variance is None or not state.entropy.known or share is None:
        return None
    if share >= config.min_explained_variance:
        return None
    return f"the critic's explained variance is {share:.3g}, below {config.min_explained_variance:.3g}"


def observed_kl(figures: Figures) -> float | None:
    """The KL that controller and guard see, of a step's metrics: the exact one where it is measured, else k1."""
    exact = figures.get("objective/kl_exact")
    return figures.get("objective/kl") if exact is None else exact


def _within_budget(state: GuardState, figures: Figures) -> bool:
    """Whether a controller's threshold holds the KL, and the texts are as varied as they were.

    A reward may then be earned by short, sure or surprising answers: what the KL budget allows is no failure. Without a
    threshold nothing says so.
    """
    kl, threshold, distinct = observed_kl(figures), figures.get("safe/threshold"), figures.get(RATIOS["distinct"])
    if kl is None or threshold is None or kl > BEYOND * threshold:
        return False
    return not state.distinct.known or distinct is None or distinct >= REPETITIVE * state.distinct.mean


def _low(fraction: float | None, state: GuardState, figures: Figures, name: str, words: str, unit: str) -> str | None:
    value, start = figures.get(RATIOS[name]), getattr(state, name)
    if fraction is None or not start.known or value is None or value >= fraction * start.mean:
        return None
    return f"{words} is {value:.3g}{unit}, below {fraction:g} x its {start.mean:.3g} at the start"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule of the guard."""

    seen: Callable[[GuardConfig, GuardState, Figures], str | None]
    """(settings, state after this step's start and rewards, figures) -> a clause for a person, None if not broken."""
    advice: str
    """Something to try."""
    at_once: bool = False
    """Whether it acts at the first step at which it is broken, whatever ``patience`` is."""

    def patience(self, config: GuardConfig) -> int:
        """Steps in a row that it must be broken before it acts."""
        return 1 if self.at_once else config.patience


_SLOWER = "lower optim.learning_rate"
RULES = {
    "non_finite": Rule(
        seen=non_finite,
        advice=f"{_SLOWER}, and look at the rewards and at model.dtype",
        at_once=True,
    ),
    "max_kl": Rule(
        seen=max_kl,
        advice=f"{_SLOWER}, or raise kl.settings.budget or the guard's ceiling if that much is intended",
        at_once=True,
    ),
    "skipped_steps": Rule(
        seen=skipped_steps,
        advice=f"{_SLOWER} or optim.max_grad_norm, and look at the rewards",
    ),
    "min_entropy": Rule(
        seen=min_entropy,
        advice=f"{_SLOWER} or kl.settings.budget: the policy says one thing only",
    ),
    "max_entropy": Rule(
        seen=max_entropy,
        advice=f"{_SLOWER}, and set optim.entropy_coef to 0: the policy says anything",
    ),
    "min_distinct": Rule(
        seen=min_distinct,
        advice=f"{_SLOWER} or kl.settings.budget, and see whether the reward is earned by repetition",
    ),
    "min_length": Rule(
        seen=min_length,
        advice="see whether the reward is earned by saying nothing; reward.missing_eos_penalty acts the other way",
    ),
    "max_drawdown": Rule(
        seen=max_drawdown,
        advice=f"{_SLOWER} or optim.num_iterations",
    ),
    "min_explained_variance": Rule(
        seen=min_explained_variance,
        advice="lower critic.learning_rate, or set critic.warmup_steps",
    ),
}
"""Every rule by its name; the first that is broken decides."""
