"""The commands `train` and `resume`."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stable_rlhf.cli.exits import say, typed_command
from stable_rlhf.cli.parser import Parser
from stable_rlhf.config import Config, ModelConfig, load_config, parser_for
from stable_rlhf.errors import ConfigError, Exit, Interrupted
from stable_rlhf.files import unwritable
from stable_rlhf.policy import check_model, not_a_model
from stable_rlhf.runs import RunLock
from stable_rlhf.text import visible

NAME = 255
"""Bytes of a file's name, on every file system in use."""


def train(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        return show_settings("train", arguments)
    return _run(load_config(arguments), resume=None)


def show_settings(command: str, arguments: list[str]) -> int:
    """Every setting, with the defaults of the preset and the controller that are asked for."""
    made = parser_for(arguments, command)
    if command == "doctor":
        made.description = "A FILE in front, without an option's name, is --config FILE."
    made.print_help()
    return Exit.DONE


def resume(arguments: list[str]) -> int:
    made = Parser(prog="stable-rlhf resume", allow_abbrev=False)
    made.add_argument("run", type=Path, help="the run's folder")
    made.add_argument("--max_steps", type=int, help="train to this many steps instead")
    made.add_argument("--checkpoint", type=Path, help="go on from this checkpoint instead of the newest")
    given = made.parse_args(arguments)
    file = given.run / "config.yaml"
    if not os.path.isfile(file):  # as Path has it, but for a name too long to be one
        raise ConfigError(f"{given.run} is not a run folder: it has no config.yaml; check the path")
    extra = [] if given.max_steps is None else ["--max_steps", str(given.max_steps)]
    config = load_config(["--config", str(file), *extra, "--output_dir", str(given.run)])
    RunLock(given.run).check()  # before its checkpoints are looked at, which change under a run that is alive
    chosen = None if given.checkpoint is None else _chosen(given.run, given.checkpoint)
    done, damaged = _last_step(given.run)
    if done is None and chosen is None:
        raise ConfigError(
            f"{given.run} has no checkpoint to go on from; {''.join(f'{fault}; ' for fault in damaged)}"
            f"start again with `stable-rlhf train --config {file} "
            "--output_dir NEW_FOLDER`"
        )
    if chosen is None and config.max_steps == done and _is_whole(given.run):
        further = f"{typed_command()} resume {shlex.quote(str(given.run))} --max_steps {2 * config.max_steps}"
        done_all = (
            f"{given.run} is finished: {done} of {config.max_steps} steps are done. To train it further: {further}"
        )
        print(visible(done_all, "⏎"))
        return 0
    return _run(config, resume=chosen or True)


def _chosen(run: Path, checkpoint: Path) -> Path:
    """The checkpoint that is meant: a folder's path, or its name alone."""
    from stable_rlhf.checkpoints import found

    for path in (checkpoint, run / "checkpoints" / checkpoint):
        if os.path.isdir(path):
            return path
    there = ", ".join(path.name for path in found(run / "checkpoints")) or "none"
    raise ConfigError(f"--checkpoint {checkpoint}: there is no such folder; of checkpoints {run} has {there}")


def _run(config: Config, resume: bool | Path | None) -> int:
    """Trains, writes the report whatever happens, and prints the closing tables."""
    check_output(config)
    if resume is None and (fault := unwritable(Path(config.output_dir or "runs"))) is not None:
        raise ConfigError(f"output_dir={config.output_dir!r}: {fault}; choose another folder")
    from safetensors import SafetensorError
    from transformers.utils import logging  # torch and transformers load only when the settings are good

    from stable_rlhf.errors import (
        CheckpointError,
        DivergenceError,
        GuardStop,
        PromptError,
        RewardError,
        RewardUnavailable,
        SaveError,
    )
    from stable_rlhf.hardware import LESS, shortage
    from stable_rlhf.report import print_summary, write_report
    from stable_rlhf.training import SAFETrainer

    logging.disable_progress_bar()  # the run has a bar of its own
    check_machine(config)
    check_model(config.model)
    try:
        with inputs_named(config.model):
            trainer = SAFETrainer(config.model.name, args=config)
    except ConfigError as error:
        if not isinstance(error.__cause__, RewardUnavailable):
            raise
        return say(error, Exit.REWARD)  # a server that is not there may be there later
    except RuntimeError as error:
        if (said := shortage(error)) is None:
            raise
        return say(f"loading: {said}; {LESS}", Exit.FAILED)
    run = trainer.run_dir
    try:
        with _report_at_the_end(trainer, write_report):
            evaluation = trainer.train(resume_from_checkpoint=resume)
    except SaveError as error:
        return say(f"{error}. {_how_to_go_on(run)}", Exit.DISK)
    except (CheckpointError, PromptError) as error:  # of the checkpoint that it should go on from
        raise ConfigError(str(error)) from error
    except ValueError as error:
        if isinstance(error, ConfigError) or resume is None or trainer.step > 0:
            raise
        raise ConfigError(str(error)) from error  # a saved state does not fit config.yaml, which somebody changed
    except DivergenceError as error:
        return say(error, Exit.FAILED)
    except RewardError as error:
        if error.__cause__ is not None and (said := shortage(error.__cause__)) is not None:  # of a model that scores
            return say(f"after {trainer.step} steps, in the reward: {said}; {_with_less(run)}", Exit.FAILED)
        return say(f"{error} {_how_to_go_on(run)}", Exit.REWARD)
    except GuardStop as error:
        again = f"The guard would stop it again, but for another cause or another `guard` in {run / 'config.yaml'}."
        again = again if error.__cause__ is None else ""  # then the state of before could not be read
        return say(f"{error} {_how_to_go_on(run)} {again}", Exit.GUARD)
    except (OSError, SafetensorError) as error:  # not of a checkpoint, which says so itself
        if (sentence := _no_room(run, error)) is None:
            raise
        return say(f"{sentence}. {_how_to_go_on(run)}", Exit.DISK)
    except RuntimeError as error:
        if (said := shortage(error)) is None:
            raise
        return say(f"after {trainer.step} steps: {said}; {_with_less(run)}", Exit.FAILED)
    except KeyboardInterrupt as error:
        code = Exit.INTERRUPTED if not isinstance(error, Interrupted) else Exit(128 + error.signum)
        return say(f"interrupted after {trainer.step} steps. {_how_to_go_on(run)}", code)
    if trainer.args.log.progress:
        further = f"{typed_command()} resume {shlex.quote(str(run))} --max_steps {2 * trainer.args.max_steps}"
        print_summary(run, evaluation, further)
    return 0


def check_output(config: Config) -> None:
    if config.output_dir is None:
        return
    if any(len(part.encode()) > NAME for part in Path(config.output_dir).parts):
        raise ConfigError(
            f"output_dir={config.output_dir!r}: has a name of more than {NAME} bytes; choose a shorter one"
        )
    for folder in (path := Path(config.output_dir), *path.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output_dir={config.output_dir!r}: {folder} is a file; choose another folder")


def check_machine(config: Config) -> None:
    """Raises ConfigError for a device or a tracker that is not here, before a model loads."""
    import torch
    from transformers.integrations.integration_utils import get_available_reporting_integrations

    try:
        device = torch.device("cpu" if config.model.device == "auto" else config.model.device)
    except RuntimeError as error:
        raise ConfigError(f"model.device={config.model.device!r}: give auto, cpu, cuda or cuda:NUMBER") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        here = f"this machine has {torch.cuda.device_count()} CUDA devices"
        raise ConfigError(f"model.device={config.model.device!r}: {here}; set model.device=auto")
    available = get_available_reporting_integrations()
    if missing := [name for name in config.log.report_to if name not in available]:
        raise ConfigError(
            f"log.report_to={config.log.report_to!r}: {missing[0]} is not a tracker that is installed here; install "
            f"it, or choose from {', '.join(sorted(available)) or 'none'}"
        )


@contextlib.contextmanager
def inputs_named(model: ModelConfig) -> Iterator[None]:
    """Inside, whatever cannot be loaded raises a ConfigError that names it."""
    from stable_rlhf.errors import PromptError, RewardError

    try:
        yield
    except (PromptError, RewardError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:  # what Transformers raises for a tokenizer, weights or a GGUF file that is not there
        raise not_a_model(model, error) from error
    except ValueError as error:
        if "AutoModelForCausalLM" in str(error):
            raise not_a_model(model, error) from error
        if model.lora_target_modules is None or "arget modules" not in str(error):
            raise
        setting = f"model.lora_target_modules={model.lora_target_modules!r}"
        raise ConfigError(f"{setting}: {error}; name linear layers of the model, or leave it out") from error


def _how_to_go_on(run: Path) -> str:
    saved, _ = _last_step(run)
    if saved is None:
        where = ", with another output_dir" if (run / "metrics.jsonl").exists() else ""
        return f"There is no checkpoint to resume from yet: start again{where}."
    return f"`stable-rlhf resume {shlex.quote(str(run))}` goes on from step {saved}."


def _with_less(run: Path) -> str:
    """What a run that ran out of memory can go on with: the settings that `resume` may be given anew."""
    return (
        f"lower optim.microbatch_tokens or reward.batch_size, or set model.gradient_checkpointing, in "
        f"{run / 'config.yaml'}. {_how_to_go_on(run)} A smaller rollout.batch_size or model.lora_r needs a new run."
    )


def _no_room(run: Path, error: Exception) -> str | None:
    """What is wrong and what to do where an error says that there is no room, else None."""
    from stable_rlhf.checkpoints import found
    from stable_rlhf.files import NO_ROOM, error_number

    if (number := error_number(error)) not in NO_ROOM:
        return None
    saved = found(run / "checkpoints")
    need = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else 0
    needs = f", and its next checkpoint needs {need:,}" if need else ""
    free = shutil.disk_usage(run).free
    return f"{run} could not be written to: {os.strerror(number)}; {free:,} bytes are free{needs}; {NO_ROOM[number]}"


def _last_step(run: Path) -> tuple[int | None, list[str]]:
    """(steps done at the newest whole checkpoint of a run, None without one; what is wrong with each newer one)."""
    from stable_rlhf.checkpoints import inspect, steps_of

    saved, damaged = inspect(run / "checkpoints")
    return (steps_of(saved) if saved else None), damaged


def _is_whole(run: Path) -> bool:
    """Whether a run that has done its steps also has its model, and its evaluation after training."""
    from stable_rlhf.runs import read

    known = read(run)
    return (run / "final" / "value_heads.safetensors").is_file() and ("after" in known or not known)


@contextlib.contextmanager
def _report_at_the_end(trainer: Any, write_report: Any) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if trainer.step > 0 and (trainer.run_dir / "metrics.jsonl").exists():
            try:
                write_report(trainer.run_dir)
            except (OSError, ValueError) as error:  # what stopped the run is the error to show
                say(f"the report could not be written: {error}", Exit.FAILED)
        raise
    write_report(trainer.run_dir)
