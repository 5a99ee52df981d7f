"""The callback that puts controller, guard and trust region into a TRL trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stable_rlhf.console import tell
from stable_rlhf.control import Action, GuardConfig
from stable_rlhf.errors import ConfigError
from stable_rlhf.integrations.monitor import RunMonitor, Seen
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
        budget: KL to the reference that is held, nats per token; of the controllers ``safe``, ``adaptive`` and others
            that have one, see docs/algorithm.md.
        controller, settings, guard: as in `stable_rlhf.RunMonitor`.
        roll_back: whether a failing run goes back to its last good state and continues with smaller steps (`guarded`).
            If not, it is stopped with a checkpoint.
        trust_region: whether what the optimiser steps of a generation move is bounded, by `Decision.update_kl`. Without
            it a learning rate that is too high keeps the KL above its budget, whatever beta is. It takes a copy of the
            trainable weights, and needs them whole in each process: False for DeepSpeed and FSDP.
        run_dir: folder of metrics.jsonl and incidents.jsonl; None is ``output_dir/safe`` of the trainer.
        overwrite: whether a run that is there is replaced.

    Raises ConfigError for what cannot work: another trainer or version, a beta of 0, sharded weights with a roll-back.
    """

    def __init__(
        self,
        trainer: Any,
        budget: float = 0.3,
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
        self._trainer = trainer
        self._figures = Figures(trainer)
        self._guard = guard or GuardConfig()
        self._roll_back = LastGood(trainer) if roll_back else None
        self._trust_region = TrustRegion(trainer) if trust_region else None
        self._generations = 0
        self._bound: float | None = None
        self.stopped: str | None = None
        """Why the guard stopped the run; None while it has not."""
        args = trainer.args
        self._run_dir = Path(run_dir) if run_dir is not None else Path(args.output_dir) / "safe"
        self.monitor = RunMonitor(
            self._run_dir,
            controller=controller,
            settings={"budget": budget, **(settings or {})},
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
        self.stopped, self._generations = None, self._trainer._step // self._each
        if self._main:
            if state.global_step > 0:
                self._load(state.global_step)
            self.monitor.begin()
        self._tell_all()
        if self._roll_back is not None:
            self._roll_back.keep(self.monitor.state_dict())
            self._roll_back.judge(suspect=False)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trust_region is not None and self._bound is not None and not self._trust_region.begun:
            self._trust_region.begin()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._trust_region is not None and self._bound is not None:
            self._trust_region.hold(self._bound)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Collects figures; after the last optimiser step of a generation, decides and acts."""
        self._figures.collect()
        done = self._trainer._step // self._each
        if done == self._generations:
            return
        self._generations = done
        found = self._figures.take()
        seen = self._seen(found, state)
        self._act(seen, control)
        if self._trust_region is not None:
            self._trust_region.end()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Saves the monitor's state in the checkpoint that was just written."""
        if self._main:
            self.monitor.save(self._file(state.global_step))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._main:
            self.monitor.close()

    # -- what they do ------------------------------------------------------------------------------------------------

    def _file(self, step: int) -> Path:
        return Path(self._trainer.args.output_dir) / f"checkpoint-{step}" / STATE

    def _load(self, step: int) -> None:
        file = self._file(step)
        if not file.is_file():
            raise ConfigError(
                f"{file} does not exist, so the controller's state at step {step} is not known: resume from a "
                "checkpoint of output_dir that was saved with SAFECallback, or begin anew"
            )
        self.monitor.load(file)

    def _seen(self, found: Mapping[str, float | None], state: TrainerState) -> Seen | None:
        """Process 0 observes; None elsewhere, and where no completion could be scored."""
        reward, kl, entropy = (found[name] for name in ("reward", "kl", "entropy"))
        if not self._main:
            return None
        if reward is None or kl is None or entropy is None:
            lacking = next(name for name in ("reward", "kl", "entropy") if found[name] is None)
            raise ConfigError(f"the trainer has measured no {lacking} in this generation: its TRL is not supported")
        if math.isnan(reward) and math.isfinite(kl) and math.isfinite(entropy):
            tell(f"step {state.global_step}: no completion was scored; SAFE keeps beta as it is")
            return None
        region, std = self._trust_region, found["reward_std"]
        moved = {} if region is None else {"safe/moved_kl": region.moved, "safe/step_scale": region.scale}
        return self.monitor.observe(
            reward,
            kl,
            entropy,
            length=found["completions/mean_length"],
            reward_std=None if std is None else std * math.sqrt(1 - 1 / self._rows),  # TRL divides by n - 1
            rows=self._rows,
            figures={"completions/distinct_2": found["distinct_2"], "lr": _rate(self._trainer), **moved},
        )

    def _act(self, seen: Seen | None, control: TrainerControl) -> None:
        """Sets beta, and does what the guard asks for, in every process alike."""
        action, words = self._from_main((seen.verdict.action, seen.reason) if seen is not None else (Action.GO_ON, ""))
        if self._roll_back is not None:
            if action is Action.ROLL_BACK:
                saved = self._roll_back.restore(self._guard.rollback_factor)
                if self._main:
                    self.monitor.rolled_back(saved)
            else:
                suspect = self._from_main(seen is not None and seen.verdict.suspect)
                self._roll_back.judge(suspect)
                if not suspect and self._generations % self._guard.snapshot_steps == 0:
                    self._roll_back.keep(self.monitor.state_dict())
        if action is Action.STOP:
            self.stopped = words
            if self._main:
                tell(f"SAFE's guard stops the run at a checkpoint: {words}")
            control.should_save = control.should_training_stop = True
        self._tell_all()

    def _tell_all(self) -> None:
        """Gives process 0's coefficient and bound to all, and to the trainer's log."""
        known = self.monitor.coefficient if self.monitor.steps else None
        coefficient, self._bound = self._from_main((known, self.monitor.update_kl))
        if coefficient is not None:
            self._trainer.beta = max(LEAST_BETA, coefficient)
            self._trainer._metrics["train"]["beta"].append(self._trainer.beta)

    def _from_main(self, value: Any) -> Any:
        """Process 0's value, in every process."""
        if self._trainer.accelerator.num_processes == 1:
            return value
        told = [value]
        broadcast_object_list(told, from_process=0)
        return told[0]


def _rate(trainer: Any) -> float:
    return float(trainer.optimizer.param_groups[0]["lr"])


def guarded(trainer: Any, budget: float = 0.3, **options: Any) -> Any:
    """The trainer with a `SAFECallback` that takes a failing run back to its last good state, with smaller steps.

    The state (trainable weights, the optimiser's) is kept in the host's memory. ``options``: of SAFECallback.
    """
    trainer.add_callback(SAFECallback(trainer, budget, roll_back=True, **options))
    return trainer


def safe_trainer(trainer_class: type[Any], budget: float = 0.3, **options: Any) -> type[Any]:
    """A subclass of GRPOTrainer or RLOOTrainer whose trainers are `guarded` from the start.

    Its arguments are those of ``trainer_class``. ``options``: of SAFECallback.
    """

    def __init__(self: Any, *args: Any, **more: Any) -> None:
        trainer_class.__init__(self, *args, **more)
        self.safe = SAFECallback(self, budget, **{"roll_back": True, **options})
        self.add_callback(self.safe)

    return type(f"SAFE{trainer_class.__name__}", (trainer_class,), {"__init__": __init__})
