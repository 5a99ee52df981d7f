"""Runs one bench of the study until it is done or the time is up, and packs what is finished.

    python benchmarks/study/bench.py S --out runs/S --device cpu --jobs 64 --seeds 5 --steps 300 --seconds 560
    CUDA_VISIBLE_DEVICES=0,1 python benchmarks/study/bench.py M --model FOLDER --out runs/M --jobs 3 --seconds 560
    python benchmarks/study/bench.py L --model FOLDER --out runs/L --seeds 3 --seconds 560
    python benchmarks/study/bench.py H --model FOLDER --data pairs.jsonl.gz --out runs/H --seconds 560
    python benchmarks/study/bench.py S --out runs/tiny --device cpu --seeds 1 --steps 2 --arms safe   # a trial

The folder is a sweep (docs/sweep.md): the same command continues one that the time stopped, `stable-rlhf compare`
reads it, outcomes.jsonl has the end of each cell. Its grid is no product, so the cells are listed in arms.py; the first
seed of every arm comes before the second of any. All cells of a bench run on one kind of device, or they would not
compare: on the CPU one core each without a GPU in sight, else --jobs on each GPU. After the last cell, or --seconds,
OUT.tar.xz holds the figures of the runs (pack.py), a few kilobytes each.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script, whose own folder has names that libraries have too
    sys.path[0] = str(Path(__file__).parents[1])

from stable_rlhf.errors import Interrupted
from stable_rlhf.evidence import Cell, Place, Processes, Sweep, places, run_sweep, visible_gpus
from stable_rlhf.evidence.processes import ends_with
from stable_rlhf.runs import sweeps
from study.arms import Arm, Maker, bench_h, bench_l, bench_m, bench_s, config_of
from study.pack import pack

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def cells_of(arms: Sequence[Arm], seeds: Sequence[int], out: Path, more: dict[str, Any]) -> Sweep:
    """The cells of all arms, seed by seed, as one sweep. Raises ConfigError before anything is written."""
    cells = []
    for seed in seeds:
        for arm in arms:
            name = f"{arm.label},seed={seed}".replace(" ", "_")
            config = config_of(arm, seed, sweeps.cell_folder(out, name), more)
            cells.append(Cell(name=name, arm=arm.label, seed=seed, config=config))
    if repeated := [cell.name for at, cell in enumerate(cells) if cell.name in {other.name for other in cells[:at]}]:
        raise SystemExit(f"two arms have the name {repeated[0]}")
    return Sweep(base={}, grid={"arm": [arm.label for arm in arms]}, seeds=list(seeds), cells=cells)


def places_of(device: str, jobs: int | None) -> list[Place]:
    """One core each and no GPU, or `jobs` on each GPU with the cores shared."""
    if device == "cpu":
        return [Place(gpu="", threads=1)] * (jobs or len(os.sched_getaffinity(0)))
    gpus = visible_gpus()
    if not gpus:
        raise SystemExit("there is no GPU: give --device cpu")
    return places(jobs or 1, gpus, {})


def reward_models(data: Path, folder: Path, model: dict[str, str], limit: int | None) -> tuple[Path, Path]:
    """(proxy, gold): reward models of the two halves of the pairs, trained side by side unless they are there."""
    from study.halves import halves

    files = halves(data, folder, limit)
    trained = []
    for part, (name, file) in enumerate(files.items()):
        output = folder / f"reward-{name}"
        if (output / "reward_model.json").is_file():
            continue
        command = [sys.executable, str(ROOT / "scripts" / "train_reward_model.py"), "--data", str(file)]
        command += ["--model", model["name"], "--output", str(output), "--seed", str(part)]
        command += ["--gguf-file", model["gguf_file"]] if "gguf_file" in model else []
        gpus = visible_gpus()
        where = {"CUDA_VISIBLE_DEVICES": gpus[part % len(gpus)]} if gpus else {}
        environment = {**os.environ, **where}
        trained.append(subprocess.Popen(command, env=environment, preexec_fn=ends_with(os.getpid())))
    codes = [each.wait() for each in trained]
    if any(codes):
        raise SystemExit("a reward model could not be trained")
    return folder / "reward-proxy", folder / "reward-gold"


def arms_of(given: argparse.Namespace) -> Maker:
    model = {"name": given.model} if given.model else {}
    model |= {"gguf_file": given.gguf_file} if given.gguf_file else {}
    if given.bench == "S":
        return bench_s(given.steps)
    if given.bench == "M":
        return bench_m(given.steps, model, given.best.split(","))
    if given.bench == "L":
        lengths = [int(length) for length in given.lengths.split(",")]
        return bench_l(given.steps, model, lengths, given.out.with_name(f"{given.out.name}-data"))
    folder = given.out.with_name(f"{given.out.name}-data")
    proxy, gold = reward_models(given.data, folder, model, given.pairs)
    return bench_h(given.steps, model, given.data, proxy, gold)


def parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("bench", choices=["S", "M", "L", "H"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the sweep; one that was stopped goes on")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--jobs", type=int, help="cells at a time: on each GPU (1), or of all cores (all)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="the seeds are this and the next ones")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seconds", type=float, help="stop the cells after so long; they save and can go on")
    parser.add_argument("--only", help="parts, such as main,budget; without it all")
    parser.add_argument("--arms", help="names of arms, such as 'safe,ppo 0.05'; without it all")
    parser.add_argument("--rates", help="learning rates, such as 1e-4,1e-3; without it all")
    parser.add_argument("--model", help="folder or hub name of the policy; bench L takes the built-in pair without it")
    parser.add_argument("--gguf-file", help="name of a GGUF file in it")
    parser.add_argument("--best", default="ppo-adaptive,asymmetric,pid-lagrangian", help="bench M: the best three of S")
    parser.add_argument("--lengths", default="16,64,256,1024", help="bench L: tokens of a completion")
    parser.add_argument("--data", type=Path, help="bench H: file of HH's pairs")
    parser.add_argument("--pairs", type=int, help="bench H: at most so many pairs a half")
    parser.add_argument("--batch-size", type=int, help="completions a step, for a trial; without it 64")
    parser.add_argument("--dry-run", action="store_true", help="print the cells")
    arguments = parser.parse_args(given)
    if arguments.bench in "MH" and not arguments.model:
        parser.error(f"bench {arguments.bench} needs --model")
    if arguments.bench == "H" and not arguments.data:
        parser.error("bench H needs --data")
    return arguments


def chosen(arms: Sequence[Arm], given: argparse.Namespace) -> list[Arm]:
    only, names = (given.only.split(",") if given.only else None), (given.arms.split(",") if given.arms else None)
    rates = [float(rate) for rate in given.rates.split(",")] if given.rates else None
    return [
        arm
        for arm in arms
        if (only is None or arm.part in only)
        and (names is None or arm.name in names)
        and (rates is None or arm.rate in rates)
    ]


def stop_after(seconds: float | None) -> threading.Timer | None:
    """Asks this process to stop, as Ctrl-C does: the sweep's cells finish their step and save."""
    if seconds is None:
        return None
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    return timer


