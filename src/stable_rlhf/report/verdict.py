"""The verdict on a run, in words: rules from a few facts to a sentence. Pure, and every limit has its reason."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from stable_rlhf.report.facts import Facts, Gold

ERRORS = 2.0
"""Standard errors that a change of the reward must exceed: by chance alone, one change in twenty does."""

ON_BUDGET = 0.15
"""How far the KL may lie from its threshold, as a share of it (docs/metrics.md: within 15 % once reached)."""

FAR_OVER = 0.5
"""Share of the threshold by which the KL is far above it: the regulation is not holding it."""

VARIETY_LOST = 0.2
"""Share of distinct-2 whose loss asks for a look at the samples. The built-in pair loses a third in 60 steps, and then
`amazing` and `beautiful` are in most of its samples; after 12 steps it has lost a seventh, and they differ."""

VARIETY_GONE = 0.5
"""Share of distinct-2 whose loss means that the answers have become alike."""

ENTROPY_LOST = 0.5
"""Share of the entropy that a healthy run may lose (docs/metrics.md: it falls to 50-90 % of its start)."""

ENTROPY_GONE = 0.75
"""Share of the entropy whose loss is collapse: half of what a healthy run may keep at least."""

ENTROPY_GAINED = 0.25
"""Share by which the entropy may rise before the text may be turning into gibberish."""

NAMED = 3
"""Gold rewards that a sentence names; the table has all."""

_SHARES = {
    0.1: "a tenth", 0.2: "a fifth", 0.25: "a quarter", 1 / 3: "a third", 0.5: "half", 2 / 3: "two thirds",
    0.75: "three quarters", 0.9: "nine tenths",
}  # fmt: skip


class Tone(enum.IntEnum):
    """How a finding is meant; of several the highest counts."""

    FINE = 0
    LOOK = 1
    BAD = 2


@dataclass(frozen=True)
class Finding:
    """A clause of the verdict. `look` names what to look at, if anything."""

    tone: Tone
    words: str
    look: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`state` says whether the run is finished; `words` is the verdict in one sentence."""

    tone: Tone
    state: str
    words: str


def verdict(facts: Facts) -> Verdict:
    """The verdict: reward, gold, KL, variety, entropy, incidents, in this order, and what to look at."""
    state = _state(facts)
    findings = [
        found
        for rule in (_given_up, _reward, _gold, _crashes, _kl, _variety, _entropy, _incidents)
        if (found := rule(facts)) is not None
    ]
    words = ", ".join(found.words for found in findings) or "too little is recorded for a verdict"
    looks = list(dict.fromkeys(found.look for found in findings if found.look is not None))
    if looks:
        words += f": look at {' and '.join(looks)}"
    return Verdict(
        tone=max(found.tone for found in (state, *findings)),
        state=state.words,
        words=f"{words[0].upper()}{words[1:]}.",
    )


def share_in_words(share: float) -> str:
    """A share of 0 to 1 as its nearest common fraction."""
    return _SHARES[min(_SHARES, key=lambda known: abs(known - share))]


def _state(facts: Facts) -> Finding:
    done = f"{facts.steps} step{'' if facts.steps == 1 else 's'}"
    unfinished = facts.planned is not None and facts.steps < facts.planned
    if unfinished:
        done = f"{facts.steps} of {facts.planned} steps"
    if facts.running:
        return Finding(Tone.FINE, f"Still running: {done}.")
    if facts.gave_up_at is not None:
        return Finding(Tone.BAD, f"Ended by the guard: {done}.")
    if facts.planned is None:
        return Finding(Tone.FINE, f"{done}; how many were planned is not recorded.")
    if unfinished:
        return Finding(Tone.LOOK, f"Stopped before its end: {done}.")
    return Finding(Tone.FINE, f"Finished: {done}.")


def _given_up(facts: Facts) -> Finding | None:
    if facts.gave_up_at is None or facts.running:
        return None
    return Finding(Tone.BAD, f"given up by the guard at step {facts.gave_up_at}", "the incidents")


def _reward(facts: Facts) -> Finding | None:
    if facts.reward_change is None or facts.reward_error is None:
        return Finding(Tone.FINE, "too few steps to say whether the reward rises")
    amount = f"{abs(facts.reward_change):.3g} ± {facts.reward_error:.2g}"
    if abs(facts.reward_change) <= ERRORS * facts.reward_error:
        return Finding(
            Tone.LOOK, f"reward did not change beyond its error ({facts.reward_change:+.2g} ± {facts.reward_error:.2g})"
        )
    if facts.reward_change < 0:
        return Finding(Tone.BAD, f"reward fell by {amount}", "the samples")
    return Finding(Tone.FINE, f"reward rose by {amount}")


