"""`SAFETrainer`: the training loop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from stable_rlhf.checkpoints import capture, restore
from stable_rlhf.console import Progress, said_if_lost
from stable_rlhf.control import Action, Verdict
from stable_rlhf.errors import CheckpointError, ConfigError, DivergenceError, GuardStop, Interrupted, RewardError
from stable_rlhf.hardware import memory
from stable_rlhf.runs import evaluation, incidents, write_completions
from stable_rlhf.text import counted
from stable_rlhf.training.evaluate import evaluate
from stable_rlhf.training.failures import failures_named, misfits_named
from stable_rlhf.training.recovery import incident
from stable_rlhf.training.rows import completion_rows, step_row
from stable_rlhf.training.run import Run
from stable_rlhf.training.step import Loop, Step, take_step
from stable_rlhf.training.stopwatch import Stopwatch


class SAFETrainer(Run):
    """On-policy actor-critic RLHF with SAFE's controllers (or PPO's, by preset).

    Args:
        model: a causal language model, a PEFT model, or the name of one (loaded as ``args.model`` says).
        reward_funcs: one or several of: a function ``f(prompts, completions, **columns) -> list[float | None]``, sync
            or async; ``"package.module:function"``; a sequence-classification model or its name. None:
            ``args.reward``.
        args: every setting of the run.
        train_dataset: rows with a ``prompt``, text or a list of chat messages; the other columns reach the reward
            functions. None: ``args.data``.
        eval_dataset: held-out prompts for ``evaluate``. None: ``args.data``, when that names the training set too.
        processing_class: the policy's tokenizer; None loads it by the model's name.
        reward_processing_classes: a tokenizer for each reward model given as an object (None: that of its name or
            folder), None elsewhere.
        callbacks: ``transformers.TrainerCallback`` objects.
        peft_config: adapter for a model that has none.

    Raises ConfigError, PromptError, RewardError or OutOfMemoryError, with a remedy, before anything is written.
    """

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """Trains to ``args.max_steps`` and returns the evaluation before and after (evaluation.json).

        ``resume_from_checkpoint``: a checkpoint's folder, or True for the newest whole one of the run; the run then
        continues as if it had never stopped.

        SIGINT and SIGTERM raise Interrupted: after the step in progress, with a checkpoint, or at once where no step is
        in progress. Raises GuardStop where the guard ends the run and RewardError where no reward can be had, both with
        a checkpoint once the first step has begun; SaveError for a file that could not be written; OutOfMemoryError
        where memory ran out. The messages say how to resume.
        """
        with failures_named(self.run_dir, lambda: self.steps_done):
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """``train`` without the sentences on how to resume."""
        try:
            with self._stop as stop:
                with misfits_named(bool(resume_from_checkpoint)):
                    self.begin(resume_from_checkpoint)
                self.control = self.handler.on_train_begin(self._arguments, self.state, self.control)
                self._progress = Progress(self.args.max_steps, first_step=self.steps_done, console=self._console)
                with self._progress, stop.waiting():
                    while self.steps_done < self.args.max_steps and not self.control.should_training_stop:
                        self.step()
                        if stop.signum is not None:
                            if self._saved_at != self.steps_done:
                                self.save_checkpoint()
                            raise Interrupted(stop.signum)
                self.save_final()
                result = self._evaluate_into("after")
                self.control = self.handler.on_train_end(self._arguments, self.state, self.control)
                return result
        finally:
            self.end()

    def step(self) -> dict[str, Any] | None:
        """Takes one whole step: rollout, update, the guard's verdict, callbacks; snapshot and checkpoint where due.

        Returns the step's row of metrics.jsonl, None where a figure was not finite (then there is no row). The run is
        begun first if it has not begun; ``end`` ends it. Raises ConfigError once ``max_steps`` are done.

        A step that fails ends the run, which can be resumed from its last checkpoint. Its errors are those of the call
        that failed; only ``train`` adds how to resume.
        """
        if not self._began:
            self.begin()
        if self.steps_done >= self.args.max_steps:
            raise ConfigError(f"max_steps={self.args.max_steps}: all of these steps are done; set a larger max_steps")
        self.model.dropout_off()  # a loop of the user's own may have changed it since the last step
        try:
            row = self._learn()
            if row is not None and self._progress is not None:
                self._progress.update(row)
            self._after_step(row)
        except BaseException:
            self.end()
            raise
        return row

    def begin(self, resume_from_checkpoint: bool | str | Path | None = None) -> None:
        """Makes the run folder and evaluates the policy, or loads the checkpoint to resume from.

        A run that cannot begin leaves the folder free. Raises ConfigError where the run has begun already.
        """
        if self._began:
            raise ConfigError("this trainer has begun its run already: call step(), or end() first")
        try:
            super().begin(resume_from_checkpoint)
            if not resume_from_checkpoint:
                self._evaluate_into("before")
        except BaseException:
            self.end()
            raise
        self._began = True

    def _learn(self) -> dict[str, Any] | None:
        """Learns from one rollout and acts on the guard's verdict; returns the step's row, which is already written."""
        before = self._parts_named("prompts", "callbacks", "random", "reward_random")
        boundary = capture(before, self.steps_done)
        self.control = self.handler.on_step_begin(self._arguments, self.state, self.control)
        watch = Stopwatch()
        try:
            step = take_step(self._loop, watch)
        except RewardError as error:  # nothing has been learned from this rollout: the run is as it was before it
            restore(before, *boundary)
            with said_if_lost(error):
                self.save_checkpoint()
            raise
        except DivergenceError as error:
            if not self.args.guard.enabled:
                raise
            row, figures = None, error.figures
        else:
            self.scheduler.step()
            self.set_learning_rates()
            row = self._write(step, watch)
            figures = {name: value for name, value in row.items() if not isinstance(value, str)}
            figures["rows"] = sum(step.rollout.valid)
        self.counters.step += 1
        self.judge(figures)
        return row

    @property
    def _loop(self) -> Loop:
        return Loop(
            rollout=self.args.rollout,
            guard=self.args.guard,
            dataset=self.train_dataset,
            prompts=self.train_prompts,
            stream=self.stream,
            sampler=self.sampler,
            passes=self.passes,
            controller=self.controller,
            normaliser=self.normaliser,
            optimizer=self.optimizer,
            preview=self.preview,
            counters=self.counters,
        )

    def _write(self, step: Step, watch: Stopwatch) -> dict[str, Any]:
        """Writes what a step did to metrics.jsonl, timings.jsonl and, when due, completions; returns its row."""
        number, every = self.steps_done, self.args.log.completions_steps
        rollbacks = self.guard.state.rollbacks if self.args.guard.enabled else None
        row = step_row(step, self.counters, self.normaliser, rollbacks)
        timing = watch.timing(int(step.rollout.tokens.mask.sum()))
        self.writer.write(row, {"step": number, **timing, "memory_gb": memory.taken(self.model.device) / 1e9})
        if every and number % every == 0:
            write_completions(self.run_dir, number, completion_rows(step.rollout, step.measured))
        return row

    def _after_step(self, row: dict[str, Any] | None) -> None:
        """Runs callbacks, snapshot, checkpoint in this order, at a rollout's end, where no buffer has to be saved."""
        self.state.global_step = self.steps_done
        self.state.epoch = self.counters.episode / len(self.train_dataset)
        self.control = self.handler.on_step_end(self._arguments, self.state, self.control)
        if row is not None:
            known = {name: value for name, value in row.items() if value is not None}  # trackers warn of each None
            self.control = self.handler.on_log(self._arguments, self.state, self.control, known)
        if self.recovery.snapshot_due(self.steps_done):
            self.recovery.snapshots.keep(*capture(self.parts, self.steps_done))
        every = self.args.save_steps
        due = self.steps_done == self.args.max_steps or (every > 0 and self.steps_done % every == 0)
        if due or self.control.should_save or self.control.should_training_stop:
            self.save_checkpoint()
        self.control.should_save = False

    # -- what a verdict asks for --------------------------------------------------------------------------------------

    def judge(self, figures: Mapping[str, Any]) -> None:
        """The guard's verdict on the step just done, by its ``figures`` (names of metrics.jsonl), and what it asks for.

        Raises GuardStop where it gives the run up.
        """
        verdict = self.recovery.judge(figures)
        if verdict.action is not Action.GO_ON:
            self._act(verdict, figures)

    def _act(self, verdict: Verdict, figures: Mapping[str, Any]) -> None:
        """Does what the guard's verdict asks for, and records it as an incident.

        Raises GuardStop where the verdict, or a last good state that cannot be read, ends the run.
        """
        action, fault = verdict.action, None
        if action is Action.SKIP:
            done = "learned from the rest of the step"
        else:
            try:
                done = f"went back to the state after {counted(self._roll_back(), 'step')}"
            except CheckpointError as error:
                action, fault = Action.STOP, error
                done = f"could not go back, since the last good state cannot be read ({error}), and stopped"
            if fault is None:
                done += f" {self._what_next(action)}"
        entry = incident(self.steps_done - 1, verdict, action, done, figures)
        sentence = incidents.sentence(entry)
        with said_if_lost(sentence):
            incidents.record(self.run_dir, entry)
            if action is Action.STOP and fault is None:  # otherwise the present state is not one to save
                self.save_checkpoint()
        if action is Action.STOP:
            raise GuardStop(sentence) from fault

    def _what_next(self, action: Action) -> str:
        most = self.args.guard.max_rollbacks
        if action is Action.STOP:
            return f"and stopped there, after guard.max_rollbacks={most} roll-back{'' if most == 1 else 's'}"
        return (
            f"(roll-back {self.guard.state.rollbacks} of {most}) and continues with other prompts, the learning rate "
            f"at {self.recovery.factor:g} x its setting and the KL held tighter by the same factor"
        )

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float | None]:
        """Evaluates on the held-out prompts: reward with its standard error, KL, entropy, distinct-2 and length.

        Raises ConfigError where there are no held-out prompts.
        """
        return self._evaluate()[0]

    def _evaluate(self) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
        if self.eval_dataset is None or self.eval_prompts is None:
            raise ConfigError("evaluate() needs held-out prompts: give eval_dataset, or set data.eval_size above 0")
        self.model.dropout_off()
        figures, samples = evaluate(
            self.passes, self.sampler, self.eval_dataset, self.eval_prompts, self.args.max_steps
        )
        self.control = self.handler.on_evaluate(self._arguments, self.state, self.control, figures)
        return figures, samples

    def _evaluate_into(self, side: str) -> dict[str, Any]:
        """Evaluates into ``before`` or ``after`` of evaluation.json; returns its whole content, {} without prompts."""
        return {} if self.eval_dataset is None else evaluation.record(self.run_dir, side, *self._evaluate())

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.handler.add_callback(callback)
