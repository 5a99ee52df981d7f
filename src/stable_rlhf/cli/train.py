"""The commands `train` and `resume`."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from stable_rlhf.cli.messages import say, typed_command
from stable_rlhf.cli.parser import Parser
from stable_rlhf.cli.settings import asks_for_help, show_settings
from stable_rlhf.config import Config, given_in_python, load_config
from stable_rlhf.errors import ConfigError, Exit, StableRLHFError
from stable_rlhf.runs import RunLock, check_output, check_writable, read
from stable_rlhf.text import visible

if TYPE_CHECKING:
    from stable_rlhf.training import SAFETrainer


def train(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        return show_settings("train", arguments)
    config = load_config(arguments)
    check_writable(Path(config.output_dir or "runs"))
    return _run(config, resume=None)


def resume(arguments: list[str]) -> int:
    made = Parser(prog="stable-rlhf resume", allow_abbrev=False)
    made.add_argument("run", type=Path, help="the run's folder")
    made.add_argument("--max_steps", type=int, help="train to this many steps instead")
    made.add_argument("--checkpoint", type=Path, help="resume from this checkpoint instead of the newest")
    given = made.parse_args(arguments)
    file = given.run / "config.yaml"
    if not os.path.isfile(file):  # unlike Path.is_file, a name that is too long is not an error
        raise ConfigError(f"{given.run} is not a run folder: it has no config.yaml; check the path")
    extra = [] if given.max_steps is None else ["--max_steps", str(given.max_steps)]
    config = load_config(["--config", str(file), *extra, "--output_dir", str(given.run)])
    if (setting := given_in_python(config.to_dict())) is not None:
        raise ConfigError(
            f"{setting} was given to SAFETrainer as an object, which no command can load: resume this run in Python, "
            f"by train(resume_from_checkpoint=True) of a SAFETrainer made as before, with output_dir={str(given.run)!r}"
        )
    check_output(given.run)
    RunLock(given.run).check()  # before its checkpoints are read, which a running process may change
    chosen = None if given.checkpoint is None else _chosen(given.run, given.checkpoint)
    done, damaged = _last_step(given.run)
    if done is None and chosen is None:
        raise ConfigError(
            f"{given.run} has no checkpoint to resume from; {''.join(f'{fault}; ' for fault in damaged)}"
            f"start again with `stable-rlhf train --config {file} "
            "--output_dir NEW_FOLDER`"
        )
    if chosen is None and config.max_steps == done and _is_whole(given.run):
        done_all = f"{given.run} is finished: {done} of {config.max_steps} steps are done. To train it further: "
        print(visible(done_all + _further(given.run, config), "⏎"))
        return Exit.DONE
    return _run(config, resume=chosen or True)


def _chosen(run: Path, checkpoint: Path) -> Path:
    """The checkpoint that the user named: by a folder's path, or only by its name."""
    from stable_rlhf.checkpoints import found

    for path in (checkpoint, run / "checkpoints" / checkpoint):
        if os.path.isdir(path):
            return path
    there = ", ".join(path.name for path in found(run / "checkpoints")) or "none"
    raise ConfigError(f"--checkpoint {checkpoint}: there is no such folder; the checkpoints in {run}: {there}")


def _last_step(run: Path) -> tuple[int | None, list[str]]:
    """(steps done at the newest intact checkpoint of a run or None, the fault of each newer, damaged one)."""
    from stable_rlhf.checkpoints import inspect, steps_of

    saved, damaged = inspect(run / "checkpoints")
    return (steps_of(saved) if saved else None), damaged


def _is_whole(run: Path) -> bool:
    """Whether a run that has done its steps also has its final model and its evaluation after training."""
    known = read(run)
    return (run / "final" / "value_heads.safetensors").is_file() and ("after" in known or not known)


def _further(run: Path, config: Config) -> str:
    """The command that trains a finished run for as many steps again."""
    return f"{typed_command()} resume {shlex.quote(str(run))} --max_steps {2 * config.max_steps}"


def _run(config: Config, resume: bool | Path | None) -> int:
    """Trains, writes the report even if training fails, and prints the closing tables."""
    from transformers.utils import logging  # torch and transformers load only when the settings are good

    from stable_rlhf.report import closing_line, print_summary, write_report
    from stable_rlhf.training import SAFETrainer

    logging.disable_progress_bar()  # the run has a bar of its own
    trainer = SAFETrainer(config.model.name, args=config)
    run = trainer.run_dir
    with contextlib.ExitStack() as failed:
        failed.callback(_report_of_a_failure, trainer)
        result = trainer.train(resume_from_checkpoint=resume)
        failed.pop_all()
    write_report(run)
    if config.log.progress:
        print_summary(run, result, _further(run, config), rollbacks=result.rollbacks)
    else:
        print(visible(closing_line(run, result, trainer.steps_done), "⏎"))
    return Exit.DONE


def _report_of_a_failure(trainer: SAFETrainer) -> None:
    """Writes the report of a run that ended with an error. An error of the report is only printed: the run's error
    counts."""
    from stable_rlhf.report import write_report

    if trainer.steps_done == 0 or not (trainer.run_dir / "metrics.jsonl").exists():
        return
    try:
        write_report(trainer.run_dir)
    except StableRLHFError as error:
        say(f"the report could not be written: {error}", error.exit_code)
