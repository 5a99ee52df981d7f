"""`SAFETrainer`: the training loop."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stable_rlhf.checkpoints import capture, restore
from stable_rlhf.console import Progress, said_if_lost, tell
from stable_rlhf.control import Action, Verdict
from stable_rlhf.errors import (
    CheckpointError,
    ConfigError,
    DivergenceError,
    GuardStop,
    Interrupted,
    PromptError,
    RewardError,
)
from stable_rlhf.hardware import memory
from stable_rlhf.runs import evaluation, incidents, write_completions
from stable_rlhf.text import counted
from stable_rlhf.training.evaluate import evaluate
from stable_rlhf.training.failures import failures_named, misfits_named
from stable_rlhf.training.given import held_out_remedy
from stable_rlhf.training.recovery import GOES_ON
from stable_rlhf.training.result import TrainResult
from stable_rlhf.training.rows import completion_rows, step_row
from stable_rlhf.training.saving import PolicySaving
from stable_rlhf.training.step import Loop, Step, take_step
from stable_rlhf.training.stopwatch import Stopwatch
from stable_rlhf.training.trackers import log_completions
from stable_rlhf.user_code import RandomStream


class SAFETrainer(PolicySaving):
    """On-policy actor-critic RLHF with SAFE's controllers (or PPO's, by preset).

    Args:
        model: a causal language model, a PEFT model, or the name of one (loaded as ``args.model`` says).
        reward_funcs: one or several of: a function ``f(prompts, completions, **columns) -> list[float | None]``, sync
            or async; ``"package.module:function"``; a sequence-classification model or its name. None:
            ``args.reward``.
        args: every setting of the run.
        train_dataset: rows with a ``prompt``, text or a list of chat messages; the other columns reach the reward
            functions. A data set of any kind, a DataFrame, a dict of columns, a list of texts, chats or rows, or a
            stream, which is read as it is needed (docs/data.md). None: ``args.data``.
        eval_dataset: held-out prompts for ``evaluate``, of the same kinds. None: ``args.data``, when that names the
            training set too.
        processing_class: the policy's tokenizer; None loads it by the model's name.
        reward_processing_classes: a tokenizer for each reward model given as an object (None: that of its name or
            folder), None elsewhere.
        callbacks: ``transformers.TrainerCallback`` objects.
        peft_config: adapter for a model that has none.
        gold_funcs, gold_processing_classes: rewards of the same kinds that are only measured, on the held-out prompts,
            never trained on, and their tokenizers. None: ``args.reward.gold``.

    Raises ConfigError, PromptError, RewardError or OutOfMemoryError, with a remedy, before anything is written.
    """

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainResult:
        """Trains to ``args.max_steps``, or until a callback stops it, and returns its figures.

        They are there also where nothing was left to train. The result is the content of evaluation.json (before and
        after, by figure), with the attributes of Transformers' TrainOutput.

        ``resume_from_checkpoint``: a checkpoint's folder, or True for the newest whole one of the run; the run then
        continues as if it had never stopped.

        SIGINT and SIGTERM raise Interrupted: after the step in progress, with a checkpoint, or at once where no step is
        in progress. Raises GuardStop where the guard ends the run and RewardError where no reward can be had, both with
        a checkpoint once the first step has begun; SaveError for a file that could not be written; OutOfMemoryError
        where memory ran out. The messages say how to resume.
        """
        with failures_named(self.run_dir, lambda: self.steps_done):
            return self._train(resume_from_checkpoint)

    def _train(self, resume_from_checkpoint: bool | str | Path | None = None) -> TrainResult:
        """``train`` without the sentences on how to resume."""
        began = time.monotonic()
        try:
            with self._stop as stop:
                with misfits_named(bool(resume_from_checkpoint)):
                    self.begin(resume_from_checkpoint)
                began_at, episodes = self.steps_done, self.counters.episode
                self._progress = Progress(self.args.max_steps, first_step=self.steps_done, console=self._console)
                with self._progress, stop.waiting():
                    while not (self._epochs_done or self.control.should_training_stop):
                        self.step()
                        if stop.signum is not None:
                            if self._saved_at != self.steps_done:
                                self.save_checkpoint()
                            raise Interrupted(stop.signum)
                    self.events.epoch_end()
                    self._follow_control()
                self.load_best()
                self.save_final()
                evaluated = self._evaluate_into("after")
                seconds = time.monotonic() - began
                steps, samples = self.steps_done - began_at, self.counters.episode - episodes
                logged = self.events.recorded()
                result = TrainResult(self.steps_done, evaluated, logged, self._rollbacks, seconds, steps, samples)
                self.events.log(result.training)
                self.events.train_end()
                self._finish()
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
        try:
            row = self._learn()
            if row is not None and self._progress is not None:
                self._progress.update(row)
            self._after_step()
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
            self.events.train_begin()
            if not resume_from_checkpoint:
                self._evaluate_into("before")
            elif self.counters.evaluates:
                self.control.should_evaluate = self.control.should_save = True  # saved again, where it is not owed
                self._saved_at = -1
                with self.events.in_epoch_of_last_step(is_over=self.stream.is_between):
                    self._follow_control()
                self._follow_control()
        except BaseException:
            self.end()
            raise
        self._began = True

    def _learn(self) -> dict[str, Any] | None:
        """Learns from one rollout and acts on the guard's verdict; returns the step's row, which is already written."""
        before = self._parts_named("prompts", "callbacks", "random", "reward_random")
        boundary = capture(before, self.steps_done)
        self.events.step_begin(self.epoch)
        watch = Stopwatch()
        try:
            step = take_step(self._loop, watch)
        except (RewardError, PromptError) as error:  # nothing was learned from this rollout: back to before it
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
            self.adaptive_rate.observe(step.stats.metrics["policy/approxkl_avg"])
            self.set_learning_rates()
            row = self._write(step, watch)
            figures = {name: value for name, value in row.items() if not isinstance(value, str)}
            figures["rows"] = sum(step.rollout.valid)
            self.recovery.remember(step.rollout, self.steps_done)
        self.counters.step += 1
        self.events.stepped(self.steps_done, self.epoch)
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
            factor=self.recovery.factor,
        )

    def _write(self, step: Step, watch: Stopwatch) -> dict[str, Any]:
        """Writes what a step did to metrics.jsonl, timings.jsonl and, when due, completions; returns its row."""
        number, every = self.steps_done, self.args.log.completions_steps
        row = step_row(step, self.counters, self.normaliser, self._rollbacks if self.args.guard.enabled else None)
        timing = watch.timing(int(step.rollout.tokens.mask.sum()))
        timing["memory_gb"] = memory.taken(self.model.device) / 1e9
        self.writer.write(row, {"step": number, "epoch": self.epoch, **timing})
        self._to_log = row | {f"timings/{name}": value for name, value in timing.items()}
        if every and number % every == 0:
            sampled = completion_rows(step.rollout, step.measured)
            write_completions(self.run_dir, number, sampled)
            with self.shield.around(RandomStream(self.args.seed, zlib.crc32(b"completions"), number)):
                log_completions(self.events.handler.callbacks, self.events.arguments, number + 1, sampled)
        return row

    @property
    def _rollbacks(self) -> int:
        return self.guard.state.rollbacks

    def _after_step(self) -> None:
        """Callbacks, log, evaluation, snapshot, checkpoint in this order, at a rollout's end, where no buffer has to be
        saved."""
        self.events.step_end()
        self._leave_epoch()
        if self.recovery.snapshot_due(self.steps_done):
            self.recovery.snapshots.keep(*capture(self.parts, self.steps_done))
        self._follow_control()
        if self.events.epoch_is_over:
            self.events.epoch_end()
            self._follow_control()

    def _leave_epoch(self) -> None:
        """Leaves the rest of the epoch's prompts where a callback asks for it; the last epoch's end is the run's."""
        if self.events.leaves_epoch:
            self.stream.leave_pass()
            self.events.epoch_is_over = True
            self.control.should_training_stop |= self._epochs_done

    @property
    def _epochs_done(self) -> bool:
        """Whether all steps are done, or all epochs that they would take (some of which a callback may have left)."""
        is_set = not math.isinf(self.rows)
        return self.steps_done >= self.args.max_steps or (is_set and self.epoch >= self.state.num_train_epochs)

    def _follow_control(self) -> None:
        """Logs, evaluates and saves where ``control`` asks for it, which by default is where the settings do."""
        if self.control.should_log and self._to_log is not None:
            self.events.log(self._to_log)
            self._to_log = None
        if self.control.should_evaluate:
            try:
                self._evaluate_on_the_way()
            except RewardError as error:  # the step itself is done, and would be lost
                self._leave_epoch()
                with said_if_lost(error):
                    self.save_checkpoint()
                raise
        self._leave_epoch()  # before it is saved
        if (self.control.should_save or self.control.should_training_stop) and self._saved_at != self.steps_done:
            self.save_checkpoint()

    # -- what a verdict asks for --------------------------------------------------------------------------------------

    def judge(self, figures: Mapping[str, Any]) -> None:
        """The guard's verdict on the step just done, by its ``figures`` (names of metrics.jsonl), and what it asks for.

        Raises GuardStop where it gives the run up.
        """
        verdict = self.recovery.judge(figures, self.steps_done - 1)
        if verdict.action is not Action.GO_ON:
            self._act(verdict, figures)

    def _act(self, verdict: Verdict, figures: Mapping[str, Any]) -> None:
        """Does what the guard's verdict asks for, and records it as an incident.

        Raises GuardStop where the verdict, or a last good state that cannot be read, ends the run.
        """
        action, fault, done = verdict.action, None, GOES_ON.get(verdict.action)
        if done is None:
            try:
                done = f"went back to the state after {counted(self._roll_back(), 'step')}"
            except CheckpointError as error:
                action, fault = Action.STOP, error
                done = f"could not go back, since the last good state cannot be read ({error}), and stopped"
            if fault is None:
                done += f" {self.recovery.what_next(action)}"
        entry = incidents.of_verdict(self.steps_done - 1, verdict, action, done, figures)
        sentence = incidents.sentence(entry)
        with said_if_lost(sentence):
            incidents.record(self.run_dir, entry)
            self.events.log({"incident": sentence, "rollbacks": self._rollbacks})
            if action is Action.STOP and fault is None:  # otherwise the present state is not one to save
                self.save_checkpoint()
        if action is Action.STOP:
            raise GuardStop(sentence) from fault

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float | None]:
        """Evaluates on the held-out prompts: the figures of one side of evaluation.json (docs/metrics.md).

        Raises ConfigError where there are no held-out prompts.
        """
        return self._evaluate()[0]

    def _evaluate(self) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
        if self.eval_dataset is None or self.eval_prompts is None:
            raise ConfigError(f"evaluate() needs held-out prompts: {held_out_remedy(self.args)}")
        self.model.dropout_off()
        figures, samples = evaluate(
            self.passes, self.sampler, self.eval_dataset, self.eval_prompts, self.args.max_steps, self.gold
        )
        self.events.evaluated(figures)
        return figures, samples

    def _evaluate_on_the_way(self) -> None:
        """Evaluates into ``during`` of evaluation.json, and has the checkpoint saved where it is the best so far."""
        self.control.should_evaluate = False
        if self._evaluated is not None and self._evaluated[0] == self.steps_done:
            return  # a second callback asks for it after the same step
        if self.eval_dataset is None:
            tell("control.should_evaluate: there are no held-out prompts; give eval_dataset, or set data.eval_size")
            return
        self.counters.evaluates = True  # as a checkpoint has it that is saved because this fails
        figures, samples = self._evaluate()
        self.counters.evaluates = False
        evaluation.record_during(self.run_dir, self.steps_done, figures)
        self._evaluated = self.steps_done, figures, samples
        name = self.args.metric_for_best_model
        if name is not None and self.counters.is_best(figures[name], self.args.greater_is_better):
            self.events.best(self.counters)
            self.control.should_save = True

    def _evaluate_into(self, side: str) -> dict[str, Any]:
        """Evaluates into ``before`` or ``after`` of evaluation.json; returns its whole content, {} without prompts."""
        if self.eval_dataset is None:
            return {}
        step, figures, samples = self._evaluated or (-1, {}, [])
        if step != self.steps_done:  # otherwise the policy of this moment has just been evaluated
            figures, samples = self._evaluate()
        return evaluation.record(self.run_dir, side, figures, samples)
