"""What survives: presets x learning rates x seeds on the built-in pair, each run in a process of its own.

    python benchmarks/stability.py --presets safe ppo --learning-rates 1e-4 3e-3 --seeds 0 1 2
    python benchmarks/stability.py --presets safe --seeds 0 1 2 3 4 --deadline 600     false alarms: incidents must be 0

Printed are means over the seeds, with the half-range from least to greatest in brackets: reward before and after on
held-out prompts, the KL at the end and at most, entropy and distinct-2 at the end as shares of their start (collapse is
near 0, gibberish far above 1), reward crashes by the report's definition, and what preview and guard did. A run that
ends with another code than 0 is named with it. --json keeps every run's figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measuring import provenance

from stable_rlhf.report.run import headline, read_run
from stable_rlhf.runs.incidents import read
from stable_rlhf.runs.metrics import read_rows

COLUMNS = {
    "reward before": "reward_before",
    "reward after": "reward_after",
    "KL end": "kl_end",
    "KL max": "kl_max",
    "entropy / start": "entropy",
    "distinct-2 / start": "distinct",
    "crashes": "crashes",
    "steps scaled": "scaled",
    "least scale": "least_scale",
    "skips": "skips",
    "roll-backs": "rollbacks",
}


def run(preset: str, rate: float, seed: int, arguments: argparse.Namespace, stop_at: float) -> dict[str, Any]:
    """Trains one, and reads its figures from the run's own files."""
    name = {"preset": preset, "learning_rate": rate, "seed": seed}
    left = stop_at - time.monotonic()
    if left < arguments.least:
        return {**name, "status": "not begun: out of time"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "stable_rlhf", "train", "--preset", preset, "--output_dir", str(out)]
        command += ["--optim.learning_rate", str(rate), "--seed", str(seed), "--max_steps", str(arguments.steps)]
        command += ["--model.device", arguments.device, "--log.progress", "false", "--log.completions_steps", "0"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        try:
            done = subprocess.run(
                [*command, *arguments.passed],
                env=environment,
                capture_output=True,
                text=True,
                timeout=left,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {**name, "status": "out of time"}
        said = done.stderr.strip().splitlines()
        status = "done" if done.returncode == 0 else f"exit code {done.returncode}: {said[-1] if said else ''}"
        if not (out / "metrics.jsonl").is_file():
            return {**name, "status": status}
        return {**name, "status": status, **figures(out)}


def figures(folder: Path) -> dict[str, Any]:
    """The run's figures, None where it has none."""
    rows, _ = read_rows(folder / "metrics.jsonl")
    head, incidents = headline(read_run(folder)), read(folder)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    actions = [incident["action"] for incident in incidents]
    scales = [row["safe/step_scale"] for row in rows if "safe/step_scale" in row]

    def share(metric: str) -> float | None:
        first, last = (fmean(row[metric] or 0.0 for row in part) for part in (rows[:5], rows[-5:]))
        return last / first if first else None

    return {
        "steps": len(rows),
        "reward_before": evaluation["before"]["reward"],
        "reward_after": evaluation.get("after", {}).get("reward"),
        "rewards": [row["objective/scores"] for row in rows],
        "kls": [row["objective/kl"] for row in rows],
        "explained": [row["val/explained_variance"] for row in rows],
        "kl_end": fmean(row["objective/kl"] for row in rows[-5:]),
        "kl_max": head.kl_max,
        "entropy": share("objective/entropy"),
        "distinct": share("completions/distinct_2"),
        "crashes": len(head.crashes),
        "scaled": sum(row.get("safe/scaled_steps", 0) for row in rows),
        "least_scale": min(scales) if scales else None,
        "preview_kl": [row.get("safe/preview_kl") for row in rows],
        "skips": actions.count("skip"),
        "rollbacks": actions.count("roll back"),
        "incidents": [f"{incident['step']}: {incident['rule']}: {incident['seen']}" for incident in incidents],
    }


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each preset and learning rate, and a line for each run that did not end well."""
    lines = [f"| preset | learning rate | runs | {' | '.join(COLUMNS)} |", "|---" * (3 + len(COLUMNS)) + "|"]
    for preset, rate in dict.fromkeys((run["preset"], run["learning_rate"]) for run in runs):
        group = [run for run in runs if (run["preset"], run["learning_rate"]) == (preset, rate) and "steps" in run]
        cells = []
        for key in COLUMNS.values():
            values = [run[key] for run in group if run.get(key) is not None]
            middle = f"{fmean(values):.3g}" if values else "-"
            cells.append(f"{middle} ({(max(values) - min(values)) / 2:.2g})" if len(values) > 1 else middle)
        lines.append(f"| {preset} | {rate:g} | {len(group)} | {' | '.join(cells)} |")
    odd = [run for run in runs if run["status"] != "done"]
    lines += ["", *(f"- {run['preset']} {run['learning_rate']:g} seed {run['seed']}: {run['status']}" for run in odd)]
    told = [(run, incident) for run in runs for incident in run.get("incidents", [])]
    lines += [f"- {run['preset']} {run['learning_rate']:g} seed {run['seed']}, step {said}" for run, said in told]
    return "\n".join(lines)


def parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--presets", nargs="+", default=["safe", "safe-no-preview", "ppo"])
    parser.add_argument("--learning-rates", nargs="+", type=float, default=[1e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="OMP threads of each")
    parser.add_argument("--deadline", type=float, default=86_400.0, help="seconds after which no run goes on")
    parser.add_argument("--least", type=float, default=30.0, help="seconds that must be left for a run to begin")
    parser.add_argument("--json", type=Path, help="write every run's figures to this file")
    parser.epilog = "Any other option goes to `stable-rlhf train`."
    known, passed = parser.parse_known_args(given)
    known.passed = passed
    return known


def main(given: Sequence[str]) -> None:
    arguments, runs = parse(given), []
    stop_at = time.monotonic() + arguments.deadline
    with ThreadPoolExecutor(arguments.jobs) as pool:
        cases = list(product(arguments.seeds, arguments.learning_rates, arguments.presets))  # a seed of each first
        futures = [pool.submit(run, preset, rate, seed, arguments, stop_at) for seed, rate, preset in cases]
        for future in futures:
            runs.append(future.result())
            if arguments.json:
                arguments.json.write_text(json.dumps(runs, indent=1) + "\n")
    device = torch.device("cuda" if arguments.device != "cpu" and torch.cuda.is_available() else "cpu")
    print(f"{provenance(device)}; {arguments.steps} steps; {arguments.jobs} runs at a time; {arguments.passed}\n")
    print(table(sorted(runs, key=lambda run: (run["learning_rate"], run["preset"]))))


if __name__ == "__main__":
    main(sys.argv[1:])
