"""The command line: train, resume, report, doctor, serve-reward."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from stable_rlhf.cli.exits import say
from stable_rlhf.cli.parser import Parser
from stable_rlhf.cli.train import check_machine, check_output, inputs_named, resume, show_settings, train
from stable_rlhf.config import load_config
from stable_rlhf.console import protect_terminal
from stable_rlhf.errors import ConfigError, Exit, Interrupted
from stable_rlhf.policy import check_model
from stable_rlhf.text import visible

USAGE = """\
stable-rlhf train [--config FILE] [--section.field VALUE ...]   train a policy; without arguments, the built-in one
stable-rlhf resume RUN [--max_steps N] [--checkpoint FOLDER]    go on with a run from its newest checkpoint
stable-rlhf report RUN                                          write RUN/report.html
stable-rlhf serve-reward MODEL [--port N] [--host ADDRESS]      score batches for other machines' runs
stable-rlhf doctor [FILE] [--section.field VALUE ...]           check such a run, try a few steps, forecast its time

`stable-rlhf train --help` lists every setting."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, one of ``Exit``."""
    # Before torch loads. Threads that spin for long at their barriers make a step 20 times slower once another program
    # wants a core; threads that sleep at once make it a third slower where none does (docs/LOG.md).
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    protect_terminal()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"train": train, "resume": resume, "report": _report, "doctor": _doctor}
    commands |= {"serve-reward": _serve_reward}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    try:
        if arguments[0] not in commands:
            raise ConfigError(f"there is no command {arguments[0]!r}; the commands are {', '.join(commands)}")
        return commands[arguments[0]](arguments[1:])
    except ConfigError as error:
        return say(error, Exit.BAD_INPUT)
    except KeyboardInterrupt as error:  # of `doctor`, whose steps wait for their end, an Interrupted
        code = Exit(128 + error.signum) if isinstance(error, Interrupted) else Exit.INTERRUPTED
        return say("interrupted before training began", code)


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
    from stable_rlhf.cli.serve_reward import serve

    return serve(arguments)


def _doctor(arguments: list[str]) -> int:
    if "-h" in arguments or "--help" in arguments:
        return show_settings("doctor", arguments)
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    config = load_config(arguments)
    check_output(config)
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_machine(config)
    check_model(config.model)
    from stable_rlhf.doctor import examine

    with inputs_named(config.model):
        return Exit.DONE if examine(config) else Exit.FAILED
