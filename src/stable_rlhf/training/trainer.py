"""The loop: SAFETrainer."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from peft import LoraConfig
from rich.console import Console
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import get_scheduler as make_scheduler
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

from stable_rlhf.checkpoints import (
    Tensors,
    callbacks_of,
    capture,
    check_callbacks,
    load_random_state,
    put_callbacks,
    random_state,
    restore,
    store,
)
from stable_rlhf.config import Config, complete_settings
from stable_rlhf.console import Progress, said_if_lost, tell
from stable_rlhf.control import controller_of
from stable_rlhf.control.normaliser import RewardNormaliser
from stable_rlhf.data import EncodedPrompts, PromptStream, encode_prompts, split_datasets
from stable_rlhf.errors import ConfigError, DivergenceError, Interrupted, RewardError
from stable_rlhf.files import replace_text
from stable_rlhf.hardware import refuse_many_processes, replays_graphs
from stable_rlhf.learner import (
    Learning,
    check_finite,
    make_batch,
    make_passes,
    make_preview,
    measure,
    observe,
    optimizer_groups,
    rollout_metrics,
    update,
)
from stable_rlhf.policy import (
    ActorCritic,
    context_length,
    eos_token_ids,
    given_policy,
    load_policy,
    load_tokenizer,
    prepare_tokenizer,
)
from stable_rlhf.rewards import make_scorer
from stable_rlhf.rollout import Decoder, Sampler
from stable_rlhf.runs import MetricsWriter, RunLock, evaluation, incidents, write_completions
from stable_rlhf.training.evaluate import evaluate
from stable_rlhf.training.given import as_given
from stable_rlhf.training.recovery import Recovery, forget_after
from stable_rlhf.training.step import completion_rows, decision_metrics
from stable_rlhf.training.stopping import GracefulStop


class SAFETrainer:
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
        reward_processing_classes: a tokenizer for each reward model given as an object, None elsewhere.
        callbacks: ``transformers.TrainerCallback`` objects.
        peft_config: adapter for a model that has none.

    Raises ConfigError, PromptError or RewardError, with a remedy, before anything is written.
    """

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
    ) -> None:
        refuse_many_processes()
        model = str(model) if isinstance(model, Path) else model
        self.args = config = as_given(args or Config(), model, reward_funcs, train_dataset)
        self.controller = controller_of(config.kl.settings)
        self.normaliser = RewardNormaliser(config.reward.normalise)
        train_dataset, eval_dataset = split_datasets(config, train_dataset, eval_dataset)
        random.seed(config.seed)
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        named = isinstance(model, str)
        self.processing_class = (
            prepare_tokenizer(processing_class) if processing_class else load_tokenizer(config.model)
        )
        policy, low = (
            load_policy(config.model, peft_config) if named else given_policy(model, config.model, peft_config)
        )
        self.model = ActorCritic(policy, config.critic, autocast=low)
        learning = Learning(
            optim=config.optim,
            critic=config.critic,
            kl=config.kl,
            temperature=config.rollout.temperature,
            seed=config.seed,
        )
        self.passes = make_passes(self.model, config.model, learning)
        self.preview = make_preview(self.passes)
        self._stop = GracefulStop()
        self.scorer = make_scorer(
            config, reward_funcs, reward_processing_classes, self.model.device, stopping=self._stop.asked
        )
        self.sampler = Sampler(
            tokenizer=self.processing_class,
            scorer=self.scorer,
            config=config.rollout,
            eos_token_ids=eos_token_ids(policy, self.processing_class),
            decoder=Decoder(
                self.model,
                cuda_graphs=replays_graphs(config.model.cuda_graphs, self.model.device),
                torch_compile=config.model.torch_compile,
            ),
        )
        self.train_dataset, self.train_prompts = train_dataset, self._encode(train_dataset)
        self.eval_dataset = eval_dataset
        self.eval_prompts = None if eval_dataset is None else self._encode(eval_dataset)
        self.stream = PromptStream(len(train_dataset), config.seed)
        self.optimizer = torch.optim.AdamW(optimizer_groups(self.model, config.optim, config.critic), fused=True)
        course = config.optim.lr_scheduler_type
        course = "constant_with_warmup" if course == "constant" else course  # Transformers' `constant` never warms up
        self.scheduler: Any = make_scheduler(course, self.optimizer, config.optim.warmup_steps, config.max_steps)
        self.run_dir = Path(config.output_dir or f"runs/{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.step, self.episode = 0, 0
        self.recovery, self.fingerprint = Recovery(self), self.model.reference_fingerprint()
        self._lock = RunLock(self.run_dir)
        self._console = Console(quiet=not config.log.progress)
        self._set_up_callbacks(callbacks)
        self._random = random_state()  # where `train` begins, whatever is drawn until then

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | Path | None = None) -> dict[str, Any]:
        """Trains to ``args.max_steps`` and returns the evaluation before and after (evaluation.json).

        ``resume_from_checkpoint``: a checkpoint's folder, or True for the newest whole one of the run; the run then
        goes on as if it had never stopped.

        SIGINT and SIGTERM end the run after the step in hand, with a checkpoint, and at once where there is none in
        hand: Interrupted is raised. Raises GuardStop where the guard gives the run up, RewardError where no reward can
        be had; both with a checkpoint once the first step has begun.
        """
        try:
            with self._stop as stop:
                self._open_run(resume_from_checkpoint)
                self.state.max_steps, self.state.global_step = self.args.max_steps, self.step
                self.control = self.handler.on_train_begin(self._arguments, self.state, self.control)
                progress = Progress(self.args.max_steps, first_step=self.step, console=self._console)
                with progress, stop.waiting():
                    while self.step < self.args.max_steps and not self.control.should_training_stop:
                        row = self._train_step()
                        if row is not None:
                            progress.update(row)
                        saved = self._after_step(row)
                        if stop.signum is not None:
                            if saved is None:
                                self.save_checkpoint()
                            raise Interrupted(stop.signum)
                self.save_final()
                result = self._evaluate_into("after")
                self.control = self.handler.on_train_end(self._arguments, self.state, self.control)
                return result
        finally:
            self.recovery.end()
            self._lock.release()

    def _train_step(self) -> dict[str, Any] | None:
        """One rollout, what is learned from it and what the guard says of it; returns its row of metrics.jsonl, None
        where a figure is not finite (then there is none)."""
        boundary = self.stream.state_dict(), random_state(), callbacks_of(self)
        self.control = self.handler.on_step_begin(self._arguments, self.state, self.control)
        try:
            row, scored = self._learn()
        except RewardError as error:  # nothing has been learned from this rollout: the run goes on from before it
            self.stream.load_state_dict(boundary[0])
            load_random_state(*boundary[1])
            put_callbacks(self, boundary[2])
            with said_if_lost(error):
                self.save_checkpoint()
            raise
        except DivergenceError as error:
            if not self.args.guard.enabled:
                raise
            row, figures = None, error.figures
        else:
            figures = {name: value for name, value in row.items() if not isinstance(value, str)} | {"rows": scored}
        self.step += 1
        self.recovery.judge(figures)
        return row

    def _learn(self) -> tuple[dict[str, Any], int]:
        """(the step's row, written already; completions that had a reward). Raises DivergenceError for a figure that is
        not finite, before anything is written."""
        started, step, config = time.perf_counter(), self.step, self.args
        indices = self.stream.take(config.rollout.batch_size)
        rollout, timing = self.sampler.collect(self.train_dataset, self.train_prompts, indices)
        sampled = time.perf_counter()
        measured = measure(self.passes, rollout, step)
        known = time.perf_counter()
        self.episode += len(indices)
        decision = self.controller.observe(observe(step, rollout, measured))  # before the update
        self.normaliser.update([s for s, v in zip(rollout.scores, rollout.valid, strict=True) if v])
        scores = self.normaliser.normalise(rollout.scores)
        batch, batch_metrics = make_batch(self.model, measured, scores, decision, self.passes.learning)
        check_finite(step, batch_metrics)
        learning_rates = [group["lr"] for group in self.optimizer.param_groups]
        decided = time.perf_counter()
        stats = update(self.passes, self.optimizer, batch, decision, step, self.preview)
        learned = time.perf_counter()
        check_finite(step, stats.metrics | {"the norm of the weights": self.model.norm()})
        if stats.metrics["policy/skipped_steps"] and not config.guard.enabled:
            check_finite(step, {"the gradient's norm": float("nan")})
        self.scheduler.step()
        self.set_learning_rates()
        row = {
            "step": step,
            "episode": self.episode,
            **rollout_metrics(rollout, measured),
            **batch_metrics,
            **stats.metrics,
            **decision_metrics(decision),
            "safe/reward_mean": self.normaliser.moments.mean,
            "safe/reward_std": self.normaliser.moments.deviation,
            "lr": learning_rates[0],
            "lr_critic": learning_rates[1],
        }
        if config.guard.enabled:
            row["safe/rollbacks"] = self.recovery.guard.rollbacks
        row["objective/non_score_reward"] *= self.normaliser.unit  # back in the scorer's units
        row["objective/rlhf_reward"] = row["objective/scores"] + row["objective/non_score_reward"]
        ended = time.perf_counter()
        length = int(rollout.tokens.mask.sum())
        timing |= {
            "logprobs_s": known - sampled,
            "control_s": decided - known,
            "update_s": learned - decided,
            "total_s": ended - started,
            "tokens_per_s": length / (ended - started),
        }
        self.writer.write(row, {"step": step, **timing})
        if config.log.completions_steps and step % config.log.completions_steps == 0:
            write_completions(self.run_dir, step, completion_rows(rollout, measured))
        return row, sum(rollout.valid)

    def _after_step(self, row: dict[str, Any] | None) -> Path | None:
        """Callbacks, then snapshot, then checkpoint, which is returned: always at a rollout's end, so that there is no
        buffer to save."""
        self.state.global_step = self.step
        self.state.epoch = self.episode / len(self.train_dataset)
        self.control = self.handler.on_step_end(self._arguments, self.state, self.control)
        if row is not None:
            known = {name: value for name, value in row.items() if value is not None}  # trackers warn of each None
            self.control = self.handler.on_log(self._arguments, self.state, self.control, known)
        if self.recovery.snapshot_due:
            self.recovery.snapshots.keep(*capture(self))
        every = self.args.save_steps
        due = self.step == self.args.max_steps or (every > 0 and self.step % every == 0)
        saved = None
        if due or self.control.should_save or self.control.should_training_stop:
            saved = self.save_checkpoint()
        self.control.should_save = False
        return saved

    def set_learning_rates(self) -> None:
        """base x schedule x what roll-backs have made of it; the schedule is that of the present max_steps."""
        for group, base in zip(self.optimizer.param_groups, self.scheduler.base_lrs, strict=True):
            group["lr"] = base * self.scheduler.lr_lambdas[0](self.scheduler.last_epoch) * self.recovery.factor

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluate(self) -> dict[str, float | None]:
        """Reward with its standard error, KL, entropy, distinct-2 and length on the held-out prompts."""
        return self._evaluate()[0]

    def _evaluate(self) -> tuple[dict[str, float | None], list[dict[str, Any]]]:
        if self.eval_dataset is None or self.eval_prompts is None:
            raise ConfigError("evaluate() needs held-out prompts: give eval_dataset, or set data.eval_size above 0")
        figures, samples = evaluate(self.passes, self.sampler, self.eval_dataset, self.eval_prompts, self.args)
        self.control = self.handler.on_evaluate(self._arguments, self.state, self.control, figures)
        return figures, samples

    def _evaluate_into(self, side: str) -> dict[str, Any]:
        """Evaluates into ``before`` or ``after`` of evaluation.json; returns its whole content, {} without prompts."""
        return {} if self.eval_dataset is None else evaluation.record(self.run_dir, side, *self._evaluate())

    # -- state ----------------------------------------------------------------------------------------------------

    def _open_run(self, resume: bool | str | Path | None) -> None:
        """Makes the run folder, or loads the checkpoint that the run goes on from."""
        self._lock.take()
        check_callbacks(self)
        self.writer = MetricsWriter(self.run_dir)
        if resume:
            path, damaged = (
                store.newest(self.run_dir / "checkpoints") if resume is True else (Path(resume), list[str]())
            )
            for fault in damaged:
                tell(f"{fault}: passed over, the run goes on from step {store.steps_of(path)}")
            with store.restoring(path):
                tensors, state = self.load_checkpoint(path)
            if path.resolve().parent != (self.run_dir / "checkpoints").resolve():
                raise ConfigError(f"resume_from_checkpoint={str(path)!r}: set output_dir to the run that it belongs to")
            if self.step > self.args.max_steps:
                raise ConfigError(
                    f"max_steps={self.args.max_steps}: the run has done {self.step} steps already; give that many or "
                    "more, or resume from an older checkpoint"
                )
            forget_after(self)
            self.recovery.resume(tensors, state)
            if self.step < self.args.max_steps:  # what was final is so no more
                shutil.rmtree(self.run_dir / "final", ignore_errors=True)
                evaluation.forget_after(self.run_dir)
        elif (self.run_dir / "metrics.jsonl").exists() or store.found(self.run_dir / "checkpoints"):
            raise ConfigError(
                f"output_dir={str(self.run_dir)!r}: holds a run already; go on with it by `stable-rlhf resume "
                f"{self.run_dir}`, or choose another folder"
            )
        self.run_dir.mkdir(parents=True, exist_ok=True)
        # Again by a resume, which may train longer.
        settings = yaml.safe_dump(self.settings, sort_keys=False)
        replace_text(self.run_dir / "config.yaml", settings)
        if not resume:
            load_random_state(*self._random)
            incidents.truncate(self.run_dir, 0)  # of a run that was never saved
            self.recovery.begin()
            self._evaluate_into("before")

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the run, the controller's own included: what config.yaml and the checkpoints hold."""
        return complete_settings(self.args, self.run_dir)

    def save_checkpoint(self) -> Path:
        """All that affects the future, the last good state included, in run_dir/checkpoints/step-<steps done>."""
        tensors, state = capture(self)
        self.recovery.snapshots.into(tensors, state)
        kept = self.args.save_total_limit
        path = store.save(self.run_dir / "checkpoints", self.step, tensors, state, kept)
        self.control = self.handler.on_save(self._arguments, self.state, self.control)
        return path

    def load_checkpoint(self, path: Path) -> tuple[Tensors, dict[str, Any]]:
        """Puts the run back to a checkpoint; returns what that holds."""
        tensors, state = store.load(path)
        restore(self, tensors, state)
        self.recovery.tighten()
        return tensors, state

    def save_model(self, output_dir: str | Path | None = None) -> Path:
        """A plain Transformers or PEFT folder with its tokenizer; value_heads.safetensors lies beside the weights."""
        folder = Path(output_dir or self.run_dir / "final")
        policy: Any = self.model.policy
        policy.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        heads = {
            name: tensor.cpu().contiguous()
            for name, tensor in self.model.trained_state().items()
            if name.startswith(("heads.", "target_heads."))
        }
        save_file(heads, folder / "value_heads.safetensors")
        return folder

    def save_final(self) -> None:
        """``save_model`` into run_dir/final, whole or not at all: a kill leaves what was there before, or nothing."""
        aside = self.save_model(self.run_dir / ".final")
        shutil.rmtree(self.run_dir / "final", ignore_errors=True)
        aside.rename(self.run_dir / "final")

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads the policy and its tokenizer (``PreTrainedModel.push_to_hub`` takes the same arguments)."""
        self.processing_class.push_to_hub(repo_id, **kwargs)
        policy: Any = self.model.policy
        return policy.push_to_hub(repo_id, **kwargs)

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.handler.add_callback(callback)

    def _set_up_callbacks(self, callbacks: Sequence[TrainerCallback] | None) -> None:
        self._arguments = TrainingArguments(
            output_dir=str(self.run_dir),
            max_steps=self.args.max_steps,
            seed=self.args.seed,
            # The loop decides when to log, save and evaluate; a callback may ask for a save or a stop.
            logging_strategy="no",
            save_strategy="no",
            report_to=self.args.log.report_to or "none",
            use_cpu=self.model.device.type == "cpu",
        )
        reporting = get_reporting_integration_callbacks(self.args.log.report_to)
        self.state, self.control = TrainerState(), TrainerControl()
        self.handler = CallbackHandler(
            [DefaultFlowCallback, *reporting, *(callbacks or [])],
            self.model.policy,
            self.processing_class,
            self.optimizer,
            self.scheduler,
        )

    def _encode(self, dataset: Any) -> EncodedPrompts:
        return encode_prompts(
            dataset,
            self.processing_class,
            max_prompt_length=self.args.data.max_prompt_length,
            context_length=context_length(self.model.policy),
            max_completion_length=self.args.rollout.max_completion_length,
        )
