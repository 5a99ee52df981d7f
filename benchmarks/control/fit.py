"""The figures of the simulated `Policy` (tests/control/plants.py), read from recorded runs.

    python benchmarks/control/fit.py RUN_FOLDER ...

One line a run: pull (coefficient times distance over the last 30 steps, where the KL rests), distance of one update on
the way up, share of it that advances (the cosine), noise of the KL from one rollout to the next beside what k1 of that
many tokens must have, all relative. What the defaults of `Policy` were taken from, the built-in pair over 100 steps,
five seeds, and SmolLM2-135M on sentiment, three seeds (means):

| runs | pull | one update | cosine | noise of k1 | expected |
|---|---|---|---|---|---|
| `ppo`, rate 1e-4 | 0.047 | 0.107 | 0.59 | 6.8% | 7.1% |
| `safe`, rate 1e-4 | 0.037 | 0.099 | 0.49 | 6.7% | 6.9% |
| `safe`, rate 1e-3 | 0.121 | 0.077 | 0.63 | 6.8% | 6.8% |
| `safe`, rate 3e-3 | 0.023 | 0.034 | 0.75 | 6.3% | 7.5% |
| SmolLM2, `safe`, 3e-4 | 0.016 | 0.107 | 0.55 | 8.1% | 5.3% |

So what a rollout's KL shows is nearly all noise of k1, and the policies themselves hardly fluctuate.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

RISE = (0.2, 0.55)  # distances between which the speed is read: beyond the first steps, before the coefficient holds


def figures(rows: list[dict[str, Any]]) -> tuple[float, float, float, float, float]:
    """(pull, distance of one update, cosine, noise, expected noise) of one run's metrics."""
    kls = [row["objective/kl"] for row in rows]
    distances = [math.sqrt(2 * max(0.0, kl)) for kl in kls]
    begins, ends = (next(i for i, distance in enumerate(distances) if distance > level) for level in RISE)
    speed = (distances[ends] - distances[begins]) / max(1, ends - begins)
    update = math.sqrt(2 * statistics.fmean(row["policy/approxkl_avg"] for row in rows[begins : max(ends, begins + 1)]))
    rest = rows[-30:]
    pull = statistics.fmean(row["safe/kl_coef"] for row in rest) * math.sqrt(2 * statistics.fmean(kls[-30:]))
    half = kls[len(kls) // 2 :]
    level = statistics.fmean(half)
    noise = statistics.pstdev([b - a for a, b in itertools.pairwise(half)]) / math.sqrt(2) / level
    tokens = (rows[1]["episode"] - rows[0]["episode"]) * statistics.fmean(r["completions/mean_length"] for r in rest)
    return pull, update, speed / update, noise, math.sqrt(2 / (level * tokens))


def main() -> None:
    print("| run | pull | one update | cosine | noise of k1 | expected |", "|---|---|---|---|---|---|", sep="\n")
    for folder in map(Path, sys.argv[1:]):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        pull, update, cosine, noise, expected = figures(rows)
        print(f"| {folder.name} | {pull:.3f} | {update:.3f} | {cosine:.2f} | {noise:.1%} | {expected:.1%} |")


if __name__ == "__main__":
    main()
