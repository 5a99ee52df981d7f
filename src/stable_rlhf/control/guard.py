"""The guard's verdict on each step (algorithm.md, Guard): how it responds when figures break a rule.

Once per rollout, after its update:
1. every rule looks at the step's figures (names of metrics.jsonl) and says what it sees, or nothing;
2. a rule with patience must see it for ``patience`` steps in a row, the others act at once;
3. an optimiser step whose gradient was not finite has already been left out: it is an incident (SKIP), and after
   ``patience`` steps in a row a reason to roll back;
4. a reward that falls is looked at again: where earlier texts now score lower, too, the reward has moved and not the
   policy, and its level is taken anew (REBASE);
5. else ROLL_BACK while fewer than ``max_rollbacks`` have been made, else STOP.

`judge` is a pure function over frozen records; `Guard` holds the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from stable_rlhf.control.base import check_keys, from_dict
from stable_rlhf.control.guard_config import GuardConfig
from stable_rlhf.control.guard_rules import ERRORS, RULES, WINDOW, Figures, GuardState, Rewards
from stable_rlhf.control.rescored import Rescored

EARLY = 0.2
"""Share of max_drawdown from which a falling reward makes a state suspect. The average lags: half of what was gained is
lost ten steps after a collapse, and by then a state from after the collapse would often have been kept."""

Again = Callable[[], Rescored | str]
"""Scores earlier texts again, or says why they cannot be."""


class Action(StrEnum):
    """The action that a verdict asks for; incidents.jsonl shows its value."""

    GO_ON = "go on"
    SKIP = "skip"
    REBASE = "rebase"
    ROLL_BACK = "roll back"
    STOP = "stop"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The guard's verdict on a step."""

    action: Action
    rule: str = ""
    """Name of the rule that was broken: the setting of GuardConfig that turns it."""
    seen: str = ""
    """The observation that broke the rule, with its figures, as a clause for a person."""
    advice: str = ""
    """Something to try if it keeps happening."""
    suspect: bool = False
    """Whether a rule's condition holds, for long enough or not, or the reward has begun to fall; the state is then not
    one to go back to."""


def judge(
    config: GuardConfig, state: GuardState, figures: Figures, again: Again | None = None
) -> tuple[GuardState, Verdict]:
    """Judges a step: (next state, verdict). ``figures``: the step's row of metrics.jsonl, numbers only.

    ``again`` is called only where a fall of the reward is about to act; None acts on the fall alone.

    After a roll-back the caller continues with the state of the snapshot, except for ``rollbacks`` and ``factor``,
    which are those of the state returned.
    """
    state = state.after(figures)
    found = {name: rule.seen(config, state, figures) for name, rule in RULES.items()}
    streaks = {name: state.streaks[name] + 1 if said else 0 for name, said in found.items()}
    state = replace(state, streaks=streaks)
    due = [name for name, rule in RULES.items() if streaks[name] >= rule.patience(config)]
    if due:
        name = due[0]
        seen = f"{found[name]}" + (f", for {streaks[name]} steps" if streaks[name] > 1 else "")
        if name == "max_drawdown" and again is not None:
            rescored = again()
            if isinstance(rescored, Rescored) and _has_moved(config, state.rewards, rescored):
                return _rebased(state, rescored, seen)
            seen += f"; {rescored}"
        action = Action.ROLL_BACK if state.rollbacks < config.max_rollbacks else Action.STOP
        if action is Action.ROLL_BACK:
            state = replace(state, rollbacks=state.rollbacks + 1, factor=state.factor * config.rollback_factor)
        return state, Verdict(action=action, rule=name, seen=seen, advice=RULES[name].advice, suspect=True)
    if said := found["skipped_steps"]:
        advice = RULES["skipped_steps"].advice
        return state, Verdict(action=Action.SKIP, rule="skipped_steps", seen=said, advice=advice, suspect=True)
    return state, Verdict(action=Action.GO_ON, suspect=any(streaks.values()) or _falls(config, state.rewards))


def _has_moved(config: GuardConfig, rewards: Rewards, rescored: Rescored) -> bool:
    fall, gained, _ = rewards.fall
    return config.max_drawdown is not None and rescored.explains(fall, config.max_drawdown * gained)


def _rebased(state: GuardState, rescored: Rescored, seen: str) -> tuple[GuardState, Verdict]:
    """The state with the reward's level taken anew, and the verdict that says so."""
    state = replace(state, rewards=state.rewards.moved(rescored.drop), streaks={**state.streaks, "max_drawdown": 0})
    return state, Verdict(
        action=Action.REBASE,
        rule="max_drawdown",
        seen=f"the reward has moved: {rescored}: not the policy; {seen}",
        advice="see what changed in the reward; one that is meant to move may do without guard.max_drawdown",
        suspect=any(state.streaks.values()),
    )


class Guard:
    """Holds the guard's settings and state; the rules themselves are pure functions.

    With ``enabled=False`` it judges nothing: every verdict is to go on, and the state stays as it is.
    """

    def __init__(self, settings: GuardConfig) -> None:
        self.settings = settings
        self.state = GuardState()

    def judge(self, figures: Figures, again: Again | None = None) -> Verdict:
        """Judges a step by its row of metrics.jsonl, numbers only; ``again`` as in `judge`."""
        if not self.settings.enabled:
            return Verdict(action=Action.GO_ON)
        self.state, verdict = judge(self.settings, self.state, figures, again)
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Everything that future verdicts depend on except the settings, as plain JSON values."""
        return dataclasses.asdict(self.state)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continues from a `state_dict()`. Raises ValueError, and changes nothing, if it does not fit."""
        state: GuardState = from_dict(GuardState, saved, "guard state")
        check_keys(state.streaks, RULES, "guard state.streaks")
        self.state = state

    def roll_back(self, saved: Mapping[str, Any]) -> None:
        """Continues from the `state_dict()` of a snapshot, except that ``rollbacks`` and ``factor`` stay.

        A roll-back must not undo itself. Raises as `load_state_dict` does.
        """
        kept = {"rollbacks": self.state.rollbacks, "factor": self.state.factor}
        self.load_state_dict({**saved, **kept})


def _falls(config: GuardConfig, rewards: Rewards) -> bool:
    """Whether the reward has clearly lost EARLY x max_drawdown of what it had gained within two windows of its best.

    After that a lower reward is accepted: a run that has settled a little lower must keep states again.
    """
    fall, gained, error = rewards.fall
    if config.max_drawdown is None or rewards.since > 2 * WINDOW:
        return False
    return fall > EARLY * config.max_drawdown * gained and fall > ERRORS * error
