"""TRL's arms of bench M: GRPO and RLOO at four settings each, on our prompts and reward (peers/trl_run.py).

    python benchmarks/study/trl_peers.py --model FOLDER --out runs/TRL --seeds 2 --seconds 560   # which is best?
    python benchmarks/study/trl_peers.py --model FOLDER --out runs/TRL --only grpo,0,1e-4 --only rloo,0.04,1e-4
    python benchmarks/study/trl_peers.py --model FOLDER --out runs/TRL --budget 0.3 --rates 1e-4,1e-3   # with SAFE

A run's folder has the name that report.py reads; a run that is there is not made again, one that the time stopped is
made anew. It needs TRL (pip install 'stable-rlhf[reward]').
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stable_rlhf.evidence import Place, places, visible_gpus

SCRIPT = Path(__file__).parent.parent / "peers" / "trl_run.py"
BETAS, RATES = (0.0, 0.04), (1e-4, 3e-4)
"""The four settings of each: without and with TRL's former default coefficient, at PPO's best rate and below."""


@dataclass(frozen=True)
class Peer:
    """One run of TRL."""

    algorithm: str
    beta: float
    rate: float
    seed: int
    budget: float | None = None
    """Of SAFE's callback, which then sets beta."""

    @property
    def name(self) -> str:
        """A label as those of arms.py."""
        setting = f"{self.beta:g}" if self.budget is None else f"SAFE_{self.budget:g}"
        return f"part=main,arm=TRL_{self.algorithm}_{setting},rate={self.rate:g},seed={self.seed}"

    def command(self, model: str, gguf_file: str | None, steps: int, out: Path) -> list[str]:
        file = [] if gguf_file is None else ["--gguf-file", gguf_file]
        options = ["--algorithm", self.algorithm, "--beta", str(self.beta), "--learning-rate", str(self.rate)]
        options += [] if self.budget is None else ["--budget", str(self.budget)]
        options += ["--seed", str(self.seed), "--steps", str(steps), "--model", model, *file, "--lora-r", "32"]
        return [
            *(sys.executable, str(SCRIPT), *options),
            *("--reward", "stable_rlhf.rewards.vader:compound", "--out", str(out / self.name)),
        ]


def peers(seeds: int, only: Sequence[str], budget: float | None = None, rates: Sequence[float] = RATES) -> list[Peer]:
    """All runs, seed by seed; `only`: ALGORITHM,BETA,RATE of those that are wanted. With a budget every run has SAFE's
    callback, which makes the coefficients one."""
    if budget is not None:
        chosen = itertools.product(range(seeds), ("grpo", "rloo"), rates)
        return [Peer(algorithm, BETAS[-1], rate, seed, budget) for seed, algorithm, rate in chosen]
    grid = itertools.product(range(seeds), ("grpo", "rloo"), BETAS, rates)
    wanted = {(algorithm, float(beta), float(rate)) for algorithm, beta, rate in (text.split(",") for text in only)}
    made = [Peer(algorithm, beta, rate, seed) for seed, algorithm, beta, rate in grid]
    return [peer for peer in made if not wanted or (peer.algorithm, peer.beta, peer.rate) in wanted]


def log_of(folder: Path) -> Path:
    """Beside the folder, whose name has dots."""
    return folder.with_name(f"{folder.name}.txt")


def is_done(folder: Path) -> bool:
    """trl_run.py prints this once the counts are compared."""
    log = log_of(folder)
    return log.is_file() and "completions: TRL" in log.read_text(encoding="utf-8", errors="replace")


def run_all(waiting: list[list[str]], logs: list[Path], where: Sequence[Place], until: float) -> None:
    """Runs the commands, one at each place at a time; those that run when the time is up are ended."""
    free, running = list(where), list[tuple[subprocess.Popen[bytes], Place, Path]]()
    while (waiting or running) and time.monotonic() < until:
        while waiting and free:
            place, log = free.pop(0), logs.pop(0)
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as file:
                environment = {**os.environ, **place.environment}
                job = subprocess.Popen(waiting.pop(0), stdout=file, stderr=subprocess.STDOUT, env=environment)
            running.append((job, place, log))
        time.sleep(0.2)
        for each in [each for each in running if each[0].poll() is not None]:
            running.remove(each)
            free.append(each[1])
            print(
                f"{each[2].stem}: {'done' if each[0].returncode == 0 else f'ended with {each[0].returncode}'}",
                flush=True,
            )
    for job, _, log in running:
        job.terminate()
        ended = job.wait() == 0 or is_done(log.with_suffix(""))  # it may have ended in the last second
        print(f"{log.stem}: {'done' if ended else 'stopped, the time is up'}", flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--gguf-file")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time on each GPU")
    parser.add_argument("--only", action="append", default=[], metavar="ALGORITHM,BETA,RATE")
    parser.add_argument("--budget", type=float, help="put SAFE's callback into each run, with this KL budget")
    parser.add_argument("--rates", default=",".join(f"{rate:g}" for rate in RATES), help="learning rates")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args(arguments)
    until = time.monotonic() + given.seconds
    wanted = peers(given.seeds, given.only, given.budget, [float(rate) for rate in given.rates.split(",")])
    to_do = [peer for peer in wanted if not is_done(given.out / peer.name)]
    commands = [peer.command(given.model, given.gguf_file, given.steps, given.out) for peer in to_do]
    logs = [log_of(given.out / peer.name) for peer in to_do]
    run_all(commands, logs, places(given.jobs, visible_gpus(), {}), until)


if __name__ == "__main__":
    main(sys.argv[1:])