def _gold(facts: Facts) -> Finding | None:
    if not facts.golds:
        return None
    fell = [gold for gold in facts.golds if gold.change < -ERRORS * gold.error]
    rose = [gold for gold in facts.golds if gold.change > ERRORS * gold.error]
    against = [gold for gold in fell if gold.reward_change > ERRORS * gold.reward_error]
    if against:
        return Finding(Tone.BAD, f"the reward rises, gold falls ({_amounts(against)}): over-optimised", "the samples")
    if fell:
        return Finding(Tone.BAD, f"gold falls ({_amounts(fell)})", "the samples")
    if len(rose) == len(facts.golds):
        return Finding(Tone.FINE, f"gold rose ({_amounts(rose)})")
    still = [gold for gold in facts.golds if gold not in rose]
    return Finding(Tone.LOOK, f"gold did not change beyond its error ({_amounts(still)})")


def _amounts(golds: Sequence[Gold]) -> str:
    said = [
        f"{gold.name} by {abs(gold.change):.3g} ± {gold.error:.2g}"
        + (f" since step {gold.since}" if gold.since else "")
        for gold in golds[:NAMED]
    ]
    return ", ".join(said) + (f" and {len(golds) - NAMED} more" if len(golds) > NAMED else "")


def _crashes(facts: Facts) -> Finding | None:
    if not facts.crashes:
        return None
    return Finding(Tone.BAD, _counted(facts.crashes, "reward crash", "reward crashes"))


def _kl(facts: Facts) -> Finding | None:
    if facts.kl is None:
        return None
    if facts.budget is None or facts.budget <= 0:
        return Finding(Tone.FINE, f"KL {facts.kl:.3g} nats per token without a budget")
    over = facts.kl / facts.budget - 1
    if abs(over) <= ON_BUDGET:
        return Finding(Tone.FINE, "KL on budget")
    if over < 0:
        return Finding(Tone.FINE, f"KL below its budget ({facts.kl:.2g} of {facts.budget:.2g})")
    tone = Tone.BAD if over > FAR_OVER else Tone.LOOK
    return Finding(
        tone, f"KL {'far ' if over > FAR_OVER else ''}over its budget ({facts.kl:.2g} of {facts.budget:.2g})"
    )


def _variety(facts: Facts) -> Finding | None:
    lost = _lost(facts.variety)
    if lost is None:
        return None
    if lost < VARIETY_LOST:
        return Finding(Tone.FINE, "variety held")
    tone = Tone.BAD if lost >= VARIETY_GONE else Tone.LOOK
    return Finding(tone, f"variety fell by {share_in_words(lost)}", "the samples")


def _entropy(facts: Facts) -> Finding | None:
    lost = _lost(facts.entropy)
    if lost is None or -ENTROPY_GAINED <= lost <= ENTROPY_LOST:
        return None
    if lost > 0:
        tone = Tone.BAD if lost >= ENTROPY_GONE else Tone.LOOK
        return Finding(tone, f"entropy fell by {share_in_words(lost)}", "the samples")
    by = f"by {share_in_words(-lost)}" if lost > -0.95 else f"to {1 - lost:.2g} times its start"
    return Finding(Tone.LOOK, f"entropy rose {by}", "the samples")


def _incidents(facts: Facts) -> Finding | None:
    acts = []
    if facts.skips:
        acts.append(f"left out {_counted(facts.skips, 'update', 'updates')}")
    if facts.rebases:
        acts.append(f"found the reward itself moved {_counted(facts.rebases, 'time', 'times')}")
    if facts.rollbacks:
        acts.append(f"rolled back {_counted(facts.rollbacks, 'time', 'times')}")
    if not acts:
        return None
    return Finding(Tone.LOOK, f"the guard {' and '.join(acts)}", "the incidents")


def _lost(pair: tuple[float, float] | None) -> float | None:
    """The share of the start that is lost at the end, negative for a gain; None without a start above 0."""
    return None if pair is None or pair[0] <= 0 else 1 - pair[1] / pair[0]


def _counted(number: int, one: str, more: str) -> str:
    return f"{number} {one if number == 1 else more}"
