"""What `safe` costs beside `ppo`: seconds a step by part, their ratio with an interval, and peak memory.

    python benchmarks/overhead.py                    the built-in pair; on CUDA where there is one, else on the CPU
    python benchmarks/overhead.py --presets ppo ppo  the same preset twice: what the machine's noise alone shows
    python benchmarks/overhead.py --shape 3b         a model of that shape, random weights, LoRA of rank 128 (shapes.py)

How the comparison is kept fair:
1. both train in one process and take turns step by step, the first of a pair last in the next, so that whatever else
   the machine does falls on both alike; the ratio is the median over pairs, its interval a bootstrap over them;
2. both see the same prompts and draw with the same seed at each step, and the learning rate is too small to change a
   word, so that both write and score the same text; no completion ends early, so that every step has the same tokens;
3. nothing is evaluated or saved, and the first steps, which warm caches and allocators, are not counted;
4. seconds of CPU stand beside those of the clock: with one thread (OMP_NUM_THREADS=1) they are nearly the same on a
   machine that does other things too;
5. memory is measured in processes of their own, by turns too: the peak of a step does not then hold the other's model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import shapes
import torch
from measuring import MIB, peak_resident, provenance, split, spread
from transformers.utils import logging

from stable_rlhf.config.config import Config
from stable_rlhf.hardware.device import resolve_device
from stable_rlhf.training.trainer import SAFETrainer

STILL = 1e-9  # learning rate: Adam moves a weight by at most this a step, and weights are 1e-2 and more
RESAMPLES = 10_000  # of the bootstrap: its own error on an end of the interval is then far below the interval
MEMORY_STEPS = 3  # AdamW's moments come with the first step; the third is like every later one
RANK = 128  # of the adapter on a shape's linear layers


def make_trainer(preset: str, folder: Path, arguments: argparse.Namespace) -> SAFETrainer:
    """A trainer whose completions all have max_completion_length tokens, that learns, evaluates and saves nothing."""
    total = arguments.warmup + arguments.pairs + MEMORY_STEPS + 1  # one more than is run: the last step always saves
    config = Config.from_preset(
        preset,
        output_dir=str(folder),
        max_steps=total,
        save_steps=0,
        seed=arguments.seed,
        model={"device": arguments.device, **({"lora_r": RANK} if arguments.shape else {"name": arguments.model})},
        data={"eval_size": 0, **({"max_prompt_length": arguments.prompt_length} if arguments.shape else {})},
        rollout={"batch_size": arguments.batch_size, "max_completion_length": arguments.max_completion_length},
        optim={"learning_rate": STILL},
        log={"progress": False, "completions_steps": 0},
    )
    given = {"model": arguments.model}
    if arguments.shape:
        device, rows = resolve_device(arguments.device), 4 * arguments.batch_size
        given = shapes.trainer_arguments(arguments.shape, device, rows, arguments.prompt_length, arguments.seed)
    trainer = SAFETrainer(args=config, **given)
    # An id beyond the vocabulary is never sampled, so no completion ends early.
    trainer.sampler = dataclasses.replace(trainer.sampler, eos_token_ids=[len(trainer.processing_class)])
    trainer.begin()
    return trainer


def take_step(trainer: SAFETrainer, seed: int) -> tuple[float, float]:
    """(seconds, seconds of CPU) of one turn of the loop. Called here, so that presets take turns."""
    torch.manual_seed(seed + trainer.steps_done)  # heads of another number leave the generator elsewhere: start it anew
    started, started_cpu = time.perf_counter(), time.process_time()
    trainer.step()
    return time.perf_counter() - started, time.process_time() - started_cpu


def measure_time(arguments: argparse.Namespace, folder: Path) -> list[list[dict[str, float]]]:
    """For each of the two presets, seconds of each counted step: the parts, other, total, CPU."""
    names = [f"{i}-{preset}" for i, preset in enumerate(arguments.presets)]
    trainers = [make_trainer(p, folder / n, arguments) for p, n in zip(arguments.presets, names, strict=True)]
    totals: list[list[tuple[float, float]]] = [[], []]
    for pair in range(arguments.warmup + arguments.pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            totals[which].append(take_step(trainers[which], arguments.seed))
    rows = []
    for name, total in zip(names, totals, strict=True):
        timings = [json.loads(line) for line in (folder / name / "timings.jsonl").read_text().splitlines()]
        pairs = zip(timings, total, strict=True)
        steps = [{**split(timing, seconds), "total, CPU": cpu} for timing, (seconds, cpu) in pairs]
        rows.append(steps[arguments.warmup :])
    return rows


def ratio(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Median of first / second over the pairs, and its 95 % interval: a bootstrap over the pairs.

    Of the ratios and not of the two columns: a load that lasts for some steps falls on both of a pair, and cancels.
    """
    rng, ratios = random.Random(0), [a / b for a, b in zip(first, second, strict=True)]
    draws = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return statistics.median(ratios), draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES)]


