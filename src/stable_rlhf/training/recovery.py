"""Layer 5 at work: the guard's verdict on each step, the snapshots, and the way back to the last good one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from stable_rlhf.checkpoints import Snapshots, Tensors, capture, load_random_state, random_state, restore, store
from stable_rlhf.console import said_if_lost, tell
from stable_rlhf.control.guard import Action, GuardState, Verdict, judge
from stable_rlhf.errors import CheckpointError, ConfigError, GuardStop
from stable_rlhf.runs import incidents


class Recovery:
    """The guard of one run. With ``guard.enabled=false`` it sees and keeps nothing."""

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.config = trainer, trainer.args.guard
        self.guard = GuardState()
        self.snapshots = Snapshots(None if trainer.model.peft else trainer.run_dir / "snapshot")
        self._began = False
        self.suspect = False
        """Whether a rule's condition holds at the step just done: no state to come back to."""

    @property
    def factor(self) -> float:
        """What the roll-backs so far have made of learning rates and KL threshold."""
        return self.guard.factor

    @property
    def snapshot_due(self) -> bool:
        """Whether the state after the step just done is to be kept."""
        return self.config.enabled and not self.suspect and self.trainer.step % self.config.snapshot_steps == 0

    def begin(self) -> None:
        """Keeps the state before the first step."""
        self._began = True
        if self.config.enabled:
            self.snapshots.keep(*capture(self.trainer))
            self.snapshots.confirm()  # there is no other to go back to

    def resume(self, tensors: Tensors, state: dict[str, Any]) -> None:
        """Keeps the snapshots that belong to a checkpoint."""
        self._began = True
        if self.config.enabled:
            self.snapshots.out_of(tensors, state)
        else:
            self.snapshots.forget()

    def end(self) -> None:
        """Keeps nothing any more: a run that ends, however it does, goes on from a checkpoint."""
        if self._began:  # or the folder may be another process's
            self.snapshots.forget()

    def judge(self, figures: Mapping[str, Any]) -> None:
        """Judges the step just done by its figures, and does what follows. Raises GuardStop."""
        if not self.config.enabled:
            return
        self.guard, verdict = judge(self.config, self.guard, figures)
        self.suspect = verdict.suspect
        if self.suspect:
            self.snapshots.drop()
        else:
            self.snapshots.confirm()  # the figures are of the policy that was kept as the candidate
        if verdict.action is not Action.GO_ON:
            self._act(verdict, figures)

    def _act(self, verdict: Verdict, figures: Mapping[str, Any]) -> None:
        action, fault = verdict.action, None
        if action is Action.SKIP:
            done = "the rest of the step was learned from"
        else:
            try:
                done = f"went back to the state after {self._roll_back()} steps"
            except CheckpointError as error:
                action, fault = Action.STOP, error
                done = f"would have gone back, but the last good state cannot be read ({error}), and stopped"
            if action is Action.ROLL_BACK:
                done += (
                    f" (roll-back {self.guard.rollbacks} of {self.config.max_rollbacks}) and on with other prompts, "
                    f"the learning rate at {self.factor:g} x what is configured and the KL held as much tighter"
                )
            elif fault is None:
                done += f" and stopped there, after guard.max_rollbacks={self.config.max_rollbacks} roll-backs"
        incident = {"step": self.trainer.step - 1, "action": action.value, "rule": verdict.rule, "seen": verdict.seen}
        incident |= {"done": done, "advice": verdict.advice, "figures": dict(figures)}
        sentence = incidents.sentence(incident)
        with said_if_lost(sentence):
            incidents.record(self.trainer.run_dir, incident)
            if action is Action.STOP and fault is None:  # or where the run is now is no state to save
                self.trainer.save_checkpoint()
        if action is Action.STOP:
            raise GuardStop(sentence) from fault

    def _roll_back(self) -> int:
        """Back to the last good state, every byte of it; but steps, prompts, random draws and schedule go on from here.
        Returns the steps done in that state. Raises CheckpointError where it cannot be read; then nothing has changed.

        The counter of steps and the figures on disk keep what has happened; other prompts and draws, or the same might
        happen again.
        """
        trainer, made = self.trainer, {"rollbacks": self.guard.rollbacks, "factor": self.guard.factor}
        step, episode, prompts = trainer.step, trainer.episode, trainer.stream.state_dict()
        schedule, draws = trainer.scheduler.state_dict(), random_state()
        tensors, state = self.snapshots.load()
        restore(trainer, tensors, state, callbacks=False)
        self.guard = dataclasses.replace(self.guard, **made)
        trainer.step, trainer.episode = step, episode
        trainer.stream.load_state_dict(prompts)
        trainer.scheduler.load_state_dict({**schedule, "last_epoch": step})  # a step that broke off did not move it
        load_random_state(*draws)
        trainer.controller.next_step = step
        self.suspect = False
        self.tighten()
        return state["step"]

    def tighten(self) -> None:
        """Makes of learning rates and KL threshold what the roll-backs so far ask for."""
        self.trainer.controller.tighten(self.factor)
        self.trainer.set_learning_rates()


def forget_after(trainer: Any) -> None:
    """Removes what the run folder has of the steps that a resumed run is about to repeat: checkpoints, rows, incidents.

    Raises ConfigError for a line of theirs that cannot be read, before anything is removed.
    """
    try:
        incidents.read(trainer.run_dir)
        trainer.writer.check()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    # Checkpoints first: were the rows gone and not they, the next resume would go on from one that has no rows.
    folder = trainer.run_dir / "checkpoints"
    later = [path.name for path in store.found(folder) if store.steps_of(path) > trainer.step]
    for kept in store.forget_after(folder, trainer.step):
        tell(f"{kept}: a damaged checkpoint of a later step has this name now; remove it if you like")
        later = [name for name in later if not kept.name.startswith(f"damaged-{name}")]
    if later:
        tell(
            f"what there was of the steps after {trainer.step} is removed, {', '.join(later)} too: they are done again"
        )
    trainer.writer.truncate(trainer.step)
    incidents.truncate(trainer.run_dir, trainer.step)