def main(arguments: Sequence[str]) -> None:
    given = parse(arguments)
    given.out = given.out.resolve()
    timer = stop_after(None if given.dry_run else given.seconds)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    made = arms_of(given)
    for missing in dict.fromkeys(made.missing):
        print(f"left out: this version has no {missing}", flush=True)
    more: dict[str, Any] = {"model": {"device": "cpu" if given.device == "cpu" else "cuda"}}
    if given.batch_size:
        more["rollout"] = {"batch_size": given.batch_size}
    sweep = cells_of(chosen(made.arms, given), range(given.first_seed, given.first_seed + given.seeds), given.out, more)
    if not sweep.cells:
        raise SystemExit("no arm is chosen")
    where = places_of(given.device, given.jobs)
    print(f"{len(sweep.cells)} cells, {len(where)} at a time", flush=True)
    if given.dry_run:
        print("\n".join(cell.name for cell in sweep.cells))
        return
    try:
        run_sweep(sweep, given.out, Processes(where), say=lambda line: print(line, flush=True))
    except Interrupted as stopped:
        print(stopped, flush=True)
    finally:
        if timer is not None:
            timer.cancel()
    file = given.out.with_name(f"{given.out.name}.tar.xz")
    count = pack(given.out, file)
    print(f"{count} runs in {file}: {file.stat().st_size / 1e6:.2f} MB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
