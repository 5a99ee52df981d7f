"""The callback that puts controller, guard and trust region into a TRL trainer."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stable_rlhf.console import tell
from stable_rlhf.control import Action, GuardConfig
from stable_rlhf.errors import ConfigError, StableRLHFError
from stable_rlhf.files import parsed, replace_text
from stable_rlhf.integrations.monitor import RunMonitor
from stable_rlhf.integrations.trl.figures import Figures, check_version, is_unit, kind_of
from stable_rlhf.integrations.trl.last_good import LastGood
from stable_rlhf.integrations.trl.trust_region import TrustRegion

STATE = "safe_state.json"
"""The callback's file in a checkpoint: Transformers makes its own stateful callbacks anew on resume, without what they
were given."""

LEAST_BETA = 1e-6
"""TRL measures no KL with a beta of 0; no reward of unit deviation feels this one."""


class SAFECallback(TrainerCallback):
    """Sets the trainer's beta once a generation, so that its KL stays at a budget, and lets the guard judge the run.

        trainer = GRPOTrainer(...)
        trainer.add_callback(SAFECallback(trainer, budget=0.3))

    A generation is a step: its figures are the means of what TRL measures while it is learned from, and the decision
    holds for the next one. Process 0 decides, the others are told.

    Args:
        trainer: a GRPOTrainer or RLOOTrainer of TRL 1.12 to 1.16, made with any beta but 0.
        budget: KL to the reference that is held, nats per token; None is the controller's own, 0.3 of ``safe``.
        controller, settings, guard: as in `stable_rlhf.RunMonitor`.
        roll_back: whether a failing run goes back to its last good state and continues with smaller steps (`guarded`).
            If not, it is stopped with a checkpoint.
        trust_region: whether what the optimiser steps of a generation move is bounded, by `Decision.update_kl`. Without
            it a learning rate that is too high keeps the KL above its budget, whatever beta is. It takes a copy of the
            trainable weights, two where it acts, and needs them whole in each process: False for DeepSpeed and FSDP,
            and for a controller that bounds no update.
        run_dir: folder of metrics.jsonl and incidents.jsonl; None is ``output_dir/safe`` of the trainer.
        overwrite: whether a run that is there is replaced.

    Raises ConfigError for what cannot work: another trainer or version, a beta of 0, sharded weights with a roll-back.
    """

    def __init__(
        self,
        trainer: Any,
        budget: float | None = None,
        *,
        controller: str = "safe",
        settings: Mapping[str, Any] | None = None,
        guard: GuardConfig | None = None,
        roll_back: bool = False,
        trust_region: bool = True,
        run_dir: str | Path | None = None,
        overwrite: bool = False,
    ) -> None:
        version, kind = check_version(), kind_of(trainer)
        if trust_region and controller != "safe":
            raise ConfigError(
                f"controller={controller!r}: it bounds no update, so the trust region has none; set trust_region=False"
            )
        self._trainer = trainer
        self._figures = Figures(trainer)
        self._guard = guard or GuardConfig()
        self._roll_back = LastGood(trainer) if roll_back else None
        self._trust_region = TrustRegion(trainer) if trust_region else None
        self._generations = self._observed = 0
        self._rest = False
        self._rate = math.nan
        self._beta = trainer.beta
        self._bound: float | None = None
        self.stopped: str | None = None
        """Why the guard stopped the run; None while it has not."""
        args = trainer.args
        self._run_dir = Path(run_dir) if run_dir is not None else Path(args.output_dir) / "safe"
        self.monitor = RunMonitor(
            self._run_dir,
            controller=controller,
            settings={**({} if budget is None else {"budget": budget}), **(settings or {})},
            guard=self._guard,
            units="deviation" if is_unit(trainer) else "reward",
            rolls_back=roll_back,
            overwrite=overwrite,
            about={
                "framework": f"TRL {kind.upper()} with {controller}",
                "trl": version,
                "seed": args.seed,
                "optim": {"learning_rate": args.learning_rate},
            },
        )
        """Of process 0; the others' have no steps."""

    @property
    def _rows(self) -> int:
        """Completions of a generation, of all processes."""
        args = self._trainer.args
        return args.per_device_train_batch_size * args.steps_per_generation * self._trainer.accelerator.num_processes

    @property
    def _each(self) -> int:
        """Micro-steps of a generation."""
        return self._trainer.args.steps_per_generation * self._trainer.num_iterations

    @property
    def _main(self) -> bool:
        return self._trainer.accelerator.is_main_process

    # -- events, in the order in which they come --------------------------------------------------------------------

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Begins the run's files; continues from the checkpoint that the trainer was resumed from."""
        self.stopped, self._generations, self._observed = None, self._trainer._step // self._each, 0
        self._rest = self._trainer._step % self._each > 0  # TRL first ends the generation of the call before
        self._figures.collect()
        self._forget()
        self._from_main(lambda: self._begin(state))
        self._tell_all()
        if self._roll_back is not None:
            self._roll_back.keep(self.monitor.state_dict())
            self._roll_back.judge(suspect=False)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._rate = float(self._trainer.optimizer.param_groups[0]["lr"])
        if self._trust_region is not None and self._bound is not None and not self._trust_region.begun:
            self._trust_region.begin()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trust_region is not None and self._bound is not None and self._trust_region.begun:
            self._trust_region.hold(self._bound)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Collects figures; after the last optimiser step of a generation, decides and acts."""
        self._figures.collect()
        done = self._trainer._step // self._each
        if done == self._generations:
            return
        self._generations = done
        if self._rest:
            self._rest = False
            self._forget()
            return
        found = self._figures.take()
        action, suspect, words = self._from_main(lambda: self._seen(found, state))
        self._act(action, suspect, words, control)
        if self._trust_region is not None:
            self._trust_region.end()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves the monitor's state in the checkpoint that was just written."""
        if self._main:
            saved = {"run": _digest(state), "monitor": self.monitor.state_dict()}
            replace_text(self._file(state.global_step), json.dumps(saved, allow_nan=False) + "\n")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._main:
            self.monitor.close()

    def _forget(self) -> None:
        """Drops what is known of a generation that is not whole."""
        self._figures.take()
        if self._trust_region is not None:
            self._trust_region.end()

    # -- what they do ------------------------------------------------------------------------------------------------

    def _file(self, step: int) -> Path:
        return Path(self._trainer.args.output_dir) / f"checkpoint-{step}" / STATE

    def _begin(self, state: TrainerState) -> None:
        if state.global_step > 0:
            self._load(state)
        self.monitor.begin()

    def _load(self, state: TrainerState) -> None:
        step, file = state.global_step, self._file(state.global_step)
        if not file.is_file():
            raise ConfigError(
                f"{file} does not exist, so the controller's state at step {step} is not known: resume from a "
                "checkpoint of output_dir that was saved with SAFECallback, or begin anew"
            )
        try:
            saved = parsed(file.read_bytes())
            of, monitor = saved["run"], saved["monitor"]
            self.monitor.load_state_dict(monitor)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{file}: {error}; resume from another checkpoint") from error
        if of != _digest(state):
            raise ConfigError(
                f"{file} is of another run than the checkpoint that is resumed from: resume from {file.parent}, or set "
                "output_dir to the folder of the other run"
            )

    def _seen(self, found: Mapping[str, float | None], state: TrainerState) -> tuple[Action, bool, str]:
        """Observes, in process 0: (what the guard asks for, whether the step is suspect, why)."""
        reward, kl, entropy = (found[name] for name in ("reward", "kl", "entropy"))
        if reward is None or kl is None or entropy is None:
            lacking = next(name for name in ("reward", "kl", "entropy") if found[name] is None)
            raise ConfigError(f"the trainer measured no {lacking} in this generation: take the callback out of it")
        masked = getattr(self._trainer.args, "mask_truncated_completions", False)
        if math.isnan(reward) or (masked and found["completions/clipped_ratio"] == 1.0):
            what = "no completion was scored" if math.isnan(reward) else "every completion was cut off and left out"
            tell(f"step {state.global_step}: {what}; SAFE keeps beta as it is")
            return Action.GO_ON, False, ""
        region, std = self._trust_region, found["reward_std"]
        moved = {} if region is None else {"safe/moved_kl": region.moved, "safe/step_scale": region.scale}
        seen = self.monitor.observe(
            reward,
            kl,
            entropy,
            length=found["completions/mean_length"],
            reward_std=None if std is None else std * math.sqrt(1 - 1 / self._rows),  # TRL divides by n - 1
            rows=self._rows,
            figures={"completions/distinct_2": found["distinct_2"], "lr": self._rate, **moved},
        )
        return seen.verdict.action, seen.verdict.suspect, seen.reason

    def _act(self, action: Action, suspect: bool, words: str, control: TrainerControl) -> None:
        """Does what the guard asks for and sets beta, in every process alike."""
        self._observed += 1
        if self._roll_back is not None:
            if action is Action.ROLL_BACK:
                saved = self._roll_back.restore(self._guard.rollback_factor)
                self._from_main(lambda: self.monitor.rolled_back(saved))
            else:
                self._roll_back.judge(suspect)
                if not suspect and self._observed % self._guard.snapshot_steps == 0:
                    self._roll_back.keep(self.monitor.state_dict())
        if action is Action.STOP:
            self.stopped = words
            if self._main:
                tell(f"SAFE's guard stops the run at a checkpoint: {words}")
            control.should_save = control.should_training_stop = True
        self._tell_all()

    def _tell_all(self) -> None:
        """Gives process 0's coefficient and bound to all, and to the trainer's log. Without a decision beta is the
        trainer's own."""
        coefficient, self._bound = self._from_main(
            lambda: (self.monitor.coefficient if self.monitor.decided else None, self.monitor.update_kl)
        )
        self._trainer.beta = self._beta if coefficient is None else max(LEAST_BETA, coefficient)
        if coefficient is not None:
            self._trainer._metrics["train"]["beta"].append(self._trainer.beta)

    def _from_main(self, ask: Callable[[], Any]) -> Any:
        """What process 0 answers, in every process; an error of its is raised in all, so that none waits."""
        if self._trainer.accelerator.num_processes == 1:
            return ask()
        told: list[Any] = [None, None]
        if self._main:
            try:
                told[0] = ask()
            except (StableRLHFError, ValueError, OSError) as error:
                told[1] = str(error)
        broadcast_object_list(told, from_process=0)
        if told[1] is not None:
            raise ConfigError(told[1])
        return told[0]


def _digest(state: TrainerState) -> str:
    """Of the trainer's log: which run a checkpoint is of."""
    return hashlib.sha256(json.dumps([state.global_step, state.log_history], sort_keys=True).encode()).hexdigest()


def guarded(trainer: Any, budget: float | None = None, **options: Any) -> Any:
    """The trainer with a `SAFECallback` that takes a failing run back to its last good state, with smaller steps.

    The state (trainable weights, the optimiser's) is kept in the host's memory. ``options``: of SAFECallback.
    """
    trainer.add_callback(SAFECallback(trainer, budget, roll_back=True, **options))
    return trainer


def safe_trainer(trainer_class: type[Any], budget: float | None = None, **options: Any) -> type[Any]:
    """A subclass of GRPOTrainer or RLOOTrainer whose trainers are `guarded` from the start.

    Its arguments are those of ``trainer_class``. ``options``: of SAFECallback.
    """

    def __init__(self: Any, *args: Any, **more: Any) -> None:
        trainer_class.__init__(self, *args, **more)
        self.safe = SAFECallback(self, budget, **{"roll_back": True, **options})
        self.add_callback(self.safe)

    return type(f"SAFE{trainer_class.__name__}", (trainer_class,), {"__init__": __init__})
