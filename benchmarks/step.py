"""What a PPO step costs beside its arithmetic: seconds by part, their floors, tokens a second and peak memory.

    python benchmarks/step.py                       3B Qwen2 shape, LoRA 128, 16 x (96 + 128) tokens; on CUDA
    python benchmarks/step.py --peer trl            TRL's PPO beside it, as it comes and with work that is alike
    python benchmarks/step.py --device cpu          a tiny shape: seconds

How it is measured:
1. a model of the shape named, with random weights (shapes.py): nothing is downloaded, and no completion ends early, so
   that every step has the same tokens;
2. the parts are those of timings.jsonl; the total is the clock's around the whole step, callbacks included, between two
   synchronisations of the device; what is in the total and in no part is `other`;
3. the first step, with what it compiles and captures, has a row of its own, and the warm-up is not counted; medians,
   in brackets half the range from the first to the third quartile;
4. a floor is counted bytes or operations (floors.py) over what this device does at best, measured in the same run;
5. a peer runs in a process of its own, before this one touches the device: each has all of the memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import floors
import shapes
import torch
import yaml
from measuring import MeasurementError, add_sizes, check_sizes, memory, out_of_memory, provenance, split, spread
from transformers.utils import logging

from stable_rlhf.config.config import Config
from stable_rlhf.training.trainer import SAFETrainer

STILL = 1e-9  # learning rate: AdamW moves a weight by at most this a step, so that the last step is like the first
OPTIONS = {
    "model.lora_r": "--lora-r",
    "model.device": "--device",
    "rollout.batch_size": "--batch-size",
    "rollout.max_completion_length": "--response-length",
    "optim.num_iterations": "--num-iterations",
    "optim.num_mini_batches": "--num-mini-batches",
}  # settings that have an option of their own, which floors and peers follow
PEERS = {"TRL as it comes": "same", "TRL, work alike": "tiny"}  # its column -> size of its value and reward models


# -- ours ---------------------------------------------------------------------------------------------------------


def make_config(arguments: argparse.Namespace, folder: Path) -> Config:
    """The preset with the run's sizes; ``--set`` has the last word."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"lora_r": arguments.lora_r, "device": arguments.device},
        "data": {"eval_size": 0, "max_prompt_length": arguments.prompt_length},
        "rollout": {"batch_size": arguments.batch_size, "max_completion_length": arguments.response_length},
        "optim": {
            "learning_rate": STILL,
            "num_iterations": arguments.num_iterations,
            "num_mini_batches": arguments.num_mini_batches,
        },
        "log": {"progress": False, "completions_steps": 0},
    }
    for section, field, value in arguments.set:
        sections.setdefault(section, {})[field] = value
    return Config.from_preset(
        arguments.preset,
        output_dir=str(folder),
        max_steps=arguments.warmup + arguments.steps + 1,  # one more than is run: the last step always saves
        save_steps=0,
        seed=arguments.seed,
        **sections,
    )


def make_trainer(arguments: argparse.Namespace, folder: Path) -> tuple[SAFETrainer, dict[str, float]]:
    """(trainer whose completions all have their full length, seconds of building the model and the trainer)."""
    device, started = torch.device(arguments.device), time.perf_counter()
    rows = 4 * arguments.batch_size  # some epochs of prompts, whatever the number of steps
    given = shapes.trainer_arguments(arguments.model, device, rows, arguments.prompt_length, arguments.seed)
    floors.synchronize(device)
    built = time.perf_counter()
    trainer = SAFETrainer(args=make_config(arguments, folder), **given)
    # An id beyond the vocabulary is never sampled, so no completion ends early.
    trainer.sampler = dataclasses.replace(trainer.sampler, eos_token_ids=[len(trainer.processing_class)])
    trainer.begin()
    floors.synchronize(device)
    return trainer, {"model_s": built - started, "construction_s": time.perf_counter() - built}


