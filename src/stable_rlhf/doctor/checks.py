"""`stable-rlhf doctor`: what would go wrong in a run, found before hours are spent on it.

Cheap checks come first, and each says its own line: ok, warning or failed, with the remedy. The last is the trainer
itself, for a few steps, in a folder that is gone afterwards: nothing is left behind, and the run's folder is not made.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch

from stable_rlhf.config import Config
from stable_rlhf.data import EncodedPrompts, encode_prompts, split_datasets
from stable_rlhf.doctor.dry_run import dry_steps
from stable_rlhf.doctor.findings import Findings
from stable_rlhf.doctor.memory import Memory, estimate, skeleton
from stable_rlhf.errors import RewardError, RewardUnavailable
from stable_rlhf.files import existing, unwritable
from stable_rlhf.hardware import memory, resolve_device, shortage_named
from stable_rlhf.policy import context_length, load_tokenizer, policy_dtype
from stable_rlhf.rewards import Scorer, make_scorer
from stable_rlhf.text import printable, readable_size
from stable_rlhf.training import as_given, check_named

PLEASANT = " It was wonderful: friendly, quick, and better than I had hoped. I would go again."
UNPLEASANT = " It was terrible: rude, slow, and worse than I had feared. I would never go again."

SHOWN, CHARACTERS = 3, 400
"""Prompts that are shown, and characters of each: enough to see a chat template at both ends of a short prompt."""

CUT = 0.01
"""Share of prompts that may be cut without a warning: a few long ones are in every data set."""

TWICE = 0.1
"""Share of prompts that may stand there more than once without a warning: data sets weigh prompts so."""

TIGHT = 0.8
"""Share of the free memory above which an estimate is a warning: runs took up to 1.23 times theirs (memory.py)."""


@shortage_named("loading")
def examine(config: Config, say: Callable[[str], object] = print) -> bool:
    """Checks a run without training it; True where nothing failed. ``say`` is given each line.

    Raises ConfigError, PromptError, RewardError or OutOfMemoryError for what cannot be loaded at all, as the trainer
    does.
    """
    found = Findings(say)
    try:  # it tries a reward server in seconds, as the trainer does
        config = as_given(config, config.model.name, None, None)
    except RewardUnavailable as error:
        found.fail(f"reward: {error}")
        return False
    check_named(config, config.model.name)
    device, low = resolve_device(config.model.device), policy_dtype(config.model)[1]
    check_output(found, config)
    policy = skeleton(config)

    def needed(prompt: int) -> Memory:
        return estimate(policy, config, device=device, low=low, prompt=prompt)

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
        found.fail(f"{shown}: holds a run already; resume it by `stable-rlhf resume`, or choose another folder")
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
        f"disk: {readable_size(left)} free at {place}, {readable_size(room)} needed for {config.save_total_limit} + 1 "
    )
    text += (
        f"checkpoints of {readable_size(states * needed.checkpoint)}, {readable_size(snapshots)} of snapshots and the "
    )
    text += f"final model of {readable_size(needed.final)}"
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
    text = f"memory: about {readable_size(needed.total)} needed, {readable_size(left)} free on {device}"
    if held > left:
        found.fail(f"{text}: {readable_size(held)} are held from beginning to end; {memory.LESS}")
    elif needed.total > TIGHT * left:
        risk = (
            "" if device.type == "cuda" else "the system may end a process that takes too much, so no step is tried; "
        )
        found.warning(f"{text}; {risk}{memory.LESS}")
    else:
        found.ok(text)
    parts = [f"{name} {readable_size(size)}" for name, size in (needed.held | needed.passing).items() if size]
    found.detail(f"of these {', '.join(parts)}")
    return held <= left if device.type == "cuda" else needed.total <= TIGHT * left
