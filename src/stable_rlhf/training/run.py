"""The parts of a run: how they are made, begun, saved, resumed and rolled back."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState
from transformers import get_scheduler as make_scheduler

from stable_rlhf.checkpoints import (
    OptimizerState,
    Part,
    RandomState,
    Snapshots,
    Tensors,
    capture,
    restore,
    store,
)
from stable_rlhf.config import Config, complete_settings, given_in_python, settings_text
from stable_rlhf.console import Progress, tell
from stable_rlhf.control import Guard, RewardNormaliser, controller_of
from stable_rlhf.data import PromptEncoder, split_datasets
from stable_rlhf.errors import ConfigError
from stable_rlhf.files import replace_text
from stable_rlhf.hardware import described, refuse_many_processes, replays_graphs, shortage_named
from stable_rlhf.learner import AdaptiveRate, Learning, make_passes, make_preview, optimizer_groups
from stable_rlhf.policy import (
    ActorCritic,
    Reference,
    TrainedState,
    check_checkpointing,
    context_length,
    embedding_rows,
    end_token_ids,
    given_policy,
    load_policy,
    load_tokenizer,
    pad_within,
    prepare_tokenizer,
    save_description,
)
from stable_rlhf.rollout import Decoder, Sampler
from stable_rlhf.runs import MetricsWriter, RunLock, evaluation, incidents, remove_run, starts
from stable_rlhf.text import counted
from stable_rlhf.training.arguments import KnownArguments, check_arguments
from stable_rlhf.training.callbacks import CallbackStates, Events, callback_arguments
from stable_rlhf.training.fingerprints import SameInputs
from stable_rlhf.training.given import as_given, check_asked, check_columns, check_held_out, check_named, probe_servers
from stable_rlhf.training.hub import prepare_upload
from stable_rlhf.training.prompts import encoded
from stable_rlhf.training.recovery import STAYS, Recovery
from stable_rlhf.training.resume import Counters, SameSettings, forget_after
from stable_rlhf.training.scoring import GivenRewards, make_scorers
from stable_rlhf.training.stopping import GracefulStop
from stable_rlhf.training.texts import Texts
from stable_rlhf.user_code import RunRandom, Shield


class Run(KnownArguments):
    """Everything that a run consists of. `SAFETrainer`, which documents the arguments, adds the loop."""

    @shortage_named("loading")
    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Config | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Sequence[Any] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        peft_config: LoraConfig | None = None,
        gold_funcs: Any = None,
        gold_processing_classes: Sequence[Any] | None = None,
    ) -> None:
        refuse_many_processes()
        rewards = GivenRewards(reward_funcs, reward_processing_classes, gold_funcs, gold_processing_classes)
        check_arguments(model, rewards, args, processing_class, callbacks, peft_config)
        model = str(model) if isinstance(model, Path) else model
        self.args = config = as_given(args or Config(), model, reward_funcs, train_dataset, peft_config, gold_funcs)
        check_named(config, model)
        probe_servers(config)
        self.controller = controller_of(config.kl.settings)
        self.normaliser = RewardNormaliser(config.reward.normalise)
        train, held_out = split_datasets(config.data, config.seed, train_dataset, eval_dataset)
        check_held_out(config, held_out)
        check_columns(config, getattr(train, "dataset", None))  # of a stream they show with its rows
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.processing_class = (
            prepare_tokenizer(processing_class) if processing_class else load_tokenizer(config.model)
        )
        of = (config.model, peft_config)
        policy, low = load_policy(*of) if isinstance(model, str) else given_policy(model, *of)
        if (padding := pad_within(self.processing_class, embedding_rows(policy))) is not None:
            tell(padding)
        tried = config.model.self_check
        self.model = ActorCritic(policy, config.critic, autocast=low, self_check=tried)
        if tried and config.model.gradient_checkpointing:
            check_checkpointing(self.model)
        learning = Learning(
            optim=config.optim,
            critic=config.critic,
            kl=config.kl,
            temperature=config.rollout.temperature,
            num_generations=config.rollout.num_generations,
            max_completion_length=config.rollout.max_completion_length,
            seed=config.seed,
        )
        self.passes = make_passes(self.model, config.model, learning)
        self.preview = make_preview(self.passes)
        self._stop = GracefulStop()
        self.shield = Shield(self.model.dropout_off)
        self.scorer, self.gold = make_scorers(
            config, rewards, self.model, self.shield, stopping=self._stop.asked, trainer_state=lambda: self.state
        )
        check_asked(self.scorer, train, held_out)
        check_asked(self.gold, held_out)
        self.sampler = Sampler(
            tokenizer=self.processing_class,
            scorer=self.scorer,
            config=config.rollout,
            eos_token_ids=end_token_ids(policy, self.processing_class, config.rollout.stop_tokens or ()),
            decoder=Decoder(
                self.model,
                cuda_graphs=replays_graphs(config.model.cuda_graphs, self.model.device),
                torch_compile=config.model.torch_compile,
                self_check=tried,
            ),
        )
        encoder = PromptEncoder(
            self.processing_class,
            max_prompt_length=config.data.max_prompt_length,
            context_length=context_length(policy),
            max_completion_length=config.rollout.max_completion_length,
            vocabulary=embedding_rows(policy),
        )
        prompts = encoded(train, held_out, encoder, ahead=config.rollout.prompts, seed=config.seed)
        self.train_dataset, self.train_prompts, self.stream = prompts.train, prompts.train_prompts, prompts.stream
        self.eval_dataset, self.eval_prompts = prompts.held_out, prompts.held_out_prompts
        self.rows = prompts.rows
        prompts.say_turn_end(self.processing_class, self.sampler.eos_token_ids)
        self.optimizer = torch.optim.AdamW(optimizer_groups(self.model, config.optim, config.critic), fused=True)
        course = config.optim.lr_scheduler_type
        course = "constant_with_warmup" if course == "constant" else course  # Transformers' `constant` never warms up
        self.scheduler: Any = make_scheduler(course, self.optimizer, config.optim.warmup_steps, config.max_steps)
        self.run_dir = Path(config.output_dir or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.counters = Counters()
        self.adaptive_rate = AdaptiveRate(config.optim.adaptive_kl)
        self.guard = Guard(config.guard)
        snapshots = Snapshots(None if self.model.peft else self.run_dir / "snapshot")
        self.recovery = Recovery(self.guard, snapshots, Texts(self.scorer, config.seed))
        self.reference = Reference(self.model)
        self.inputs = SameInputs(
            self.processing_class, prompts.whole, self.scorer, self.gold, config.reward.accept_changed
        )
        self._lock = RunLock(self.run_dir)
        self._console = Console(quiet=not config.log.progress)
        self.events = Events(
            callback_arguments(config, self.settings, self.run_dir, on_cpu=self.model.device.type == "cpu"),
            callbacks or [],
            shield=self.shield,
            model=self.model.policy,
            tokenizer=self.processing_class,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
        )
        self.callback_states = CallbackStates(self.events.handler)
        self._progress: Progress | None = None
        self._began, self._saved_at = False, -1
        self._to_log: dict[str, Any] | None = None  # of the last step, until the callbacks are given it
        # Of the last evaluation in training: steps done, figures, samples.
        self._evaluated: tuple[int, dict[str, Any], list[dict[str, Any]]] | None = None
        self._random = RandomState().state_dict()  # where `train` begins, whatever is drawn until then
        self.events.init_end()

    @property
    def steps_done(self) -> int:
        """Steps that the run has made, those that were rolled back included."""
        return self.counters.step

    @property
    def epoch(self) -> float:
        """Passes over the training rows so far; whole ones of a stream."""
        return self.stream.passes

    @property
    def state(self) -> TrainerState:
        """What callbacks see of the run."""
        return self.events.state

    @property
    def control(self) -> TrainerControl:
        """What callbacks ask of the run: to log, evaluate, save or stop."""
        return self.events.control

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.events.handler.add_callback(callback)

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the run, the controller's included, as config.yaml and the checkpoints hold it."""
        return complete_settings(self.args, self.run_dir)

    @property
    def parts(self) -> dict[str, Part]:
        """Everything that the run's future depends on, by name. The first three only check that the run is the same."""
        return {
            "reference": self.reference,
            "settings": SameSettings(lambda: self.settings),
            "inputs": self.inputs,
            "model": TrainedState(self.model),
            "optimizer": OptimizerState(self.optimizer),
            "scheduler": self.scheduler,
            "controller": self.controller,
            "normaliser": self.normaliser,
            "guard": self.guard,
            "texts": self.recovery.texts,
            **({} if self.preview is None else {"preview": self.preview}),
            **({} if self.args.optim.adaptive_kl is None else {"adaptive_rate": self.adaptive_rate}),
            "prompts": self.stream,
            "callbacks": self.callback_states,
            "counters": self.counters,
            "random": RunRandom(self.shield),
            "reward_random": self.scorer.random,
            **({} if self.scorer.ensemble is None else {"reward_units": self.scorer.ensemble}),
        }

    def _parts_named(self, *names: str) -> dict[str, Part]:
        return {name: self.parts[name] for name in names}

    # -- begin and end ------------------------------------------------------------------------------------------------

    def begin(self, resume_from_checkpoint: bool | str | Path | None = None) -> None:
        """Makes the run folder, or loads the checkpoint to resume from."""
        self._lock.take()
        self.callback_states.check()
        self.events.check()
        self.repository = prepare_upload(self.args, self.run_dir)
        if self.args.overwrite_output_dir and not resume_from_checkpoint:
            if self.steps_done:  # the run in the folder is this trainer's own, and its policy is no longer the first
                raise ConfigError(
                    f"this trainer has already done {counted(self.steps_done, 'step')}: resume with "
                    "train(resume_from_checkpoint=True), or make a new SAFETrainer to replace the run"
                )
            remove_run(self.run_dir)  # last, so that whatever is refused above costs no run
        self.writer = MetricsWriter(self.run_dir)
        if resume_from_checkpoint:
            self._resume(resume_from_checkpoint)
        elif (self.run_dir / "metrics.jsonl").exists() or store.found(self.run_dir / "checkpoints"):
            command = f"`stable-rlhf resume {self.run_dir}`"
            how = command if given_in_python(self.settings) is None else "train(resume_from_checkpoint=True)"
            raise ConfigError(
                f"output_dir={str(self.run_dir)!r}: holds a run already; resume it with {how}, set "
                "overwrite_output_dir to replace it, or choose another folder"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        save_description(self.model, self.processing_class, self.run_dir / "model")
        # Written again by a resume, which may train longer.
        replace_text(self.run_dir / "config.yaml", settings_text(self.settings))
        if not resume_from_checkpoint:
            RandomState().load_state_dict(self._random)
            incidents.truncate(self.run_dir, 0)  # of a run that was never saved
            self.recovery.begin(*capture(self.parts, self.steps_done))
        digests = {**self.inputs.digests(), "model": self.reference.fingerprint}
        starts.record(self.run_dir, self.steps_done, described(self.model.device), digests)
        self.events.begin(self.counters, self.rows, self.epoch)
        self._to_log = self._evaluated = None
        self._saved_at = self.steps_done if resume_from_checkpoint else -1

    def end(self) -> None:
        """Releases the run folder, drops the snapshots; a run that has ended is resumed from a checkpoint."""
        self.recovery.end()
        self._lock.release()
        self._began, self._progress = False, None

    def _resume(self, chosen: bool | str | Path) -> None:
        """Loads a checkpoint, and removes everything of later steps from the run folder."""
        checkpoints = self.run_dir / "checkpoints"
        path, damaged = store.newest(checkpoints) if chosen is True else (Path(str(chosen)), list[str]())
        for fault in damaged:
            tell(f"{fault}: skipped, the run resumes from step {store.steps_of(path)}")
        with store.restoring(path):
            tensors, state = self.load_checkpoint(path)
        if path.resolve().parent != checkpoints.resolve():
            raise ConfigError(
                f"resume_from_checkpoint={str(path)!r}: set output_dir to the run that the checkpoint belongs to"
            )
        if self.steps_done > self.args.max_steps:
            raise ConfigError(
                f"max_steps={self.args.max_steps}: the run has already done {counted(self.steps_done, 'step')}; give "
                "that many or more, or resume from an older checkpoint"
            )
        forget_after(self.run_dir, self.writer, self.steps_done)
        self.recovery.resume(tensors, state)
        if self.steps_done < self.args.max_steps:  # the final model is no longer the last
            shutil.rmtree(self.run_dir / "final", ignore_errors=True)
        evaluation.forget_after(self.run_dir, self.steps_done)

    def save_checkpoint(self) -> Path:
        """Saves everything the run's future depends on in run_dir/checkpoints/step-<steps done>; returns its path.

        The last good state of the guard is included. Raises SaveError.
        """
        tensors, state = capture(self.parts, self.steps_done)
        self.recovery.snapshots.into(tensors, state)
        kept, best = self.args.save_total_limit, self.counters.best_step
        path = store.save(self.run_dir / "checkpoints", self.steps_done, tensors, state, kept, best)
        self._saved_at = self.steps_done
        self.events.saved()
        return path

    def load_checkpoint(self, path: Path) -> tuple[Tensors, dict[str, Any]]:
        """Restores the run from a checkpoint; returns the checkpoint's content. Raises CheckpointError."""
        tensors, state = store.load(path)
        restore(self.parts, tensors, state)
        self.set_learning_rates()
        return tensors, state

    def _roll_back(self) -> int:
        """Restores the last good state byte for byte, except the parts in `recovery.STAYS`.

        Returns the steps done in that state. Raises CheckpointError where it cannot be read; nothing is changed then.
        """
        tensors, state = self.recovery.snapshots.load()
        restore({name: part for name, part in self.parts.items() if name not in STAYS}, tensors, state)
        self.guard.roll_back(state["parts"]["guard"])
        self.recovery.suspect = False
        self.scheduler.last_epoch = self.steps_done  # a step that broke off did not move it
        self.controller.next_step = self.steps_done
        self.set_learning_rates()
        return state["step"]

    def set_learning_rates(self) -> None:
        """Sets each rate to base x schedule of the present max_steps x the factors of roll-backs and `AdaptiveRate`."""
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            scheduled = base * self.scheduler.lr_lambdas[0](self.scheduler.last_epoch)
            group["lr"] = scheduled * self.recovery.factor * self.adaptive_rate.factor
