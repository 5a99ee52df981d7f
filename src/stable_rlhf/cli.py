"""The command line: train, resume, report, doctor, serve-reward. Arguments -> Config -> one call."""

from __future__ import annotations

import contextlib
import enum
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from stable_rlhf.commandline import Parser, load_config, parser, taken_out
from stable_rlhf.config import PRESETS, Config, ConfigError, ModelConfig
from stable_rlhf.display import ends, protect_terminal, visible
from stable_rlhf.stopping import Interrupted, RunLock
from stable_rlhf.validation import unwritable

USAGE = """\
stable-rlhf train [--config FILE] [--section.field VALUE ...]   train a policy; without arguments, the built-in one
stable-rlhf resume RUN [--max_steps N] [--checkpoint FOLDER]    go on with a run from its newest checkpoint
stable-rlhf report RUN                                          write RUN/report.html
stable-rlhf serve-reward MODEL [--port N] [--host ADDRESS]      score batches for other machines' runs
stable-rlhf doctor [FILE] [--section.field VALUE ...]           check such a run, try a few steps, forecast its time

`stable-rlhf train --help` lists every setting."""
SHOWN = 1000
"""Characters of an error that are shown: its beginning and its end. Transformers lists every architecture it knows."""


NAME = 255
"""Bytes of a file's name, on every file system in use."""


