"""The guard of a run and the states it can go back to. It says what to do; the trainer does it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_rlhf.checkpoints import Snapshots, Tensors
from stable_rlhf.control import Action, Guard, Verdict
from stable_rlhf.records import Rollout
from stable_rlhf.training.texts import Texts

STAYS = frozenset({"scheduler", "guard", "prompts", "callbacks", "counters", "random", "reward_random", "reward_units"})
"""Parts of a run that a roll-back does not restore. Steps stay counted and figures stay recorded; the same prompts and
random draws could lead to the same failure again; the guard keeps its count of roll-backs (`Guard.roll_back`); a score
keeps its unit."""

GOES_ON = {
    Action.SKIP: "learned from the rest of the step",
    Action.REBASE: "took the level of the reward anew from here, and rolled nothing back",
}
"""What was done where the run goes on from where it is, as a clause of an incident."""


class Recovery:
    """The guard and its snapshots. With ``guard.enabled=false`` it judges nothing and keeps nothing."""

    def __init__(self, guard: Guard, snapshots: Snapshots, texts: Texts) -> None:
        self.guard, self.snapshots, self.texts = guard, snapshots, texts
        self._began = False
        self.suspect = False
        """Whether a rule's condition holds at the step just done, whose state is then not one to go back to."""

    @property
    def factor(self) -> float:
        """The product of all roll-backs' factors, on the learning rates and on what an update may move the policy.

        It does not come back up: what made the steps too long (rate, reward, data) is still there, and a run that tries
        it again spends its roll-backs. Shorter steps cost time only, as the KL budget stays what it was.
        """
        return self.guard.state.factor

    def snapshot_due(self, step: int) -> bool:
        """Whether the state after ``step`` steps is to be kept."""
        return self.guard.settings.enabled and not self.suspect and step % self.guard.settings.snapshot_steps == 0

    def begin(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Keeps the state before the first step as the first good one."""
        self._began = True
        if self.guard.settings.enabled:
            self.snapshots.keep(tensors, state)
            self.snapshots.confirm()

    def resume(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Keeps the snapshots that a checkpoint holds."""
        self._began = True
        if self.guard.settings.enabled:
            self.snapshots.out_of(tensors, state)
        else:
            self.snapshots.forget()

    def end(self) -> None:
        """Drops every snapshot: a run that has ended, for whatever reason, is resumed from a checkpoint."""
        if self._began:  # or the folder may be another process's
            self.snapshots.forget()
        self._began = False

    def remember(self, rollout: Rollout, step: int) -> None:
        """Keeps texts of a rollout, which are scored again if the reward falls from where it is now."""
        if self.guard.settings.enabled and self.guard.settings.max_drawdown is not None:
            self.texts.add(rollout, step)

    def judge(self, figures: Mapping[str, Any], step: int) -> Verdict:
        """Judges the step just done by its figures; keeps or drops the candidate for the last good state.

        ``step``: its number, from 0.
        """
        verdict = self.guard.judge(figures, lambda: self.texts.again(step))
        if self.guard.state.rewards.since == 0:
            self.texts.mark()
        self.suspect = verdict.suspect
        if self.suspect:
            self.snapshots.drop()
        else:
            self.snapshots.confirm()  # the figures are of the policy that was kept as the candidate
        return verdict

    def what_next(self, action: Action) -> str:
        """The end of a sentence on a roll-back, which is already counted."""
        most = self.guard.settings.max_rollbacks
        if action is Action.STOP:
            return f"and stopped there, after guard.max_rollbacks={most} roll-back{'' if most == 1 else 's'}"
        return (
            f"(roll-back {self.guard.state.rollbacks} of {most}) and continues with other prompts, the learning rate "
            f"and the bound on an update's movement at {self.factor:g} x their settings"
        )