def peak_memory(preset: str, arguments: argparse.Namespace) -> float:
    """MiB at most in use by this process: on CUDA what PyTorch had allocated there, on the CPU the resident set."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(preset, Path(folder) / "run", arguments)
        for _ in range(MEMORY_STEPS):
            take_step(trainer, arguments.seed)
        if trainer.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(trainer.model.device) / MIB
    return peak_resident()


def measure_memory(arguments: argparse.Namespace, given: Sequence[str]) -> list[list[float]]:
    """For each of the two presets, MiB of each repeat, by turns, every one in a process of its own."""
    figures: list[list[float]] = [[], []]
    for _ in range(arguments.memory_repeats):
        for which, preset in enumerate(arguments.presets):
            command = [sys.executable, __file__, *given, "--memory-of", preset]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            figures[which].append(float(output.splitlines()[-1]))
    return figures


def table(arguments: argparse.Namespace, times: list[list[dict[str, float]]], memory: list[list[float]]) -> str:
    """Markdown, ready for docs/LOG.md: medians, in brackets half the range from the first to the third quartile."""
    first, second = arguments.presets
    lines = [f"| | {first} | {second} | {first} / {second}, 95 % interval |", "|---|---|---|---|"]
    for part in times[0][0]:
        columns = [[step[part] for step in steps] for steps in times]
        cells = [f"{statistics.median(column):.4f} ({spread(column):.4f})" for column in columns]
        # What is left over is some milliseconds of bookkeeping: its ratio says nothing.
        shown = "" if part == "other" else "{:.3f} ({:.3f} to {:.3f})".format(*ratio(columns[0], columns[1]))
        lines.append(f"| {part}, s a step | {cells[0]} | {cells[1]} | {shown} |")
    tokens = arguments.batch_size * arguments.max_completion_length
    per_token = [statistics.median(step["total"] for step in steps) / tokens * 1e6 for steps in times]
    lines.append(f"| microseconds a token | {per_token[0]:.1f} | {per_token[1]:.1f} | |")
    if memory[0]:
        cells = [f"{statistics.median(figures):.0f} ({spread(figures):.0f})" for figures in memory]
        shown = f"{statistics.median(memory[0]) / statistics.median(memory[1]):.3f}"
        lines.append(f"| peak memory, MiB | {cells[0]} | {cells[1]} | {shown} |")
    return "\n".join(lines)


def origin(arguments: argparse.Namespace, device: torch.device) -> str:
    """One line: date, commit, machine, versions and sizes."""
    model = f"model {arguments.model}"
    if arguments.shape:
        model = f"shape {arguments.shape}, LoRA {RANK}, prompts of {arguments.prompt_length} tokens"
    return (
        f"{provenance(device)}; {arguments.pairs} pairs after {arguments.warmup}; {arguments.batch_size} "
        f"completions of {arguments.max_completion_length} tokens; seed {arguments.seed}; {model}"
    )


def parse(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--presets", nargs=2, default=["safe", "ppo"], help="what is measured, and what it is held against"
    )
    parser.add_argument("--pairs", type=int, default=30, help="counted steps of each preset")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each preset before them")
    parser.add_argument("--memory-repeats", type=int, default=3, help="processes a preset whose memory is measured")
    parser.add_argument("--batch-size", type=int, default=64, help="completions a step")
    parser.add_argument("--max-completion-length", type=int, default=32, help="tokens of every completion")
    parser.add_argument("--model", default="builtin", help="a causal language model: a folder or a name")
    parser.add_argument("--shape", choices=shapes.SHAPES, help="instead of --model: random weights, LoRA, bfloat16")
    parser.add_argument("--prompt-length", type=int, default=96, help="tokens of every prompt, with --shape")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: Sequence[str]) -> None:
    arguments = parse(given)
    logging.disable_progress_bar()
    if arguments.memory_of:
        print(peak_memory(arguments.memory_of, arguments))
        return
    memory = measure_memory(arguments, given)
    with tempfile.TemporaryDirectory() as folder:
        times = measure_time(arguments, Path(folder))
    print(origin(arguments, resolve_device(arguments.device)), table(arguments, times, memory), sep="\n\n")


if __name__ == "__main__":
    main(sys.argv[1:])
