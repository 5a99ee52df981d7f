"""Transformers' callbacks: the arguments they are given, the events they are called at, their states."""

from __future__ import annotations

import bisect
import contextlib
import copy
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from stable_rlhf.checkpoints import store
from stable_rlhf.config import Config, flat_settings
from stable_rlhf.errors import ConfigError
from stable_rlhf.runs import evaluation, read_rows
from stable_rlhf.training.resume import Counters
from stable_rlhf.training.trackers import trackers
from stable_rlhf.user_code import RandomStream, Shield

OF_STEP = ("step", "epoch")
"""Fields of timings.jsonl that say which step it is, and are not timings."""


class RunArguments(TrainingArguments):
    """The ``args`` that callbacks receive.

    Fields that have a counterpart among the run's settings have its value. ``to_dict``, which trackers record as the
    run's configuration, is every setting of the run by its name, such as ``optim.learning_rate``: the other fields of
    TrainingArguments are of no meaning here.
    """

    settings: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(self.settings)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """The same with every value a number or a text."""
        kinds = (bool, int, float, str)
        return {name: value if isinstance(value, kinds) else str(value) for name, value in self.settings.items()}


def callback_arguments(config: Config, settings: Mapping[str, Any], run_dir: Path, on_cpu: bool) -> RunArguments:
    """The arguments for callbacks; ``settings``: all of the run's, as config.yaml holds them.

    Transformers' DefaultFlowCallback decides by them when to log, evaluate, save and stop, unless a callback decides
    otherwise.
    """
    made = RunArguments(
        output_dir=str(run_dir),
        run_name=config.log.run_name or run_dir.name,
        max_steps=config.max_steps,
        seed=config.seed,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps",
        save_steps=config.save_steps,
        save_total_limit=config.save_total_limit,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps or None,
        metric_for_best_model=config.metric_for_best_model,
        greater_is_better=config.greater_is_better if config.metric_for_best_model else None,
        per_device_train_batch_size=config.rollout.prompts,
        per_device_eval_batch_size=config.rollout.batch_size,
        learning_rate=config.optim.learning_rate,
        lr_scheduler_type=config.optim.lr_scheduler_type,
        warmup_steps=config.optim.warmup_steps,
        weight_decay=config.optim.weight_decay,
        report_to=config.log.report_to or "none",
        use_cpu=on_cpu,
    )
    # Set afterwards: TrainingArguments would ask for save_steps that are a multiple of eval_steps, but a checkpoint is
    # saved here at every evaluation that is the best so far.
    made.load_best_model_at_end = config.load_best_model_at_end
    made.settings = flat_settings(settings)
    return made


class ShieldedCallbacks(CallbackHandler):
    """Transformers' handler of callbacks, with the callbacks shielded from the run and the run from them.

    Each event draws from a random stream of its own, given by seed, event and step: a resumed run gives a callback the
    same numbers, whichever events (a checkpoint more, the beginning again) came between.
    """

    def __init__(self, shield: Shield, seed: int, *arguments: Any) -> None:
        self.shield, self.seed = shield, seed
        super().__init__(*arguments)

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if all(type(callback) is DefaultFlowCallback for callback in self.callbacks):
            return super().call_event(event, args, state, control, **kwargs)  # nothing here is the user's
        stream = RandomStream(self.seed, zlib.crc32(event.encode()), state.global_step)
        with self.shield.around(stream):
            return super().call_event(event, args, state, control, **kwargs)