class Exit(enum.IntEnum):
    """What the command's exit code means; docs/operations.md says what to do about each."""

    DONE = 0
    FAILED = 1
    """Something that nobody foresaw, too little memory, or a check of `doctor` that failed."""
    BAD_INPUT = 2
    """Settings, usage, a file or a model that cannot be used. Nothing was trained."""
    GUARD = 3
    """The guard stopped the run, which is in its last checkpoint as it was before."""
    REWARD = 4
    """No reward could be had. The run is in its last checkpoint."""
    DISK = 5
    """A checkpoint, or another file of the run, could not be written. The checkpoint before is intact."""
    INTERRUPTED = 130
    """SIGINT (Ctrl-C): 128 + 2, as shells have it."""
    TERMINATED = 143
    """SIGTERM: 128 + 15."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, one of ``Exit``."""
    # Before torch loads. Threads that spin for long at their barriers make a step 20 times slower once another program
    # wants a core; threads that sleep at once make it a third slower where none does (docs/LOG.md).
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    protect_terminal()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": _train, "resume": _resume, "report": _report, "doctor": _doctor}
    commands |= {"serve-reward": _serve_reward}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise ConfigError(f"there is no command {arguments[0]!r}; the commands are {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:])
    except ConfigError as error:
        return _say(error, Exit.BAD_INPUT)
    except KeyboardInterrupt as error:  # of `doctor`, whose steps wait for their end, an Interrupted
        code = Exit(128 + error.signum) if isinstance(error, Interrupted) else Exit.INTERRUPTED
        return _say("interrupted before training began", code)


def _train(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        return _help("train", arguments)
    return _run(load_config(arguments), resume=None)


def _help(command: str, arguments: list[str]) -> int:
    """Every setting, with the defaults of the preset that is asked for."""
    preset = (taken_out("--preset", arguments)[0] or ["safe"])[-1]
    made = parser(preset if preset in PRESETS else "safe", command)
    if command == "doctor":
        made.description = "A FILE in front, without an option's name, is --config FILE."
    made.print_help()
    return Exit.DONE


def _resume(arguments: list[str]) -> int:
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
        further = f"{_command()} resume {shlex.quote(str(given.run))} --max_steps {2 * config.max_steps}"
        done_all = (
            f"{given.run} is finished: {done} of {config.max_steps} steps are done. To train it further: {further}"
        )
        print(visible(done_all, "⏎"))
        return 0
    return _run(config, resume=chosen or True)


def _chosen(run: Path, checkpoint: Path) -> Path:
    """The checkpoint that is meant: a folder's path, or its name alone."""
    from stable_rlhf.checkpoint import found

    for path in (checkpoint, run / "checkpoints" / checkpoint):
        if os.path.isdir(path):
            return path
    there = ", ".join(path.name for path in found(run / "checkpoints")) or "none"
    raise ConfigError(f"--checkpoint {checkpoint}: there is no such folder; of checkpoints {run} has {there}")


def _report(arguments: list[str]) -> int:
    made = Parser(prog="stable-rlhf report", allow_abbrev=False)
    made.add_argument("run", type=Path, help="the run's folder")
    run = made.parse_args(arguments).run
    from stable_rlhf.report import read_run, write_report

    try:
        read_run(run)
    except (OSError, ValueError) as error:
        raise ConfigError(str(error)) from error
    print(visible(str(write_report(run))))
    return 0


def _serve_reward(arguments: list[str]) -> int:
    from stable_rlhf.serving import serve

    return serve(arguments)


def _doctor(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        return _help("doctor", arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    config = load_config(arguments)
    _check_output(config)
    from transformers.utils import logging

    logging.disable_progress_bar()
    _check_machine(config)
    _check_model(config.model)
    from stable_rlhf.doctor import examine

    with _inputs_named(config.model):
        return Exit.DONE if examine(config) else Exit.FAILED


def _run(config: Config, resume: bool | Path | None) -> int:
    """Trains, writes the report whatever happens, and prints the closing tables."""
    _check_output(config)
    if resume is None and (fault := unwritable(Path(config.output_dir or "runs"))) is not None:
        raise ConfigError(f"output_dir={config.output_dir!r}: {fault}; choose another folder")
    from safetensors import SafetensorError
    from transformers.utils import logging  # torch and transformers load only when the settings are good

    from stable_rlhf.checkpoint import CheckpointError, SaveError
    from stable_rlhf.memory import LESS, shortage
    from stable_rlhf.optimize import DivergenceError
    from stable_rlhf.prompts import PromptError
    from stable_rlhf.recovery import GuardStop
    from stable_rlhf.report import write_report
    from stable_rlhf.scoring import RewardError, RewardUnavailable
    from stable_rlhf.telemetry import print_summary
    from stable_rlhf.trainer import SAFETrainer

    logging.disable_progress_bar()  # the run has a bar of its own
    _check_machine(config)
    _check_model(config.model)
    try:
        with _inputs_named(config.model):
            trainer = SAFETrainer(config.model.name, args=config)
    except ConfigError as error:
        if not isinstance(error.__cause__, RewardUnavailable):
            raise
        return _say(error, Exit.REWARD)  # a server that is not there may be there later
    except RuntimeError as error:
        if (said := shortage(error)) is None:
            raise
        return _say(f"loading: {said}; {LESS}", Exit.FAILED)
    run = trainer.run_dir
    try:
        with _report_at_the_end(trainer, write_report):
            evaluation = trainer.train(resume_from_checkpoint=resume)
    except SaveError as error:
        return _say(f"{error}. {_how_to_go_on(run)}", Exit.DISK)
    except (CheckpointError, PromptError) as error:  # of the checkpoint that it should go on from
        raise ConfigError(str(error)) from error
    except ValueError as error:
        if isinstance(error, ConfigError) or resume is None or trainer.step > 0:
            raise
        raise ConfigError(str(error)) from error  # a saved state does not fit config.yaml, which somebody changed
    except DivergenceError as error:
        return _say(error, Exit.FAILED)
    except RewardError as error:
        if error.__cause__ is not None and (said := shortage(error.__cause__)) is not None:  # of a model that scores
            return _say(f"after {trainer.step} steps, in the reward: {said}; {_with_less(run)}", Exit.FAILED)
        return _say(f"{error} {_how_to_go_on(run)}", Exit.REWARD)
    except GuardStop as error:
        again = f"The guard would stop it again, but for another cause or another `guard` in {run / 'config.yaml'}."
        again = again if error.__cause__ is None else ""  # then the state of before could not be read
        return _say(f"{error} {_how_to_go_on(run)} {again}", Exit.GUARD)
    except (OSError, SafetensorError) as error:  # not of a checkpoint, which says so itself
        if (sentence := _no_room(run, error)) is None:
            raise
        return _say(f"{sentence}. {_how_to_go_on(run)}", Exit.DISK)
    except RuntimeError as error:
        if (said := shortage(error)) is None:
            raise
        return _say(f"after {trainer.step} steps: {said}; {_with_less(run)}", Exit.FAILED)
    except KeyboardInterrupt as error:
        code = Exit.INTERRUPTED if not isinstance(error, Interrupted) else Exit(128 + error.signum)
        return _say(f"interrupted after {trainer.step} steps. {_how_to_go_on(run)}", code)
    if trainer.args.log.progress:
        further = f"{_command()} resume {shlex.quote(str(run))} --max_steps {2 * trainer.args.max_steps}"
        print_summary(run, evaluation, further)
    return 0


def _command() -> str:
    """What the user typed to get here, so that a printed command can be copied: with its path where it has one."""
    return sys.argv[0] if Path(sys.argv[0]).name == "stable-rlhf" else "stable-rlhf"


def _check_output(config: Config) -> None:
    if config.output_dir is None:
        return
    if any(len(part.encode()) > NAME for part in Path(config.output_dir).parts):
        raise ConfigError(
            f"output_dir={config.output_dir!r}: has a name of more than {NAME} bytes; choose a shorter one"
        )
    for folder in (path := Path(config.output_dir), *path.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"output_dir={config.output_dir!r}: {folder} is a file; choose another folder")


def _check_machine(config: Config) -> None:
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


def _check_model(model: ModelConfig) -> None:
    """Raises ConfigError for a name that is no model, before anything else loads."""
    from transformers import AutoConfig

    if model.name == "builtin" or model.gguf_file is not None:  # a GGUF file's settings take as long to read as it does
        return
    if not model.name or (model.name.startswith((".", "/", "~")) and not Path(model.name).is_dir()):
        raise _not_a_model(model, FileNotFoundError("there is no such folder"))
    try:
        AutoConfig.from_pretrained(
            model.name, revision=model.revision or "main", trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _not_a_model(model, error) from error


@contextlib.contextmanager
def _inputs_named(model: ModelConfig) -> Iterator[None]:
    """Inside, whatever cannot be loaded raises a ConfigError that names it."""
    from stable_rlhf.prompts import PromptError
    from stable_rlhf.scoring import RewardError

    try:
        yield
    except (PromptError, RewardError) as error:
        raise ConfigError(str(error)) from error
    except OSError as error:  # what Transformers raises for a tokenizer, weights or a GGUF file that is not there
        raise _not_a_model(model, error) from error
    except ValueError as error:
        if "AutoModelForCausalLM" in str(error):
            raise _not_a_model(model, error) from error
        if model.lora_target_modules is None or "arget modules" not in str(error):
            raise
        setting = f"model.lora_target_modules={model.lora_target_modules!r}"
        raise ConfigError(f"{setting}: {error}; name linear layers of the model, or leave it out") from error


def _not_a_model(model: ModelConfig, error: Exception) -> ConfigError:
    setting = f"model.name={model.name!r}" + (f", model.gguf_file={model.gguf_file!r}" if model.gguf_file else "")
    remedy = "give builtin, the folder of a causal language model in safetensors or GGUF, or a hub name"
    return ConfigError(f"{setting}: {str(error).rstrip('.')}; {remedy}")


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
    from stable_rlhf.checkpoint import NO_ROOM, error_number, found

    if (number := error_number(error)) not in NO_ROOM:
        return None
    saved = found(run / "checkpoints")
    need = sum(file.stat().st_size for file in saved[-1].iterdir()) if saved else 0
    needs = f", and its next checkpoint needs {need:,}" if need else ""
    free = shutil.disk_usage(run).free
    return f"{run} could not be written to: {os.strerror(number)}; {free:,} bytes are free{needs}; {NO_ROOM[number]}"


def _last_step(run: Path) -> tuple[int | None, list[str]]:
    """(steps done at the newest whole checkpoint of a run, None without one; what is wrong with each newer one)."""
    from stable_rlhf.checkpoint import inspect, steps_of

    saved, damaged = inspect(run / "checkpoints")
    return (steps_of(saved) if saved else None), damaged


def _is_whole(run: Path) -> bool:
    """Whether a run that has done its steps also has its model, and its evaluation after training."""
    from stable_rlhf.evaluation import read

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
                _say(f"the report could not be written: {error}", Exit.FAILED)
        raise
    write_report(trainer.run_dir)


def _say(message: object, code: int) -> int:
    """One line on stderr, with nothing in it that a terminal would act on and the command as it was typed; returns the
    exit code."""
    text = " ".join(str(message).split()).replace("`stable-rlhf ", f"`{_command()} ")
    print(f"stable-rlhf: {ends(text, SHOWN)}", file=sys.stderr)
    return code
