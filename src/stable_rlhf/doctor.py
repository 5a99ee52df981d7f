"""`stable-rlhf doctor`: what would go wrong in a run, found before hours are spent on it.

Cheap checks come first, and each says its own line: ok, warning or failed, with the remedy. The last is the trainer
itself, for a few steps, in a folder that is gone afterwards: nothing is left behind, and the run's folder is not made.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch

from stable_rlhf import memory
from stable_rlhf.arguments import as_given, make_scorer
from stable_rlhf.config import Config
from stable_rlhf.display import ends, printable
from stable_rlhf.evaluation import split_datasets
from stable_rlhf.memory import Memory
from stable_rlhf.models import context_length, load_tokenizer, policy_dtype, resolve_device
from stable_rlhf.optimize import DivergenceError
from stable_rlhf.prompts import EncodedPrompts, PromptStream, encode_prompts
from stable_rlhf.scoring import RewardError, RewardUnavailable, Scorer
from stable_rlhf.sections import DataConfig, GuardConfig, RewardConfig
from stable_rlhf.trainer import SAFETrainer
from stable_rlhf.validation import existing, unwritable

PLEASANT = " It was wonderful: friendly, quick, and better than I had hoped. I would go again."
UNPLEASANT = " It was terrible: rude, slow, and worse than I had feared. I would never go again."
SHOWN, CHARACTERS = 3, 400
"""Prompts that are shown, and characters of each: enough to see a chat template at both ends of a short prompt."""
LINE = 600
"""Characters of a line at most; what a reward or an error says may be of any length."""
CUT = 0.01
"""Share of prompts that may be cut without a warning: a few long ones are in every data set."""
TWICE = 0.1
"""Share of prompts that may stand there more than once without a warning: data sets weigh prompts so."""
TIGHT = 0.8
"""Share of the free memory above which an estimate is a warning: runs took up to 1.23 times theirs (memory.py)."""
STEPS, CUDA_STEPS = 2, 8
"""Dry steps: one on the longest prompts; on CUDA three more, in which the usual shapes are compiled and captured. The
middle of those after the first half is the forecast's: on an H100 the first steps of configs/smollm2-hh.yaml took 3.6,
0.9, 1.2, 1.7, 1.4, 0.8 and then mostly 0.7 s (docs/LOG.md, 2026-11-26)."""
PARTS = {"rollout": "rollout_s", "scoring": "scoring_s", "log-probs": "logprobs_s", "update": "update_s"}


class Findings:
    """The lines, printed as they come, and whether a check failed."""

    def __init__(self, say: Callable[[str], object] = print) -> None:
        self._say = say
        self.failed = False

    def ok(self, text: str) -> None:
        self._line("ok", text)

    def warning(self, text: str) -> None:
        self._line("warning", text)

    def fail(self, text: str) -> None:
        self.failed = True
        self._line("failed", text)

    def detail(self, text: str) -> None:
        self._line("", text)

    def _line(self, verdict: str, text: str) -> None:
        self._say(f"{verdict:<9}{ends(' '.join(text.split()), LINE)}")


def examine(config: Config, say: Callable[[str], object] = print) -> bool:
    """Checks a run without training it; True where nothing failed. ``say`` is given each line.

    Raises ConfigError, PromptError or RewardError for what cannot be loaded at all, as the trainer does.
    """
    found = Findings(say)
    try:  # it tries a reward server in seconds, as the trainer does
        config = as_given(config, config.model.name, None, None)
    except RewardUnavailable as error:
        found.fail(f"reward: {error}")
        return False
    device, low = resolve_device(config.model.device), policy_dtype(config.model)[1]
    check_output(found, config)
    policy = memory.skeleton(config)

    def needed(prompt: int) -> Memory:
        return memory.estimate(policy, config, device=device, low=low, prompt=prompt)

    check_disk(found, config, disk := needed(1))
    train, encoded, held_out = check_data(found, config, context_length(policy))
    scorer = make_scorer(config, None, None, device)
    rewarded = check_reward(found, scorer, train[0])
    longest = max(map(len, encoded.input_ids))
    fits = check_memory(found, needed(longest), device)
    if rewarded and fits:
        functions = [function.function for function in scorer.functions]
        states = 2 if config.guard.enabled else 1  # in a checkpoint
        dry_steps(found, config, functions, train, encoded, held_out, states * disk.checkpoint)
    else:
        found.detail("no step was tried" + (": mend what failed first" if found.failed else ", so nothing is forecast"))
    return not found.failed


# -- before anything is loaded --------------------------------------------------------------------------------------


def check_output(found: Findings, config: Config) -> None:
    """Whether the run's folder is free, and one can be made there."""
    folder = Path(config.output_dir or "runs")
    shown = f"output_dir={config.output_dir!r}" + ("" if config.output_dir else " (a new folder under runs)")
    if config.output_dir is not None and (folder / "metrics.jsonl").exists():
        found.fail(f"{shown}: holds a run already; go on with it by `stable-rlhf resume`, or choose another folder")
        return
    if (fault := unwritable(folder)) is not None:
        found.fail(f"{shown}: {fault}; choose another folder")
        return
    found.ok(f"{shown}: free, and {existing(folder)} can be written to")