class Events:
    """Calls the callbacks at Transformers' events, in its order, with the state and control that its Trainer keeps.

    A step is one rollout with its update (``state.global_step``); an epoch is one pass over the training prompts.
    ``on_pre_optimizer_step`` and ``on_optimizer_step`` come around every optimiser step, of which a step has several.
    """

    def __init__(
        self,
        arguments: RunArguments,
        callbacks: Sequence[TrainerCallback],
        *,
        shield: Shield,
        model: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
    ) -> None:
        self.arguments = arguments
        self.handler = ShieldedCallbacks(
            shield,
            arguments.seed,
            [DefaultFlowCallback, *trackers(list(arguments.report_to or [])), *callbacks],
            model,
            tokenizer,
            optimizer,
            scheduler,
        )
        for callback in self.handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # Its own default is named after the host and the time, so that a resumed run would be another one.
                callback.logging_dir = str(Path(str(arguments.output_dir)) / "runs" / str(arguments.run_name))
        self.state = TrainerState(
            max_steps=arguments.max_steps,
            logging_steps=1,
            eval_steps=int(arguments.eval_steps or 0),
            save_steps=int(arguments.save_steps),
            train_batch_size=arguments.per_device_train_batch_size,
        )
        self.control = TrainerControl()
        self._in_epoch = self.epoch_is_over = False
        optimizer.register_step_pre_hook(lambda *_: self._call("on_pre_optimizer_step"))
        optimizer.register_step_post_hook(lambda *_: self._call("on_optimizer_step"))

    def _call(self, event: str, **given: Any) -> None:
        self.control = getattr(self.handler, event)(self.arguments, self.state, self.control, **given)

    def init_end(self) -> None:
        self._call("on_init_end")

    def train_begin(self) -> None:
        self._call("on_train_begin")

    def train_end(self) -> None:
        self._call("on_train_end")

    def step_begin(self, epoch: float) -> None:
        """A step begins at ``epoch``, and with it an epoch where the last one has ended."""
        if not self._in_epoch:
            self._in_epoch, self.state.epoch = True, epoch  # some of the last one may have been left
            self._call("on_epoch_begin")
        self._call("on_step_begin")

    def stepped(self, steps: int, epoch: float) -> None:
        """Counts a step as done, before anything is said of it."""
        self.epoch_is_over = int(epoch) > int(self.state.epoch)
        self.state.global_step, self.state.epoch = steps, epoch

    def step_end(self) -> None:
        self._call("on_step_end")

    @property
    def leaves_epoch(self) -> bool:
        """Whether a callback asks to leave the rest of an epoch (``should_epoch_stop``) that is not over anyway."""
        return self.control.should_epoch_stop and self._in_epoch and not self.epoch_is_over

    def epoch_end(self) -> None:
        """Ends the epoch, if one has begun."""
        if self._in_epoch:
            self._in_epoch = self.epoch_is_over = False
            self._call("on_epoch_end")

    @contextlib.contextmanager
    def in_epoch_of_last_step(self, is_over: bool) -> Iterator[None]:
        """For the rest of a step that failed in its evaluation: until its end nothing has begun but the step's epoch.

        ``is_over``: whether the epoch ended with the step.
        """
        self._in_epoch = not is_over
        yield
        if self.epoch_is_over:
            self.epoch_end()
        self._in_epoch = False

    def log(self, figures: Mapping[str, Any]) -> None:
        """Appends figures to ``state.log_history``, then hands them to the callbacks. Figures that are None are left
        out: trackers would warn of each."""
        known = {name: value for name, value in figures.items() if value is not None} | {"epoch": self.state.epoch}
        self.state.log_history.append({**known, "step": self.state.global_step})
        self._call("on_log", logs=known)

    def evaluated(self, figures: Mapping[str, Any]) -> None:
        """Logs the figures of an evaluation as ``eval_...``, which trackers show as ``eval/...``, and hands them to
        ``on_evaluate``."""
        named = evaluation_figures(figures)
        self.log(named)
        self._call("on_evaluate", metrics={**named, "epoch": self.state.epoch})

    def saved(self) -> None:
        self._call("on_save")

    def uploading(self) -> None:
        self._call("on_push_begin")

    def best(self, counters: Counters) -> None:
        """Says in ``state`` which evaluation is the best so far."""
        self.state.best_metric, self.state.best_global_step = counters.best, counters.best_step
        if counters.best_step is not None:
            folder = Path(str(self.arguments.output_dir)) / "checkpoints"
            self.state.best_model_checkpoint = str(store.at(folder, counters.best_step))

    def begin(self, counters: Counters, rows: float, epoch: float) -> None:
        """Puts ``state`` where the run is: also the log so far, of a resumed run. ``rows``: of the training set."""
        self.state.global_step, self.state.epoch = counters.step, epoch
        self._in_epoch = self.epoch_is_over = False
        self.state.num_train_epochs = math.ceil(
            self.arguments.max_steps * self.arguments.per_device_train_batch_size / rows
        )
        self.state.log_history = self.recorded()
        self.best(counters)

    def recorded(self) -> list[dict[str, Any]]:
        """The log of all that the run's folder has records of."""
        return recorded(Path(str(self.arguments.output_dir)))

    def check(self) -> None:
        """Raises ConfigError for a callback whose needs the settings do not meet."""
        best = self.arguments.metric_for_best_model
        if any(isinstance(callback, EarlyStoppingCallback) for callback in self.handler.callbacks) and best is None:
            raise ConfigError(
                "callbacks: EarlyStoppingCallback compares evaluations: set eval_steps and metric_for_best_model, such "
                "as reward"
            )


