"""The checks of `stable-rlhf doctor`, which find a run's problems before hours are spent on it.

Cheap checks come first. Each prints a line: ok, warning or failed, with the remedy. The last is a few steps of the
trainer itself, in a temporary folder; nothing is left behind, and the run's folder is not made.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerState

from stable_rlhf.config import Config
from stable_rlhf.data import EncodedPrompts, PromptEncoder, Prompts, StreamedRows, split_datasets
from stable_rlhf.doctor.dry_run import dry_steps
from stable_rlhf.doctor.findings import Findings
from stable_rlhf.doctor.memory import Memory, estimate, skeleton
from stable_rlhf.errors import RewardError, RewardUnavailable
from stable_rlhf.files import existing, unwritable
from stable_rlhf.hardware import memory, resolve_device, shortage_named
from stable_rlhf.policy import context_length, embedding_rows, load_tokenizer, policy_dtype
from stable_rlhf.rewards import Scorer, make_gold, make_scorer
from stable_rlhf.text import printable, readable_size
from stable_rlhf.training import as_given, check_held_out, check_named, probe_servers

PLEASANT = " It was wonderful: friendly, quick, and better than I had hoped. I would go again."
UNPLEASANT = " It was terrible: rude, slow, and worse than I had feared. I would never go again."
AFTER = f" to {PLEASANT.strip()!r} and {UNPLEASANT.strip()!r} after the first prompt"

SHOWN, CHARACTERS = 3, 400
"""Prompts that are shown, and characters of each: enough to see both ends of a short prompt's chat template."""

CUT = 0.01
"""Share of prompts that may be cut without a warning: every data set has a few long ones."""

TWICE = 0.1
"""Share of duplicate prompts without a warning: data sets use duplicates as weights."""

TIGHT = 0.8
"""Share of the free memory above which the estimate is a warning: real runs took up to 1.23 times their estimate
(doctor/memory.py)."""


@shortage_named("loading")
def examine(config: Config, say: Callable[[str], object] = print) -> bool:
    """Checks a run without training it and returns True if nothing failed. ``say`` receives each line.

    Raises ConfigError, PromptError, RewardError or OutOfMemoryError for what cannot be loaded at all, as the trainer
    does.
    """
    found = Findings(say)
    config = as_given(config, config.model.name, None, None)
    check_named(config, config.model.name)
    try:  # in seconds, as the trainer does
        probe_servers(config)
    except RewardUnavailable as error:
        found.fail(f"reward: {error}")
        return False
    device, low = resolve_device(config.model.device), policy_dtype(config.model)[1]
    check_output(found, config)
    policy = skeleton(config)

    def needed(prompt: int) -> Memory:
        return estimate(policy, config, device=device, low=low, prompt=prompt)

    check_disk(found, config, disk := needed(1))
    train, encoded, held_out = check_data(found, config, context_length(policy), embedding_rows(policy))
    state = TrainerState(max_steps=config.max_steps)
    scorer = make_scorer(config.reward, None, None, device, trainer_state=lambda: state, alone=False)
    gold = make_gold(config.reward, None, None, device, scorer, trainer_state=lambda: state)
    config.check_best(gold.names if gold is not None else [])
    tokenizer = load_tokenizer(config.model)
    rewarded = check_reward(found, scorer, train[0], tokenizer)
    if gold is not None:
        check_gold(found, gold, train[0], tokenizer)
    longest = max(map(len, encoded.input_ids))
    fits = check_memory(found, needed(longest), device)
    if rewarded and fits:
        functions = [function.function for function in scorer.functions]
        states = 2 if config.guard.enabled else 1  # in a checkpoint
        dry_steps(found, config, functions, train, encoded, held_out, states * disk.checkpoint)
    else:
        found.detail("no step was tried" + (": fix what failed first" if found.failed else ", so there is no forecast"))
    return not found.failed


# -- before anything is loaded --------------------------------------------------------------------------------------


