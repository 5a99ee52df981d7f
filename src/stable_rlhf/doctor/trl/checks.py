"""The checks of `stable-rlhf doctor --trl FILE`, which find what would waste a run of TRL before hours are spent on it.

Cheap checks come first. Then a few groups of completions are sampled and scored, without a step of training. Each check
prints a line with TRL's names of the arguments; nothing is written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stable_rlhf.config import Config, ModelConfig
from stable_rlhf.data import PromptStream
from stable_rlhf.doctor.checks import CHARACTERS, PLEASANT, SHOWN, UNPLEASANT
from stable_rlhf.doctor.findings import Findings
from stable_rlhf.doctor.memory import skeleton
from stable_rlhf.doctor.trl.arguments import SCRIPTS, TRLArguments, batch_fault, number_of_processes
from stable_rlhf.doctor.trl.groups import Group, KnownTexts, judge_completions, judge_groups, judge_rewards
from stable_rlhf.doctor.trl.prompts import TRLPrompts, encode, load_rows, not_read_by_trl
from stable_rlhf.doctor.trl.rewards import TRLRewards, make_rewards
from stable_rlhf.doctor.trl.sampling import GroupSampler, end_ids, load_model
from stable_rlhf.errors import RewardError, RewardInputError
from stable_rlhf.files import unwritable
from stable_rlhf.hardware import resolve_device, shortage_named
from stable_rlhf.hub import hub_fault, looked_up
from stable_rlhf.policy import check_model, context_length, embedding_rows, load_tokenizer
from stable_rlhf.text import counted, printable, quoted

GROUPS = 8
"""Groups that are sampled. Where half of all groups have no variance, all 8 look fine once in 256 times."""

SECONDS = 120
"""Seconds after which no further group is begun, and the present one is cut: as long as a person waits for an
answer."""

LESS = "lower num_generations or max_completion_length, or run doctor where more memory is free"


def examine_trl(given: TRLArguments, say: Callable[[str], object] = print) -> bool:
    """Checks a TRL script's arguments, data, model and rewards, and returns True if nothing failed.

    ``say`` receives each line. Raises ConfigError, PromptError or OutOfMemoryError for what cannot be loaded at all.
    """
    found = Findings(say)
    with given.named(), shortage_named("doctor", LESS):
        check_arguments(found, given)
        check_batch(found, given)
        check_beta(found, given)
        device = resolve_device("cpu" if given.training.use_cpu else "auto")
        rows = load_rows(given)
        if (said := not_read_by_trl(given)) is not None:
            found.warning(said)
        named = ModelConfig(
            name=given.model.model_name_or_path,
            trust_remote_code=given.training.trust_remote_code,
            revision=_revision(given),
        )
        check_model(named)
        tokenizer, shapes = load_tokenizer(named), skeleton(Config(model=named))
        context = context_length(shapes)
        prompts = encode(given, rows, tokenizer, embedding_rows(shapes))
        check_prompts(found, given, prompts, tokenizer, context)
        rewards = _rewards(found, given, device)
        known = None if rewards is None else check_rewards(found, rewards, prompts, tokenizer)
        if rewards is None or known is None:
            found.detail("no completion was sampled: fix what failed first")
            return False
        model = _model(given, device)
        ends, others = end_ids(given, model, tokenizer)
        sampler = GroupSampler(given, model, tokenizer, ends, time.monotonic() + SECONDS)
        groups = sample_groups(found, given, sampler, prompts, rewards, context)
        if groups:
            judge_completions(found, given, groups, _tokens(tokenizer, ends), _tokens(tokenizer, others))
            judge_rewards(found, rewards, groups, known)
            judge_groups(found, given, rewards, groups)
    return not found.failed


# -- arguments ------------------------------------------------------------------------------------------------------


def check_arguments(found: Findings, given: TRLArguments) -> None:
    """Says what the file was read as, and checks that the results can be written."""
    found.ok(f"file: {given.file} is read as the arguments of TRL {given.version}'s `trl {given.kind}`")
    script, training, name = given.script, given.training, given.model.model_name_or_path
    if training.trust_remote_code:
        whose = f"{name!r}" + (f" and {reward!r}" if (reward := script.reward_model_name_or_path) else "")
        found.detail(f"trust_remote_code=true: the Python code that comes with {whose} is run, as TRL will run it")
    if name == "builtin":
        found.warning("model_name_or_path='builtin': the model of this package, which TRL's script does not know")
    if training.use_vllm:
        found.detail("use_vllm=true: doctor samples without vLLM, and without generation_kwargs, which are vLLM's")
    folder = training.output_dir or "trainer_output"
    if (fault := unwritable(Path(folder))) is not None:
        found.fail(f"output_dir={folder!r}: {fault}; choose another folder")


def check_batch(found: Findings, given: TRLArguments) -> None:
    """The arithmetic of a generation, which TRL has accepted for this number of processes."""
    training, every = given.training, given.processes
    size, group = training.generation_batch_size, given.group
    text = f"batch: per_device_train_batch_size={training.per_device_train_batch_size} x "
    text += f"{number_of_processes(every)} x steps_per_generation={training.steps_per_generation}"
    text += f" = {size} completions a generation, {counted(size // group, 'prompt')} x num_generations={group}; "
    text += f"num_iterations={training.num_iterations} passes over each"
    alone = None if every == 1 else batch_fault(given.asked, 1, SCRIPTS[given.kind])
    if alone is not None:
        found.warning(
            f"{text}. But `trl {given.kind}` reads the file in one process before it starts the others, and refuses it "
            f"there; start the script by `accelerate launch` itself, or: {alone}"
        )
    else:
        found.ok(text)


def check_beta(found: Findings, given: TRLArguments) -> None:
    beta = given.training.beta
    if beta == 0.0:
        found.warning(
            "beta=0.0: TRL loads no reference and measures no KL, so nothing can hold the policy near where it began, "
            "and SAFECallback of stable_rlhf.integrations.trl refuses such a run; set beta to another value, such as "
            "0.04, which the callback then replaces"
        )
    else:
        found.ok(f"beta={beta:g}: TRL measures the KL to a reference; the coefficient stays fixed without SAFECallback")


# -- data and model -------------------------------------------------------------------------------------------------


def _revision(given: TRLArguments) -> str | None:
    """The commit, tag or branch, where it is not the default branch."""
    revision = given.model.model_revision
    return None if revision == "main" else revision


def _model(given: TRLArguments, device: torch.device) -> Any:
    name = given.model.model_name_or_path
    try:
        with looked_up(*([] if name == "builtin" else [name])):
            return load_model(given, device)
    except (OSError, ValueError, ImportError, KeyError) as error:
        why = " ".join((hub_fault(error) or str(error)).split()).rstrip(".")
        remedy = "give the folder or the hub name of a causal language model"
        raise given.error(f"model_name_or_path={name!r}: {why}; {remedy}") from error


def check_prompts(
    found: Findings, given: TRLArguments, prompts: TRLPrompts, tokenizer: Any, context: int | None
) -> None:
    """Lengths of the prompts against the model's context, and their number against a generation's. Shows three."""
    sizes, limit = [len(ids) for ids in prompts.ids], given.limit
    total = "a stream" if prompts.total is None else counted(prompts.total, "prompt")
    looked = "" if prompts.total == len(sizes) else f", {len(sizes)} of them looked at"
    text = f"data: {total}{looked}, of {min(sizes)} to {max(sizes)} tokens (median {statistics.median(sizes):g})"
    needed = given.training.generation_batch_size // given.group
    room = None if context is None else context - limit
    long = 0 if room is None else sum(size > room for size in sizes)
    if prompts.total is not None and prompts.total < needed:
        found.fail(
            f"{text}; a generation takes {needed}, and TRL leaves an incomplete one out, so there would be no step: "
            "give more prompts, or lower gradient_accumulation_steps (or steps_per_generation) or "
            "per_device_train_batch_size"
        )
    elif long:
        remedy = "leave these prompts out, since TRL cuts none"
        if (lower := (context or 0) - max(sizes)) >= 1:
            remedy = f"lower max_completion_length to {lower}, or {remedy}"
        found.fail(
            f"{text}; {long} of them and max_completion_length={limit} do not fit the model's context of {context}: "
            f"{remedy}"
        )
    elif prompts.other:
        found.warning(
            f"{text}; TRL gives {prompts.other} of them special tokens twice, or an end token before the completion: "
            "compare the prompts with the tokenizer's special tokens"
        )
    else:
        found.ok(text)
    for number, ids in enumerate(prompts.ids[:SHOWN], start=1):
        shown = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        found.detail(f"prompt {number}: {printable(shown, CHARACTERS)}")


# -- rewards --------------------------------------------------------------------------------------------------------


def _rewards(found: Findings, given: TRLArguments, device: torch.device) -> TRLRewards | None:
    """The loaded rewards. None where one cannot be loaded as it is named, which is said."""
    try:
        rewards = make_rewards(given, device)
    except RewardInputError as error:
        found.fail(f"reward: {error}")
        return None
    for sentence in rewards.advice:
        found.warning(sentence)
    return rewards


def check_rewards(found: Findings, rewards: TRLRewards, prompts: TRLPrompts, tokenizer: Any) -> KnownTexts | None:
    """Scores a pleasant and an unpleasant answer to the first prompt, twice. None where that failed."""
    row = prompts.rows[0]
    columns = {name: [value, value] for name, value in row.items() if name != "prompt"}
    for name, argument in rewards.unaccepted(list(columns)).items():
        found.fail(
            f"reward: {name} does not take {argument!r}, which TRL passes to every reward function, so the first step "
            "fails; add **kwargs to its parameters"
        )
    if rewards.unaccepted(list(columns)):
        return None
    answers = [PLEASANT, UNPLEASANT]
    ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
    first, again = (_scored(found, rewards, [row["prompt"]] * 2, answers, columns, ids) for _ in range(2))
    return None if first is None or again is None else KnownTexts(first=first, again=again)


def _scored(
    found: Findings,
    rewards: TRLRewards,
    prompts: list[Any],
    texts: list[str],
    columns: dict[str, list[Any]],
    ids: list[list[int]],
) -> dict[str, list[float | None]] | None:
    try:
        return rewards.score(prompts, texts, columns, ids)
    except RewardError as error:
        if not found.failed:
            found.fail(f"reward: {error}")
        return None


# -- samples --------------------------------------------------------------------------------------------------------


def sample_groups(
    found: Findings,
    given: TRLArguments,
    sampler: GroupSampler,
    prompts: TRLPrompts,
    rewards: TRLRewards,
    context: int | None,
) -> list[Group]:
    """Groups of completions to prompts that the seed draws, with their scores; none where scoring failed.

    A group that the deadline cut before max_completion_length is left out, unless it is the only one.
    """
    fits = [row for row, ids in enumerate(prompts.ids) if context is None or len(ids) + given.limit <= context]
    if not fits:
        found.detail("no completion was sampled: no prompt fits the model's context")
        return []
    order = PromptStream(len(fits), given.training.seed).take(min(GROUPS, len(fits)))
    groups: list[Group] = []
    started = time.monotonic()
    with torch.random.fork_rng():
        torch.manual_seed(given.training.seed)
        for row in (fits[place] for place in order):
            if groups and sampler.is_late():
                break
            completions = sampler.sample(prompts.ids[row], context)
            if groups and not all(each.is_known(given.limit) for each in completions):
                break
            texts, ids = [sampler.text(each) for each in completions], [each.ids for each in completions]
            columns = {name: [value] * len(texts) for name, value in prompts.rows[row].items() if name != "prompt"}
            asked = [prompts.rows[row]["prompt"]] * len(texts)
            scores = _scored(found, rewards, asked, texts, columns, ids)
            again = scores if groups else _scored(found, rewards, asked, texts, columns, ids)
            if scores is None or again is None:
                return []
            groups.append(Group(completions=completions, texts=texts, scores=scores, again=again))
    seconds = time.monotonic() - started
    found.detail(
        f"sampled {counted(len(groups), 'group')} of num_generations={given.group} in {seconds:.3g} s; the first: "
        f"{printable(groups[0].texts[0], CHARACTERS)}"
    )
    return groups


def _tokens(tokenizer: Any, ids: list[int]) -> str:
    return ", ".join(quoted(tokenizer.convert_ids_to_tokens(number)) for number in ids)