def evaluation_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of an evaluation by the names that Transformers' callbacks read: ``eval_reward`` and so on."""
    return {f"eval_{name}": value for name, value in figures.items() if value is not None}


def recorded(run_dir: Path) -> list[dict[str, Any]]:
    """``state.log_history`` of the steps and evaluations in a run's folder."""
    files = [run_dir / "metrics.jsonl", run_dir / "timings.jsonl"]
    metrics, timings = ({row["step"]: row for row in read_rows(path)[0]} if path.exists() else {} for path in files)
    known = evaluation.read(run_dir)
    evaluated = [{"step": 0, **known["before"]}] if "before" in known else []
    history = []
    for number, row in metrics.items():
        timing = {f"timings/{name}": value for name, value in timings.get(number, {}).items() if name not in OF_STEP}
        history.append({**row, **timing, "step": number + 1})
    for figures in [*evaluated, *known.get("during", [])]:
        own = {name: value for name, value in figures.items() if name != "step"}
        history.append({**evaluation_figures(own), "step": figures["step"]})
    timed = list(timings)
    for entry in history:  # a step whose figures were not finite has no row: the epoch is that of the row before
        last = bisect.bisect_left(timed, entry["step"])
        entry["epoch"] = timings[timed[last - 1]].get("epoch", 0.0) if last else 0.0
    history = [{name: value for name, value in entry.items() if value is not None} for entry in history]
    return sorted(history, key=lambda entry: entry["step"])


class CallbackStates:
    """The states of the callbacks that have one (Transformers' ExportableState), by class name.

    A second callback of the same class is named "Name 2".
    """

    def __init__(self, handler: CallbackHandler) -> None:
        self.handler = handler

    def state_dict(self) -> dict[str, Any]:
        return {name: copy.deepcopy(callback.state()) for name, callback in self._stateful().items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        for name, callback in self._stateful().items():
            for attribute, value in states.get(name, {}).get("attributes", {}).items():
                setattr(callback, attribute, value)

    def check(self) -> None:
        """Raises ConfigError where a callback's state cannot be saved as JSON."""
        for name, state in self.state_dict().items():
            try:
                json.dumps(state, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ConfigError(
                    f"callbacks: the state() of {name} cannot be saved as JSON ({error}); give it only finite numbers, "
                    "texts, lists and mappings"
                ) from error

    def _stateful(self) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for callback in self.handler.callbacks:
            if isinstance(callback, ExportableState):
                name = type(callback).__name__
                before = sum(type(other).__name__ == name for other in named.values())
                named[f"{name} {before + 1}" if before else name] = callback
        return named