def take_step(trainer: SAFETrainer) -> float:
    """Seconds of one turn of the loop, from an idle device to an idle device."""
    device = trainer.model.device
    floors.synchronize(device)
    started = time.perf_counter()
    row = trainer.step()
    floors.synchronize(device)
    seconds = time.perf_counter() - started
    lengths = {row["completions/min_length"], row["completions/max_length"]}
    if lengths != {trainer.args.rollout.max_completion_length}:
        raise MeasurementError(f"step {row['step']}: completions have {lengths} tokens, so the work is another one")
    return seconds


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything of our own run as one JSON object; ``out_of_memory`` alone where the device has too little."""
    device = torch.device(arguments.device)
    # Their buffers are no part of the step's peak. A GPU's peak can be reset, a process's cannot: there the run is
    # first, and holds what it holds until the process ends.
    if device.type == "cpu":
        result = measure_steps(arguments, device)
        ceilings = floors.measure_ceilings(device)
    else:
        ceilings = floors.measure_ceilings(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        result = measure_steps(arguments, device)
    if "out_of_memory" in result:
        return result
    counted = count_floors(arguments, ceilings, shapes.default_dtype(device).itemsize)
    return {
        "provenance": provenance(device),
        **result,
        "ceilings": dataclasses.asdict(ceilings),
        "floors": {part: dataclasses.asdict(floor) for part, floor in counted.items()},
    }


def measure_steps(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Seconds of the counted steps by part, of the first step and of what comes before it, and MiB."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            trainer, once = make_trainer(arguments, Path(folder) / "run")
            totals = [take_step(trainer) for _ in range(arguments.warmup + arguments.steps)]
        except RuntimeError as error:
            return out_of_memory(error)
        timings = [json.loads(line) for line in (trainer.run_dir / "timings.jsonl").read_text().splitlines()]
    steps = [split(timing, total) for timing, total in zip(timings, totals, strict=True)]
    return {**once, **memory(device), "first_step_s": totals[0], "steps": steps[arguments.warmup :]}


def count_floors(arguments: argparse.Namespace, ceilings: floors.Ceilings, itemsize: int) -> dict[str, floors.Floor]:
    """Floors of the run that the options describe; weights have ``itemsize`` bytes."""
    work = floors.Work(
        batch=arguments.batch_size,
        prompt=arguments.prompt_length,
        response=arguments.response_length,
        iterations=arguments.num_iterations,
        rank=arguments.lora_r,
    )
    return floors.floors(floors.Geometry.of(shapes.shape_config(arguments.model)), work, ceilings, itemsize)


# -- the peer -----------------------------------------------------------------------------------------------------


def measure_peer(arguments: argparse.Namespace, critic: str) -> dict[str, Any]:
    """What peer_trl.py, in a process of its own, says of TRL with value and reward models of that size."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "peer.json"
        sizes = ("model", "device", "batch_size", "prompt_length", "response_length", "num_iterations")
        sizes += ("num_mini_batches", "lora_r", "seed", "warmup", "steps")
        options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in sizes]
        options[-2:] = [f"--warmup={arguments.peer_warmup}", f"--steps={arguments.peer_steps}"]
        script = Path(__file__).with_name("peer_trl.py")
        command = [sys.executable, str(script), *options, f"--critic={critic}", f"--json={output}"]
        subprocess.run(command, check=True, stdout=sys.stderr)  # its own lines are not part of our table
        result = json.loads(output.read_text())
    steps = (arguments.peer_warmup + arguments.peer_steps) * arguments.num_iterations * arguments.num_mini_batches
    if result.get("optimizer_steps", steps) != steps:
        raise MeasurementError(f"TRL took {result['optimizer_steps']} optimiser steps, and ours takes {steps}")
    return result


# -- the tables ---------------------------------------------------------------------------------------------------


def table(result: dict[str, Any], arguments: argparse.Namespace) -> str:
    """Markdown of our own run."""
    lines = ["| | s a step | of the step | floor, s | measured / floor | of the floor |", "|---|---|---|---|---|---|"]
    steps, limits = result["steps"], {part: floor["seconds"] for part, floor in result["floors"].items()}
    limits["total"] = sum(limits.values())
    total = median(steps, "total")
    for part in steps[0]:
        seconds = median(steps, part)
        cells = [f"{seconds:.4f} ({spread([step[part] for step in steps]):.4f})", f"{seconds / total:.1%}"]
        if part in limits:
            cells += [f"{limits[part]:.3g}", f"{seconds / limits[part]:.2f}", f"{limits[part] / seconds:.1%}"]
        lines.append(f"| {' | '.join([part, *cells, '', '', ''][:6])} |")
    tokens = arguments.batch_size * arguments.response_length
    others = {
        "first step, s": f"{result['first_step_s']:.3f}",
        "building model and prompts, s": f"{result['model_s']:.3f}",
        "building the trainer, s": f"{result['construction_s']:.3f}",
        "new tokens a second, step": f"{tokens / total:.1f}",
        "new tokens a second, rollout": f"{tokens / median(steps, 'rollout'):.1f}",
        "peak memory, MiB (reserved)": f"{result['peak_mib']:.0f} ({result['reserved_mib']:.0f})",
        "copy, GB/s": f"{result['ceilings']['bandwidth'] / 1e9:.1f}",
        "matmul, TFLOP/s": f"{result['ceilings']['arithmetic'] / 1e12:.3f}",
    }
    lines += ["", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in others.items())]
    return "\n".join(lines)


