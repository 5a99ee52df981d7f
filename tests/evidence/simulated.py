"""Outcomes of runs that never were, with known figures and curves that look like real ones."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from stable_rlhf.evidence.outcome import Outcome, Status

CALM = "calm"


def simulated(
    settings: dict[str, Any],
    *,
    steps: int = 1000,
    gain: float = 1.0,
    drift: float = 0.1,
    crash: bool = False,
    **more: Any,
) -> Outcome:
    """A run whose reward rises by about `gain` to a KL of about `drift`, and falls in the middle where it crashes."""
    seed = int(settings["seed"])
    draw = np.random.default_rng([seed, int(1e6 * gain) % 10_000, int(1e6 * drift) % 10_000])
    at = np.arange(steps)
    way = 1 - np.exp(-at / (0.2 * steps))
    own = 1 + 0.06 * draw.standard_normal()
    reward = 0.2 + gain * own * way + 0.08 * draw.standard_normal(steps)
    kl = drift * own**2 * way + 0.01 * draw.standard_normal(steps)
    if crash:
        begin = int(steps * draw.uniform(0.5, 0.7))
        reward[begin:] -= 0.9 * gain * np.minimum(1, (at[begin:] - begin) / (0.05 * steps))
        kl[begin:] += 2.5 * drift
    calm = settings.get("preset") == CALM
    curves = {
        "objective/scores": reward,
        "objective/kl": kl,
        "objective/entropy": 2.6 * np.exp(-1.2 * kl) + 0.03 * draw.standard_normal(steps),
        "completions/distinct_2": 0.9 * np.exp(-kl) + 0.01 * draw.standard_normal(steps),
        "objective/ref_nll": 2.4 + 2 * kl + 0.03 * draw.standard_normal(steps),
        "completions/mean_length": 28 + 2 * way + draw.standard_normal(steps),
        "val/explained_variance": 0.8 * own * way
        - 3 * np.exp(-at / (0.03 * steps))
        + 0.05 * draw.standard_normal(steps),
    }
    if calm:
        curves["safe/threshold"] = drift * (1.1 + 0.2 * way)
        curves["safe/gate"] = 1 + 0.2 * way * draw.uniform(0, 1)
        curves["safe/kl_coef"] = 0.02 * way * own
    figures = {
        "reward/average": reward.mean(),
        "reward/final": reward[-20:].mean(),
        "kl/final": kl[-5:].mean(),
        "kl/max": kl.max(),
        "entropy/final": curves["objective/entropy"][-5:].mean(),
        "distinct_2/final": curves["completions/distinct_2"][-5:].mean(),
        "ref_nll/final": curves["objective/ref_nll"][-5:].mean(),
        "length/final": curves["completions/mean_length"][-5:].mean(),
        "explained_variance": curves["val/explained_variance"].mean(),
        "healthy": float(not crash),
        "crashes": float(crash),
        "drawdown": 0.9 * gain if crash else 0.03 * own,
        "seconds": 2.0 * own,
        "tokens_per_s": 3100.0 / own,
        "memory": 3.2,
        "gold/judge": 0.1 + 0.6 * gain * own * 0.96 - (0.7 * gain if crash else 0),
    }
    every = max(1, steps // 10)
    gold = np.arange(0, steps + 1, every)
    judged = 0.1 + 0.6 * gain * own * (1 - np.exp(-gold / (0.3 * steps))) - 0.7 * gain * crash * (gold > 0.7 * steps)
    given: dict[str, Any] = {
        "name": "/".join(f"{name}={value}" for name, value in settings.items()),
        "status": Status.FINISHED,
        "settings": settings,
        "inputs": {"data": "builtin", "model": "builtin"},
        "steps": steps,
        "figures": {key: float(value) for key, value in figures.items()},
        "curves": {key: (at, np.asarray(values, np.float32)) for key, values in curves.items()},
        "seconds": (at, np.cumsum(np.full(steps, 2.0 * own))),
        "gold": {"judge": (gold, judged.astype(np.float32))},
    }  # fmt: skip
    return Outcome(**(given | more))


def sweep(
    presets: tuple[str, ...] = (CALM, "wild"),
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3),
    betas: tuple[float, ...] = (0.05,),
    seeds: int = 5,
    steps: int = 1000,
) -> list[Outcome]:
    """Presets x rates x betas x seeds. Higher rates gain more; of the wild ones some crash."""
    return [
        simulated(
            {"preset": preset, "optim.learning_rate": rate, "kl.settings.beta": beta, "seed": seed},
            steps=steps,
            gain=0.5 + 0.25 * np.log10(rate / 1e-5) - (0.1 if preset == CALM else 0) - 2 * (beta - 0.05),
            drift=0.08 * np.sqrt(rate / 1e-4) * (1 if preset == CALM else 1.9) * 0.05 / beta,
            crash=preset != CALM and rate >= 1e-3 and seed % 2 == 0,
        )
        for preset, rate, beta, seed in itertools.product(presets, rates, betas, range(seeds))
    ]