def check_data(found: Findings, config: Config, context: int | None) -> tuple[datasets.Dataset, EncodedPrompts, int]:
    """(training prompts, their tokens, number of held-out prompts); shows how long they are, and three of them.

    ``context``: positions that the model has.
    """
    train, held_out = split_datasets(config, None, None)
    tokenizer = load_tokenizer(config.model)
    encoded, *_ = [
        encode_prompts(
            prompts,
            tokenizer,
            max_prompt_length=config.data.max_prompt_length,
            context_length=context,
            max_completion_length=config.rollout.max_completion_length,
        )
        for prompts in (train, held_out)
        if prompts is not None
    ]
    count, sizes = len(encoded), [len(ids) for ids in encoded.input_ids]
    cut, twice = sum(encoded.truncated), count - len({tuple(ids) for ids in encoded.input_ids})
    middle = f"{statistics.median(sizes):g}"
    text = f"data: {count} prompts of {min(sizes)} to {max(sizes)} tokens (median {middle}), {cut} of them cut to "
    text += f"data.max_prompt_length={config.data.max_prompt_length}, {twice} duplicates"
    if count < config.rollout.batch_size:
        found.warning(f"{text}; fewer than rollout.batch_size={config.rollout.batch_size}: every step sees all of them")
    elif cut > CUT * count:
        found.warning(f"{text}; the beginning of what is cut is lost: raise data.max_prompt_length, or shorten them")
    elif twice > TWICE * count:
        found.warning(f"{text}; what stands there twice is trained on twice: remove duplicates unless you mean them")
    else:
        found.ok(text)
    for number, ids in enumerate(encoded.input_ids[:SHOWN], start=1):
        found.detail(
            f"prompt {number}: {printable(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), CHARACTERS)}"
        )
    return train, encoded, 0 if held_out is None else len(held_out)


def check_disk(found: Findings, config: Config, needed: Memory) -> None:
    """Whether the checkpoints that are kept, the one that is being written, and the final model have room.

    With the guard a checkpoint holds the last good state too; without an adapter, that and a candidate lie in the run's
    folder besides.
    """
    place = existing(Path(config.output_dir or "runs"))
    states = 2 if config.guard.enabled else 1
    kept = (config.save_total_limit + 1) * states * needed.checkpoint
    snapshots = 3 * needed.checkpoint if config.guard.enabled and config.model.lora_r == 0 else 0  # one being written
    room = kept + snapshots + needed.final
    left = shutil.disk_usage(place).free
    text = (
        f"disk: {_size(left)} free at {place}, {_size(room)} needed for {config.save_total_limit} + 1 checkpoints of "
    )
    text += f"{_size(states * needed.checkpoint)}, {_size(snapshots)} of snapshots and the final model of "
    text += _size(needed.final)
    if room > left:
        found.fail(f"{text}; free some, lower save_total_limit={config.save_total_limit}, or choose another output_dir")
    else:
        found.ok(text)


# -- what is loaded -------------------------------------------------------------------------------------------------


def check_reward(found: Findings, scorer: Scorer, row: dict[str, Any]) -> bool:
    """Scores a pleasant and an unpleasant answer to the first prompt; False where that failed."""
    columns = {name: [value, value] for name, value in row.items() if name != "prompt"}
    try:
        scores = scorer.score([row["prompt"]] * 2, [PLEASANT, UNPLEASANT], columns, [True, True])
    except RewardError as error:
        found.fail(f"reward: {error}")
        return False
    text = "reward: " + ", ".join(
        f"{name} gives {' and '.join('no score' if value is None else f'{value:.4g}' for value in values)}"
        for name, values in scores.per_function.items()
    )
    text += f" to {PLEASANT.strip()!r} and {UNPLEASANT.strip()!r} after the first prompt"
    if not all(scores.valid):
        found.warning(f"{text}; a completion without a score is not learned from: see why there is none")
    elif scores.total[0] == scores.total[1]:
        found.warning(f"{text}; all is alike to it: check that it reads the completion, if that is no surprise")
    else:
        found.ok(text)
    return True


def check_memory(found: Findings, needed: Memory, device: torch.device) -> bool:
    """Compares the estimate with what is free. False where no step is to be tried: where even what is held throughout
    does not fit, and on a CPU, where nothing catches a process that takes too much, where it is tight."""
    left, held = memory.free(device), sum(needed.held.values())
    text = f"memory: about {_size(needed.total)} needed, {_size(left)} free on {device}"
    if held > left:
        found.fail(f"{text}: {_size(held)} are held from beginning to end; {memory.LESS}")
    elif needed.total > TIGHT * left:
        risk = (
            "" if device.type == "cuda" else "the system may end a process that takes too much, so no step is tried; "
        )
        found.warning(f"{text}; {risk}{memory.LESS}")
    else:
        found.ok(text)
    parts = [f"{name} {_size(size)}" for name, size in (needed.held | needed.passing).items() if size]
    found.detail(f"of these {', '.join(parts)}")
    return held <= left if device.type == "cuda" else needed.total <= TIGHT * left


