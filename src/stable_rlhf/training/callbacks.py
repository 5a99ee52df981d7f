"""Transformers' callbacks: calling them, and their states as a part of the run."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState

from stable_rlhf.config import Config
from stable_rlhf.errors import ConfigError
from stable_rlhf.user_code import RandomStream, Shield


def callback_arguments(config: Config, run_dir: Path, on_cpu: bool) -> TrainingArguments:
    """The ``args`` that callbacks receive.

    They switch off logging, saving and evaluation, whose times the loop decides; a callback may ask for a save or a
    stop.
    """
    return TrainingArguments(
        output_dir=str(run_dir),
        max_steps=config.max_steps,
        seed=config.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to=config.log.report_to or "none",
        use_cpu=on_cpu,
    )


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
        stream = RandomStream(self.seed, zlib.crc32(event.encode()), state.global_step)
        with self.shield.around(stream):
            return super().call_event(event, args, state, control, **kwargs)


def callback_handler(
    shield: Shield,
    seed: int,
    trackers: list[str],
    callbacks: Sequence[TrainerCallback],
    model: Any,
    tokenizer: Any,
    optimizer: Any,
    scheduler: Any,
) -> CallbackHandler:
    """A handler that calls the trackers, then the user's callbacks, in the order given."""
    reporting = get_reporting_integration_callbacks(trackers)
    called = [DefaultFlowCallback, *reporting, *callbacks]
    return ShieldedCallbacks(shield, seed, called, model, tokenizer, optimizer, scheduler)


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
