"""The study's pictures, as SVG: reward against KL, reward against the learning rate, budgets, gold and proxy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from study.frontier import best_ppo, is_tuned_ppo, mostly_healthy
from study.runs import Run, evaluations, gold_of, kl_of, values
from study.tables import arms_in, mean, select

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999", "#7b3f00")
"""Okabe and Ito's, which stay apart for the colour-blind, a grey and a brown."""
SETTINGS: Any = {
    "svg.hashsalt": "study",  # the same runs give the same file
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}


def draw(bench: str, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draws what there are runs for; returns the files."""
    made = []
    with plt.rc_context(SETTINGS):
        for name, make in {"frontier": _frontier, "rates": _rates, "budgets": _budgets, "gold": _gold}.items():
            figure = make(runs)
            if figure is not None:
                made.append(folder / f"{bench}-{name}.svg")
                figure.savefig(made[-1], metadata={"Date": None}, bbox_inches="tight")
                plt.close(figure)
    return made


def _frontier(runs: Sequence[Run]) -> Any:
    """Final reward against sqrt(KL), a panel for each rate: a point is a run, hollow where it did not end healthy."""
    main = [run for run in select(runs, "main") if {"kl/final", "reward/final"} <= run.figures.keys()]
    rates = sorted({run.rate for run in main})
    if not rates:
        return None
    figure, axes = plt.subplots(1, len(rates), figsize=(3.0 * len(rates), 3.0), sharey=True, squeeze=False)
    colours = _colours(main)
    for panel, rate in zip(axes[0], rates, strict=True):
        here = [run for run in main if run.rate == rate]
        for arm in arms_in(here):
            cell = [run for run in here if run.arm == arm]
            healthy = [bool(run.figures.get("healthy")) for run in cell]
            panel.scatter(
                [math.sqrt(max(0.0, run.figures["kl/final"])) for run in cell],
                [run.figures["reward/final"] for run in cell],
                s=16,
                edgecolors=colours[_family(arm)],
                facecolors=[colours[_family(arm)] if well else "none" for well in healthy],
                label=_family(arm),
            )
        panel.set_title(f"learning rate {rate:g}")
        panel.set_xlabel("sqrt(KL), nats per token")
    axes[0][0].set_ylabel("final reward")
    _legend(figure, axes[0])
    return figure


def _rates(runs: Sequence[Run]) -> Any:
    """Final reward against the learning rate: mean and 95 % interval of each arm; hollow where most runs broke."""
    main = [run for run in select(runs, "main") if "reward/final" in run.figures]
    if len({run.rate for run in main}) < 2:
        return None
    figure, axes = plt.subplots(figsize=(5.5, 3.5))
    colours = _colours(main)
    for arm in arms_in(main):
        points = []
        for rate in sorted({run.rate for run in select(main, arm=arm)}):
            cell = select(main, arm=arm, rate=rate)
            found = mean(values(cell, "reward/final"))
            if found is not None:
                half = 0.0 if found.high is None else found.high - found.value
                points.append((rate, found.value, half, mostly_healthy(cell)))
        rates, means, halves, healthy = zip(*points, strict=True)
        colour = colours[_family(arm)]
        axes.errorbar(rates, means, halves, color=colour, lw=1, label=_family(arm))
        faces = [colour if well else "white" for well in healthy]
        axes.scatter(rates, means, s=18, edgecolors=colour, facecolors=faces, zorder=3)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("final reward, 95 % interval")
    _legend(figure, [axes])
    return figure


def _budgets(runs: Sequence[Run]) -> Any:
    """KL over its threshold by step, of one run for each budget, and the final reward by budget."""
    cell = [run for run in select(runs, "budget") if run.rows]
    if not cell:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.0, 3.2))
    arms = sorted(arms_in(cell), key=lambda arm: float(arm.split()[-1]))
    for at, arm in enumerate(arms):
        colour = plt.get_cmap("viridis")(at / max(1, len(arms) - 1))
        run = min(select(cell, arm=arm), key=lambda run: run.seed)
        pairs = [
            (row["step"], kl / row["safe/threshold"])
            for row in run.rows
            if row.get("safe/threshold") and (kl := kl_of(row)) is not None
        ]
        if pairs:
            left.plot(*zip(*pairs, strict=True), color=colour, lw=0.7, label=arm)
        found = mean(values(select(cell, arm=arm), "reward/final"))
        if found is not None:
            half = 0.0 if found.high is None else found.high - found.value
            right.errorbar(float(arm.split()[-1]), found.value, half, color=colour, marker="o")
    left.axhspan(0.85, 1.15, color="0.9")
    left.set_ylim(-0.2, 2.5)
    left.set_xlabel("step")
    left.set_ylabel("KL / threshold in force")
    left.legend(fontsize=7, frameon=False)
    right.set_xscale("log")
    right.set_xlabel("budget, nats per token")
    right.set_ylabel("final reward, 95 % interval")
    return figure


def _gold(runs: Sequence[Run]) -> Any:
    """Reward and gold against sqrt(KL) of every evaluation, each less its start, at PPO's best rate."""
    gold, best = gold_of(runs), best_ppo(runs)
    rate = best[1] if best is not None else min((run.rate for run in runs), default=None)
    main = [run for run in select(runs, "main", rate=rate) if gold is not None and evaluations(run, gold)]
    if gold is None or not main:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.0, 3.4), sharex=True)
    colours, seen = _colours(main), set[str]()
    for run in main:
        points = evaluations(run, gold)
        across = [math.sqrt(max(0.0, point["kl"])) for point in points]
        for panel, name in zip(axes, ("reward", "gold"), strict=True):
            family = _family(run.arm)
            label = family if name == "reward" and family not in seen else None
            seen.add(family)
            rises = [point[name] - points[0][name] for point in points]
            panel.plot(across, rises, color=colours[family], lw=0.7, marker=".", ms=3, label=label)
    for panel, title in zip(
        axes, ("reward that is trained on, less its start", f"gold ({gold}), less its start"), strict=True
    ):
        panel.set_xlabel("sqrt(KL), nats per token")
        panel.set_ylabel(title)
    _legend(figure, axes)
    return figure


def _family(arm: str) -> str:
    """One colour for PPO's whole ladder, one for each other method."""
    return "ppo, tuned" if is_tuned_ppo(arm) else arm


def _colours(runs: Sequence[Run]) -> dict[str, str]:
    families = list(dict.fromkeys(_family(arm) for arm in arms_in(runs)))
    return {family: COLOURS[at % len(COLOURS)] for at, family in enumerate(families)}


def _legend(figure: Any, panels: Sequence[Any]) -> None:
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="lower center", bbox_to_anchor=(0.5, -0.12), ncol=6, frameon=False)