class _DryRun(SAFETrainer):
    """The trainer, but for what it would leave on disk."""

    def save_checkpoint(self) -> Path:
        return self.run_dir

    def save_final(self) -> None:
        pass


class _Order(PromptStream):
    """The stream of the dry steps' prompts: the first ``size`` rows first, then the others again and again."""

    def __init__(self, size: int) -> None:
        super().__init__(2 * size, seed=0)
        self._left, self._then = [list(range(size))], list(range(size, 2 * size))

    def take(self, k: int) -> list[int]:
        return self._left.pop() if self._left else self._then


def dry_steps(
    found: Findings,
    config: Config,
    functions: list[Any],
    train: datasets.Dataset,
    encoded: EncodedPrompts,
    held_out: int,
    checkpoint: int,
) -> None:
    """Trains for a few steps, first on the longest prompts, then on the run's first batch, which is timed."""
    device, size = resolve_device(config.model.device), config.rollout.batch_size
    by_length = sorted(range(len(encoded)), key=lambda row: -len(encoded.input_ids[row]))
    longest = [by_length[i % len(by_length)] for i in range(size)]
    usual = PromptStream(len(train), config.seed).take(size)
    with tempfile.TemporaryDirectory(prefix="stable-rlhf-doctor-") as folder:
        dry = dataclasses.replace(
            config,
            output_dir=str(Path(folder) / "run"),
            max_steps=number_of_steps(device, config.max_steps),
            save_steps=0,
            data=DataConfig(max_prompt_length=config.data.max_prompt_length),  # the rows are chosen already
            critic=dataclasses.replace(config.critic, warmup_steps=0),  # longer than these steps; without, all learns
            reward=RewardConfig(  # what is rewarded is loaded already, and given as objects
                weights=config.reward.weights,
                missing_eos_penalty=config.reward.missing_eos_penalty,
                normalise=config.reward.normalise,
            ),
            guard=GuardConfig(enabled=False),  # a figure that is not finite is to be named, not rolled back
            log=dataclasses.replace(config.log, report_to=[], completions_steps=0, progress=False),
        )
        try:
            with memory.measured(device) as peak:
                rows = train.select([*longest, *usual])
                trainer = _DryRun(config.model.name, functions, args=dry, train_dataset=rows)
                trainer.stream = _Order(size)
                trainer.train()
        except (RewardError, DivergenceError) as error:
            found.fail(f"step: {error}")
            return
        except RuntimeError as error:
            if (said := memory.shortage(error)) is None:
                raise
            found.fail(f"step: {said}; {memory.LESS}")
            return
        lines = (Path(folder) / "run" / "timings.jsonl").read_text().splitlines()
    timing = usual_step([json.loads(line) for line in lines])
    taken = "" if peak.taken is None else f"; the steps took {_size(peak.taken)} at most"
    parts = ", ".join(f"{name} {timing[key]:.3g} s" for name, key in PARTS.items())
    found.ok(f"step: {timing['total_s']:.3g} s ({parts}), {timing['tokens_per_s']:.0f} tokens/s{taken}")
    found.ok(forecast(config, timing, held_out, checkpoint))


def number_of_steps(device: torch.device, most: int) -> int:
    """How many dry steps; on CUDA no more than the run's ``most``, but STEPS at least."""
    return max(STEPS, min(CUDA_STEPS, most)) if device.type == "cuda" else STEPS


def usual_step(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The median of each figure over the second half of the steps."""
    timed, names = rows[len(rows) // 2 :], (*PARTS.values(), "total_s", "tokens_per_s")
    return {name: statistics.median(row[name] for row in timed) for name in names}


def forecast(config: Config, timing: dict[str, float], held_out: int, checkpoint: int) -> str:
    """How long the run takes, and when it saves; ``timing``: a step's seconds by part, ``held_out``: prompts."""
    evaluating = sum(timing[part] for part in ("rollout_s", "scoring_s", "logprobs_s"))
    evaluating *= 2 * math.ceil(held_out / config.rollout.batch_size)  # before and after
    seconds = config.max_steps * timing["total_s"] + evaluating
    every = config.save_steps
    when = f"every {every} steps and at the end" if 0 < every < config.max_steps else "at the end"
    return (
        f"forecast: {config.max_steps} steps x {timing['total_s']:.3g} s and {evaluating:.3g} s of evaluation = "
        f"{timedelta(seconds=round(seconds))}; checkpoints of {_size(checkpoint)} {when}"
    )


def _size(size: float) -> str:
    """Bytes as people read them: 1 GB is 10^9."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
