"""What the benchmarks share: the sizes of a run on the command line, memory, medians, and the machine's name."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import shapes
import torch

from stable_rlhf.hardware.memory import shortage

PARTS = {
    "rollout": "rollout_s",
    "scoring": "scoring_s",
    "log-probs": "logprobs_s",
    "update": "update_s",
    "controller, guard": "control_s",
}
"""Row of a table -> key of timings.jsonl."""
ROUNDING = 1e-3  # seconds by which clocks read one after the other may disagree
MIB = 2**20


class MeasurementError(RuntimeError):
    """What was measured is not what the table would say."""


def add_sizes(parser: argparse.ArgumentParser) -> None:
    """The options that our run and a peer's share."""
    parser.add_argument("--model", choices=shapes.SHAPES, help="shape of the policy; 3b, and tiny with --device cpu")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=int, default=16, help="completions a step")
    parser.add_argument("--prompt-length", type=int, default=96, help="tokens of every prompt")
    parser.add_argument("--response-length", type=int, default=128, help="tokens of every completion")
    parser.add_argument("--num-iterations", type=int, default=2, help="passes over each rollout (PPO epochs)")
    parser.add_argument("--num-mini-batches", type=int, default=2, help="optimiser steps a pass")
    parser.add_argument("--lora-r", type=int, default=128, help="rank of the adapter on every linear layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warmup", type=int, default=3, help="steps before those that count, 1 or more")
    parser.add_argument("--steps", type=int, default=10, help="steps that count")
    parser.add_argument("--json", type=Path, help="write the figures of every step to this file, as one line")


def check_sizes(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> argparse.Namespace:
    """Fills in device and model; refuses what would measure nothing."""
    if arguments.warmup < 1:
        parser.error(f"--warmup {arguments.warmup}: give 1 or more, the first step compiles")
    if arguments.steps < 1:
        parser.error(f"--steps {arguments.steps}: give 1 or more")
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {arguments.device}: no CUDA device is available; give --device cpu")
    arguments.model = arguments.model or ("tiny" if arguments.device == "cpu" else "3b")
    return arguments


def split(timing: dict[str, Any], total: float) -> dict[str, float]:
    """A line of timings.jsonl and the clock's total -> seconds by part, what is in none, and the total.

    Raises MeasurementError for a missing key, and for parts that overlap: together they are longer than the step.
    """
    missing = [key for key in (*PARTS.values(), "total_s") if key not in timing]
    if missing:
        raise MeasurementError(f"timings.jsonl has no {', '.join(missing)}: the trainer does not time that part")
    parts = {part: float(timing[key]) for part, key in PARTS.items()}
    covered = sum(parts.values())
    if covered > timing["total_s"] + ROUNDING or timing["total_s"] > total + ROUNDING:
        raise MeasurementError(
            f"step {timing['step']}: the parts take {covered:.4f} s, timings.jsonl's total {timing['total_s']:.4f} s "
            f"and the clock's {total:.4f} s: each must hold the one before"
        )
    return {**parts, "other": total - covered, "total": total}


def out_of_memory(error: RuntimeError) -> dict[str, str]:
    """The result of a run for which the device has too little memory. Raises the error again if it is another one."""
    if (said := shortage(error)) is None:
        raise error
    return {"out_of_memory": said}


def memory(device: torch.device) -> dict[str, float]:
    """MiB at most: PyTorch's allocations and what it reserved for them; on the CPU the process's resident set."""
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        return {"peak_mib": allocated / MIB, "reserved_mib": reserved / MIB}
    return {"peak_mib": peak_resident(), "reserved_mib": peak_resident()}


def peak_resident() -> float:
    """MiB that the process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes there and KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def provenance(device: torch.device) -> str:
    """Date, commit, machine and version of torch."""
    root = Path(__file__).resolve().parent.parent
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, check=False, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC"
    return f"{date}; commit {described or 'unknown'}; {machine}; torch {torch.__version__}"


def processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
