"""Which plots a report has: every figure of docs/metrics.md in one of them, in the order of that page."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from stable_rlhf.report.crashes import Rows

COLOURS = 6
"""Colours of lines that have no meaning of their own (.c1 to .c6 in assets/report.css)."""

MOST_REWARDS = 12
"""Reward functions drawn: each colour twice, whole and dashed. More lines cannot be told apart."""

AVERAGE = "average"
"""The name of the reward's moving average, which is computed and not recorded."""


HELD_OUT = "reward"
"""The name of the mean reward in evaluation.json, which no step has."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A metric of a plot. `style` is a class of assets/report.css, with `dashed` for a bound or a second meaning."""

    metric: str
    label: str
    style: str
    panel: int = 0


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot: one or more panels above each other, with one y axis each (`units`)."""

    title: str
    caption: str
    units: tuple[str, ...]
    lines: tuple[Line, ...]
    least: float | None = None
    """The lowest value that the last panel shows: lower ones would flatten everything else."""
    phases: bool = False
    """Whether the background shows the phases of the reward curve."""


def _line(metric: str, label: str, style: str, panel: int = 0) -> Line:
    return Line(metric=metric, label=label, style=style, panel=panel)


_NATS = "nats per token"

SECTIONS: dict[str, tuple[Plot, ...]] = {
    "Objective": (
        Plot(
            title="Reward",
            caption="Mean reward of a step, its moving average, and the reward after the KL part. Crashes are shaded.",
            units=("reward",),
            lines=(
                _line("objective/scores", "each step", "quiet"),
                _line(AVERAGE, "average", "c1 strong"),
                _line("objective/rlhf_reward", "less the KL part", "c2 dashed"),
            ),
        ),
        Plot(
            title="KL from the reference",
            caption="The KL over the vocabulary, its estimate by the mean log-ratio (k1), and the budget. Behind them "
            "the phases of the reward.",
            units=(_NATS,),
            lines=(
                _line("objective/kl", "k1, each step", "quiet dashed"),
                _line("objective/kl_exact", "exact, each step", "quiet"),
                _line("safe/kl_short", "fast filter", "c1 strong"),
                _line("safe/kl_long", "slow filter", "c4"),
                _line("safe/threshold", "threshold", "limit dashed"),
            ),
            phases=True,
        ),
        Plot(
            title="Entropy",
            caption="Mean entropy of the sampling policy. Below the floor the gate acts.",
            units=(_NATS,),
            lines=(
                _line("objective/entropy", "entropy", "c1 strong"),
                _line("policy/entropy_avg", "in the update", "quiet"),
                _line("safe/entropy_floor", "floor", "limit dashed"),
            ),
        ),
        Plot(
            title="Spread of the rewards",
            caption="Standard deviation within a step, and mean and deviation that the normaliser uses.",
            units=("reward",),
            lines=(
                _line("objective/scores_std", "of a step", "c1"),
                _line("safe/reward_std", "normaliser, deviation", "c2"),
                _line("safe/reward_mean", "normaliser, mean", "c3"),
            ),
        ),
        Plot(
            title="Disagreement of the rewards",
            caption="Mean deviation over the rewards that reward.aggregate combines. A climb is over-optimisation.",
            units=("deviations",),
            lines=(_line("reward/disagreement", "disagreement", "c1 strong"),),
        ),
        Plot(
            title="NLL of the reference",
            caption="How unlikely the reference finds the text. A climb is gibberish or a reward hack.",
            units=(_NATS,),
            lines=(_line("objective/ref_nll", "NLL", "c1 strong"),),
        ),
        Plot(
            title="KL, other measures",
            caption="The estimate k3, which is never negative, and the standard error of the KL that the controller "
            "is told; below them the KL of a whole completion, and the KL part of the reward.",
            units=(_NATS, "nats per sequence", "reward"),
            lines=(
                _line("objective/kl_k3", "k3", "c1"),
                _line("objective/kl_error", "standard error", "quiet"),
                _line("objective/kl_per_sequence", "per sequence", "c2", 1),
                _line("objective/non_score_reward", "KL part", "c3", 2),
            ),
        ),
    ),
    "Policy update": (
        Plot(
            title="Size of the update",
            caption="KL of the update (half the mean squared change of the log-probs); the probability ratio, which "
            "stays near 1; its variance.",
            units=(_NATS, "ratio", "ratio squared"),
            lines=(
                _line("policy/approxkl_avg", "approximate KL", "c1"),
                _line("val/ratio", "ratio", "c2", 1),
                _line("val/ratio_var", "variance", "c3", 2),
            ),
        ),
        Plot(
            title="Clip share",
            caption="Share of tokens whose ratio or value was clipped.",
            units=("share",),
            lines=(
                _line("policy/clipfrac_avg", "policy", "c1"),
                _line("val/clipfrac_avg", "critic", "c2"),
            ),
        ),
        Plot(
            title="Step scale",
            caption="The preview measures how far each update moves the policy and keeps it within its bound; the "
            "share of the proposed steps that was taken, steps that were not, and the forward passes that it took.",
            units=(_NATS, "share", "count"),
            lines=(
                _line("safe/moved_kl", "KL of the update", "c1"),
                _line("safe/update_kl", "its bound", "limit dashed"),
                _line("safe/step_scale", "share taken", "c2", 1),
                _line("policy/skipped_steps", "steps without a finite gradient", "limit", 2),
                _line("safe/looks", "passes", "c3", 2),
            ),
        ),
        Plot(
            title="Gradient norms",
            caption="2-norms before clipping.",
            units=("policy", "critic"),
            lines=(
                _line("grad_norm/policy", "policy", "c1"),
                _line("grad_norm/critic", "critic", "c2", 1),
            ),
        ),
        Plot(
            title="Policy loss",
            caption="The clipped surrogate and, where the KL acts in the loss, the KL term.",
            units=("loss",),
            lines=(
                _line("loss/policy_avg", "policy", "c1"),
                _line("loss/kl_avg", "KL term", "c2"),
            ),
        ),
        Plot(
            title="Learning rates",
            caption="The schedule, times the factor of the roll-backs.",
            units=("policy", "critic"),
            lines=(_line("lr", "policy", "c1"), _line("lr_critic", "critic", "c2", 1)),
        ),
    ),
    "Critic": (
        Plot(
            title="Critic",
            caption="Loss, and share of the returns' variance that the critic explains (cut at -1).",
            units=("loss", "explained"),
            lines=(
                _line("loss/value_avg", "loss", "c1"),
                _line("val/explained_variance", "explained variance", "c2", 1),
            ),
            least=-1,
        ),
        Plot(
            title="Values",
            caption="Mean value and mean return; below, how far the two heads and the target heads lie apart.",
            units=("normalised", "normalised"),
            lines=(
                _line("val/mean", "value", "c1"),
                _line("val/returns_mean", "return", "c2"),
                _line("safe/head_gap", "between the heads", "c3", 1),
                _line("safe/target_gap", "to the target heads", "c4", 1),
            ),
        ),
    ),
    "Completions and prompts": (
        Plot(
            title="Variety",
            caption="distinct-2: different token pairs / all token pairs of a step. Falling, all answers become one.",
            units=("share",),
            lines=(_line("completions/distinct_2", "distinct-2", "c1 strong"),),
        ),
        Plot(
            title="Completion length",
            caption="Tokens of a response: mean, shortest and longest of each step.",
            units=("tokens",),
            lines=(
                _line("completions/mean_length", "mean", "c1 strong"),
                _line("completions/min_length", "shortest", "quiet"),
                _line("completions/max_length", "longest", "quiet dashed"),
            ),
        ),
        Plot(
            title="Cut off, skipped, truncated",
            caption="Shares of completions that did not end, and that are in a group whose rewards are all equal; "
            "completions without a reward, prompts that were too long.",
            units=("share", "count"),
            lines=(
                _line("completions/clipped_ratio", "did not end", "c1"),
                _line("frac_reward_zero_std", "group without variance", "quiet dashed"),
                _line("completions/skipped", "no reward", "c2", 1),
                _line("prompts/truncated", "prompts cut", "c3", 1),
            ),
        ),
    ),
    "Controller": (
        Plot(
            title="Gate and KL coefficient",
            caption="Gate: factor on the coefficient at low entropy. Coefficient: weight of the KL.",
            units=("gate", "coefficient"),
            lines=(
                _line("safe/gate", "gate", "c2"),
                _line("safe/kl_coef", "coefficient", "c1", 1),
            ),
        ),
        Plot(
            title="Excess and PID",
            caption="KL above its threshold, and the three terms that move the threshold.",
            units=(_NATS, "term"),
            lines=(
                _line("safe/excess", "excess", "c1"),
                _line("safe/pid_p", "P", "c2", 1),
                _line("safe/pid_i", "I", "c3", 1),
                _line("safe/pid_d", "D", "c4", 1),
            ),
        ),
        Plot(
            title="Roll-backs",
            caption="Roll-backs of the run before each step.",
            units=("count",),
            lines=(_line("safe/rollbacks", "roll-backs", "limit"),),
        ),
    ),
    "Time and memory": (
        Plot(
            title="Seconds of a step",
            caption="The whole step and its parts.",
            units=("seconds",),
            lines=(
                _line("total_s", "whole step", "quiet"),
                _line("rollout_s", "sampling", "c1"),
                _line("scoring_s", "scoring", "c2"),
                _line("logprobs_s", "log-probs", "c3"),
                _line("control_s", "control", "c4"),
                _line("update_s", "update", "c5"),
            ),
        ),
        Plot(
            title="Speed",
            caption="Response tokens sampled / seconds of the whole step.",
            units=("tokens per s",),
            lines=(_line("tokens_per_s", "tokens per s", "c1 strong"),),
        ),
        Plot(
            title="Memory",
            caption="Memory taken at the end of a step: on CUDA what PyTorch reserves, on a CPU the whole process.",
            units=("GB",),
            lines=(_line("memory_gb", "memory", "c1 strong"),),
        ),
    ),
}


def rewards_plot(rows: Rows) -> Plot:
    """The plot of the reward functions (`rewards/<name>/mean`)."""
    return _named(rows, "rewards/", "/mean", "Each reward", "Mean of each reward function, unweighted.", "reward")


def recorded_plot(rows: Rows) -> Plot:
    """The plot of what reward functions record themselves (`user/<name>`)."""
    caption = "Figures that the reward functions recorded with log_metric."
    return _named(rows, "user/", "", "Recorded by rewards", caption, "figure")


def gold_plot(measured: Rows) -> Plot:
    """The plot of gold rewards (`gold/<name>/mean` of evaluation.json) above each other with the reward itself."""
    named = _named(measured, "gold/", "/mean", "", "", "")
    caption = (
        "Means on the held-out prompts: the reward that is trained on, and gold rewards, which are only measured. "
    )
    caption += "Gold that falls while the reward rises is over-optimisation."
    lines = (_line(HELD_OUT, "reward", "quiet"), *(dataclasses.replace(line, panel=1) for line in named.lines))
    return Plot(title="Reward and gold", caption=caption, units=("reward", "gold"), lines=lines if named.lines else ())


def _named(rows: Rows, before: str, after: str, title: str, caption: str, unit: str) -> Plot:
    """A plot with a line for each figure of this form: names are known only from the run."""
    form = re.compile(f"{before}(.+){after}")
    names = list(dict.fromkeys(name for row in rows for name in row if form.fullmatch(name)))
    more = f" The first {MOST_REWARDS} of {len(names)}." if len(names) > MOST_REWARDS else ""
    styles = [f"c{1 + n % COLOURS}" + (" dashed" if n >= COLOURS else "") for n in range(MOST_REWARDS)]
    return Plot(
        title=title,
        caption=caption + more,
        units=(unit,),
        lines=tuple(
            _line(name, name.removeprefix(before).removesuffix(after), style)
            for name, style in zip(names, styles, strict=False)
        ),
    )


def sections(rows: Rows, measured: Rows = ()) -> dict[str, Sequence[Plot]]:
    """The plots of a run by section: SECTIONS, with those of its reward functions after the reward. `measured`: the
    figures of its evaluations."""
    first, *rest = SECTIONS["Objective"]
    own = [plot for plot in (gold_plot(measured), recorded_plot(rows)) if plot.lines]
    return {**SECTIONS, "Objective": (first, rewards_plot(rows), *own, *rest)}