def check_output(found: Findings, config: Config) -> None:
    """Checks that the run's folder is free and can be made."""
    folder = Path(config.output_dir or "runs")
    shown = f"output_dir={config.output_dir!r}" + ("" if config.output_dir else " (a new folder under runs)")
    if config.output_dir is not None and (folder / "metrics.jsonl").exists() and not config.overwrite_output_dir:
        remedy = (
            "continue it with `stable-rlhf resume`, set overwrite_output_dir to replace it, or choose another folder"
        )
        found.fail(f"{shown}: holds a run already; {remedy}")
        return
    if (fault := unwritable(folder)) is not None:
        found.fail(f"{shown}: {fault}; choose another folder")
        return
    found.ok(f"{shown}: free, and {existing(folder)} can be written to")


def check_data(
    found: Findings, config: Config, context: int | None, vocabulary: int
) -> tuple[datasets.Dataset, EncodedPrompts, int]:
    """(training prompts, their tokens, number of held-out prompts). Prints the lengths and three prompts.

    ``context``: positions that the model has; ``vocabulary``: rows of its embedding.
    """
    train, held_out = split_datasets(config.data, config.seed, None, None)
    check_held_out(config, held_out)
    tokenizer = load_tokenizer(config.model)
    if isinstance(train, StreamedRows):
        train = Prompts.whole(train.first(count := 2 * config.rollout.prompts), train.name)
        found.detail(f"data.streaming=true: only the first {count} rows are looked at")
    encoder = PromptEncoder(
        tokenizer,
        max_prompt_length=config.data.max_prompt_length,
        context_length=context,
        max_completion_length=config.rollout.max_completion_length,
        vocabulary=vocabulary,
    )
    encoded, *_ = [
        encoder.encode_all(prompts.dataset, prompts.numbers, prompts.name)
        for prompts in (train, held_out)
        if prompts is not None
    ]
    count, sizes = len(encoded), [len(ids) for ids in encoded.input_ids]
    cut, twice = sum(encoded.truncated), count - len({tuple(ids) for ids in encoded.input_ids})
    middle = f"{statistics.median(sizes):g}"
    text = f"data: {count} prompts of {min(sizes)} to {max(sizes)} tokens (median {middle}), {cut} of them cut to "
    text += f"data.max_prompt_length={config.data.max_prompt_length}, {twice} duplicates"
    if count < config.rollout.prompts:
        of = config.rollout
        a_step = f"rollout.batch_size={of.batch_size}"
        a_step += f" / rollout.num_generations={of.num_generations}" if of.num_generations > 1 else ""
        found.warning(f"{text}; fewer than {a_step}: every step sees all of them")
    elif cut > CUT * count:
        found.warning(f"{text}; a cut prompt loses its beginning: raise data.max_prompt_length, or shorten the prompts")
    elif twice > TWICE * count:
        found.warning(f"{text}; duplicates are trained on more often: remove them unless you want that")
    else:
        found.ok(text)
    for number, ids in enumerate(encoded.input_ids[:SHOWN], start=1):
        found.detail(
            f"prompt {number}: {printable(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)), CHARACTERS)}"
        )
    if held_out is not None and held_out.cost is not None:
        (found.warning if held_out.cost.is_half else found.detail)(str(held_out.cost))
    return train.dataset, encoded, 0 if held_out is None else len(held_out.dataset)


def check_disk(found: Findings, config: Config, needed: Memory) -> None:
    """Checks that the disk has room for the kept checkpoints, one being written, and the final model.

    With the guard a checkpoint also holds the last good state. Without an adapter, the run's folder also holds that
    state and a candidate for the next one.
    """
    place = existing(Path(config.output_dir or "runs"))
    states = 2 if config.guard.enabled else 1
    count = config.save_total_limit + (config.metric_for_best_model is not None)  # the best one is kept besides them
    kept = (count + 1) * states * needed.checkpoint
    snapshots = 3 * needed.checkpoint if config.guard.enabled and config.model.lora_r == 0 else 0  # one being written
    room = kept + snapshots + needed.final
    left = shutil.disk_usage(place).free
    text = f"disk: {readable_size(left)} free at {place}, {readable_size(room)} needed for {count} + 1 "
    text += (
        f"checkpoints of {readable_size(states * needed.checkpoint)}, {readable_size(snapshots)} of snapshots and the "
    )
    text += f"final model of {readable_size(needed.final)}"
    if room > left:
        found.fail(f"{text}; free some, lower save_total_limit={config.save_total_limit}, or choose another output_dir")
    else:
        found.ok(text)