def peer_table(result: dict[str, Any], peers: dict[str, dict[str, Any]]) -> str:
    """Markdown: seconds a step, steps a second relative to each peer, first step, peak memory."""
    lines = ["| | s a step | ours / its steps a second | first step, s | peak memory, MiB | its / ours |"]
    lines.append("|---|---|---|---|---|---|")
    for name, run in {"stable-rlhf": result, **peers}.items():
        if "out_of_memory" in run:
            lines.append(f"| {name} | out of memory | | | | |")
            continue
        seconds, ours = median(run["steps"], "total"), result.get("steps")
        faster = f"{seconds / median(ours, 'total'):.2f}" if ours else ""
        larger = f"{run['peak_mib'] / result['peak_mib']:.2f}" if ours else ""
        shown = f"{seconds:.4f} ({spread([step['total'] for step in run['steps']]):.4f})"
        lines.append(
            f"| {name} | {shown} | {faster} | {run['first_step_s']:.3f} | "
            f"{run['peak_mib']:.0f} ({run['reserved_mib']:.0f}) | {larger} |"
        )
    return "\n".join(lines)


def median(steps: Sequence[dict[str, float]], part: str) -> float:
    return statistics.median(step[part] for step in steps)


# -- the command --------------------------------------------------------------------------------------------------


def setting(given: str) -> tuple[str, str, Any]:
    """``section.field=value`` -> its three parts, the value as YAML reads it."""
    name, equals, value = given.partition("=")
    section, dot, field = name.partition(".")
    if not (equals and dot and section and field):
        raise argparse.ArgumentTypeError(f"{given!r}: give SECTION.FIELD=VALUE, as optim.microbatch_tokens=4096")
    if name in OPTIONS:
        raise argparse.ArgumentTypeError(f"{given!r}: give {OPTIONS[name]}, which the floors and the peer follow too")
    return section, field, yaml.safe_load(value)


def parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_sizes(parser)
    parser.add_argument("--preset", default="safe")
    parser.add_argument("--peer", choices=["trl"], help="measure this one beside ours")
    parser.add_argument("--peer-steps", type=int, default=10, help="counted steps of the peer")
    parser.add_argument("--peer-warmup", type=int, default=3, help="steps of the peer before them")
    parser.add_argument(
        "--set", type=setting, action="append", default=[], metavar="SECTION.FIELD=VALUE", help="any other setting"
    )
    return check_sizes(parser, parser.parse_args(given))


def main(given: Sequence[str]) -> None:
    arguments = parse(given)
    logging.disable_progress_bar()
    peers = {}
    if arguments.peer:
        peers = {name: measure_peer(arguments, critic) for name, critic in PEERS.items()}
    result = measure(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({**result, "peers": peers}) + "\n")
    print(
        f"{provenance(torch.device(arguments.device))}; {arguments.model} shape, LoRA {arguments.lora_r}; "
        f"{arguments.batch_size} completions of {arguments.response_length} tokens to prompts of "
        f"{arguments.prompt_length}; {arguments.num_iterations} passes x {arguments.num_mini_batches} minibatches; "
        f"preset {arguments.preset}; {arguments.steps} steps after {arguments.warmup}; seed {arguments.seed}\n"
    )
    print(f"out of memory: {result['out_of_memory']}" if "out_of_memory" in result else table(result, arguments))
    if peers:
        print(f"\n{peer_table(result, peers)}")


if __name__ == "__main__":
    main(sys.argv[1:])
