"""Judges sampled groups: completions cut off, rewards that cannot tell texts apart, groups without variance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from stable_rlhf.doctor.dry_run import CUT_OFF
from stable_rlhf.doctor.findings import Findings
from stable_rlhf.doctor.trl.arguments import TRLArguments
from stable_rlhf.doctor.trl.rewards import TRLRewards
from stable_rlhf.doctor.trl.sampling import Completion

ENOUGH = 0.95
"""Share of completions that the recommended length lets end."""

ROUND = 8
"""The recommended length is a multiple of this."""

FLAT = 0.5
"""Share of groups without variance above which it is a warning: half of the samples are then paid for and not
used."""

Scored = dict[str, list[float | None]]
"""Scores of texts by reward function."""


@dataclass(frozen=True, kw_only=True)
class KnownTexts:
    """A pleasant and an unpleasant answer to one prompt, scored twice."""

    first: Scored
    again: Scored


@dataclass(frozen=True, kw_only=True)
class Group:
    """The completions of one prompt."""

    completions: list[Completion]
    texts: list[str]
    scores: Scored
    again: Scored
    """The same texts scored a second time; of groups after the first, ``scores`` itself."""


# -- completions ----------------------------------------------------------------------------------------------------


def judge_completions(found: Findings, given: TRLArguments, groups: Sequence[Group], ends: str, others: str) -> None:
    """The share that max_completion_length cuts off, and the length that would do.

    ``ends``: the tokens that end a completion. ``others``: tokens that end one by the model's own settings, and not in
    this version of TRL.
    """
    every, limit = [each for group in groups for each in group.completions], given.limit
    known = [each for each in every if each.is_known(limit)]
    if len(known) < len(every):
        found.warning(
            f"completions: sampling was stopped after {max(each.seen for each in every)} tokens of "
            f"max_completion_length={limit}; {len(every) - len(known)} of {len(every)} had not ended. Whether they are "
            "cut off is not known: run doctor where you train"
        )
        return
    cut = [each for each in every if each.is_cut(limit)]
    lengths = [each.length for each in every if each.length is not None]
    text = f"completions: {len(cut)} of {len(every)} are cut off by max_completion_length={limit}"
    if lengths:
        text += f"; those that end have {min(lengths)} to {max(lengths)} tokens (median {statistics.median(lengths):g})"
    if len(cut) <= CUT_OFF * len(every):
        found.ok(text)
        return
    if given.training.mask_truncated_completions:
        text += "; mask_truncated_completions=true leaves them out of the loss"
    else:
        text += "; a cut answer is scored without its end"
    (found.fail if len(cut) == len(every) else found.warning)(f"{text}. {_longer(every, limit, ends, others)}")


def _longer(every: Sequence[Completion], limit: int, ends: str, others: str) -> str:
    """The length that lets most end; where it was not reached, what to look at."""
    if (length := enough(every)) is not None:
        return f"Set max_completion_length={length}, within which {ENOUGH:.0%} of them end"
    ended, seen = sum(each.length is not None for each in every), max(each.seen for each in every)
    text = f"Within {seen} tokens only {ended} of {len(every)} end: "
    if others:
        return f"{text}the model's settings name the end tokens {others}, but this version of TRL ends at {ends} only"
    if seen > limit:
        text += f"set max_completion_length above {seen}, or "
    return f"{text}see whether the model writes its end token ({ends}) at all, as a chat model does after a chat prompt"


def enough(every: Sequence[Completion]) -> int | None:
    """The least length, rounded up, within which ENOUGH of the completions end; None where it is beyond what was
    sampled."""
    lengths = sorted(math.inf if each.length is None else each.length for each in every)
    length = lengths[math.ceil(ENOUGH * len(lengths)) - 1]
    return None if length == math.inf else ROUND * math.ceil(length / ROUND)


# -- rewards --------------------------------------------------------------------------------------------------------


def judge_rewards(found: Findings, rewards: TRLRewards, groups: Sequence[Group], known: KnownTexts) -> None:
    """For each function: does it score every text, does it tell texts apart, and gives one text one score."""
    for name in rewards.scorer.names:
        sampled = [score for group in groups for score in group.scores[name]]
        pair = known.first[name]
        text = f"reward: {name} gives {_range(sampled)} to {len(sampled)} completions, and {_told(pair)} to a pleasant "
        text += "and an unpleasant answer to the first prompt"
        missing = sum(score is None for score in sampled)
        noise = max(_noise(known.first[name], known.again[name]), _noise(groups[0].scores[name], groups[0].again[name]))
        if missing == len(sampled):
            found.fail(f"{text}; it scores none of the completions: find out why it returns None")
        elif noise:
            found.warning(f"{text}; {_noisy(noise, name, groups)}")
        elif missing:
            found.warning(f"{text}; {missing} have no score, and TRL then leaves this reward out of their sum")
        elif len(set(sampled)) > 1:
            found.ok(text)
        elif pair[0] != pair[1]:
            found.warning(
                f"{text}; it can tell texts apart, but not those that the model writes now, so there is nothing to "
                "learn from: give a reward with steps in between, or a better model to begin with"
            )
        else:
            found.fail(f"{text}; every text gets the same score: check that it reads the completion")


def _noisy(noise: float, name: str, groups: Sequence[Group]) -> str:
    known = [[score for score in group.scores[name] if score is not None] for group in groups]
    spread = statistics.fmean(statistics.pstdev(scores) if scores else 0.0 for scores in known)
    return (
        f"the same text scored twice differs by up to {noise:.3g}, against a deviation of {spread:.3g} within a group: "
        "advantages are partly noise; make the reward deterministic, or average it over several calls"
    )


def _noise(first: Sequence[float | None], again: Sequence[float | None]) -> float:
    """The largest difference between two scores of the same text, beyond rounding."""
    pairs = [(a, b) for a, b in zip(first, again, strict=True) if a is not None and b is not None]
    apart = [abs(a - b) for a, b in pairs if not math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)]
    return max(apart, default=0.0)


def _range(scores: Sequence[float | None]) -> str:
    known = [score for score in scores if score is not None]
    if not known:
        return "no score"
    low, high = min(known), max(known)
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _told(pair: Sequence[float | None]) -> str:
    return " and ".join("no score" if score is None else f"{score:.4g}" for score in pair)


# -- groups ---------------------------------------------------------------------------------------------------------


def judge_groups(found: Findings, given: TRLArguments, rewards: TRLRewards, groups: Sequence[Group]) -> None:
    """The share of groups in which every completion has the same reward: their advantages are 0."""
    flat = [group for group in groups if rewards.is_flat(group.scores)]
    text = f"groups: in {len(flat)} of {len(groups)} groups of num_generations={given.group} all rewards are equal"
    if not flat:
        found.ok(text)
        return
    text += ", so that all advantages are 0 there and nothing is learned from them"
    text += "" if given.training.beta == 0.0 else " except by the KL's term"
    alike = sum(len(set(group.texts)) == 1 for group in flat)
    if alike:
        temperature = f"temperature={given.training.temperature:g}"
        remedy = f"in {alike} of them all completions are the same text: raise {temperature}"
    elif len({total for group in flat for total in rewards.totals(group.scores)}) > 1:
        remedy = (
            "the reward differs between prompts and not between the answers to one: check that it reads the completion"
        )
    else:
        remedy = (
            "give a reward with steps in between, raise num_generations or temperature, or leave out prompts that are "
            "always solved or never"
        )
    verdict = found.fail if len(flat) == len(groups) else found.warning if len(flat) >= FLAT * len(groups) else found.ok
    verdict(f"{text}; {remedy}")