# -- what is loaded -------------------------------------------------------------------------------------------------


def check_reward(found: Findings, scorer: Scorer, row: dict[str, Any], tokenizer: Any) -> bool:
    """Scores a pleasant and an unpleasant answer to the first prompt. Returns False if that failed."""
    prompts, answers, columns, ids = _trial(row, tokenizer)
    try:
        scores = scorer.score(prompts, answers, columns, [True, True], ids)
    except RewardError as error:
        found.fail(f"reward: {error}")
        return False
    text = f"reward: {_told(scores.per_function)}"
    text += AFTER
    if not all(scores.valid):
        found.warning(f"{text}; a completion without a score is not trained on: find out why it has none")
    elif scores.total[0] == scores.total[1]:
        found.warning(f"{text}; both get the same score: check that the reward reads the completion")
    else:
        found.ok(text)
    return True


def check_gold(found: Findings, gold: Scorer, row: dict[str, Any], tokenizer: Any) -> None:
    """Has the gold rewards score the same two answers."""
    prompts, answers, columns, ids = _trial(row, tokenizer)
    try:
        scores = gold.answers(prompts, answers, columns, ids)
    except RewardError as error:
        found.fail(f"gold: {error}")
        return
    text = f"gold: {_told(scores)}{AFTER}"
    silent = [name for name, values in scores.items() if None in values]
    alike = [name for name, values in scores.items() if values[0] == values[1]]
    if silent:
        found.warning(f"{text}; {silent[0]} does not judge every completion: its mean is of those that it judges")
    elif alike:
        found.warning(f"{text}; {alike[0]} gives both the same score: check that it reads the completion")
    else:
        found.ok(text)


def _trial(row: dict[str, Any], tokenizer: Any) -> tuple[list[Any], list[str], dict[str, list[Any]], Any]:
    """(prompts, answers, columns, token ids) of a pleasant and an unpleasant answer to one prompt."""
    columns = {name: [value, value] for name, value in row.items() if name != "prompt"}
    answers = [PLEASANT, UNPLEASANT]
    return [row["prompt"]] * 2, answers, columns, tokenizer(answers, add_special_tokens=False)["input_ids"]


def _told(scores: dict[str, list[float | None]]) -> str:
    return ", ".join(
        f"{name} gives {' and '.join('no score' if value is None else f'{value:.4g}' for value in values)}"
        for name, values in scores.items()
    )


def check_memory(found: Findings, needed: Memory, device: torch.device) -> bool:
    """Compares the estimate with the free memory. Returns False if no step may be tried: if the constant part does not
    fit, and, on a CPU, where a process that takes too much cannot be caught, also if it is tight."""
    left, held = memory.free(device), sum(needed.held.values())
    text = f"memory: about {readable_size(needed.total)} needed, {readable_size(left)} free on {device}"
    if held > left:
        found.fail(f"{text}: {readable_size(held)} are needed during the whole run; {memory.LESS}")
    elif needed.total > TIGHT * left:
        risk = (
            "" if device.type == "cuda" else "the system may kill a process that takes too much, so no step is tried; "
        )
        found.warning(f"{text}; {risk}{memory.LESS}")
    else:
        found.ok(text)
    parts = [f"{name} {readable_size(size)}" for name, size in (needed.held | needed.passing).items() if size]
    found.detail(f"by part: {', '.join(parts)}")
    return held <= left if device.type == "cuda" else needed.total <= TIGHT * left
