"""The command line: starts a command, and turns an error into one line and an exit code."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from stable_rlhf.cli.compare import compare
from stable_rlhf.cli.doctor import doctor
from stable_rlhf.cli.export import export
from stable_rlhf.cli.messages import say
from stable_rlhf.cli.report import report
from stable_rlhf.cli.train import resume, train
from stable_rlhf.cli.watch import watch
from stable_rlhf.console import protect_terminal
from stable_rlhf.errors import ConfigError, Exit, Interrupted, StableRLHFError

USAGE = """\
stable-rlhf train [FILE] [--section.field VALUE ...]            train a policy; without arguments, the built-in one
stable-rlhf resume RUN [--max_steps N] [--checkpoint FOLDER]    resume a run from its newest checkpoint
stable-rlhf sweep [FILE] --preset A,B --seeds N --out SWEEP     train a grid of settings and seeds, many runs at a time
stable-rlhf compare RUN... [--by SETTING,...] [--out PAGE]      tables, intervals and a page of many runs
stable-rlhf report RUN [--watch]                                write RUN/report.html, or show it while the run goes on
stable-rlhf watch LOG [--follow] [--guard.RULE VALUE ...]       judge the log of any run, so that a script can stop it
stable-rlhf export CHECKPOINT OUT [--merge]                     make a checkpoint a folder for from_pretrained
stable-rlhf serve-reward MODEL [--port N] [--host ADDRESS]      score batches for other machines' runs
stable-rlhf doctor [FILE] [--section.field VALUE ...]           check a run before it starts, forecast its time
stable-rlhf doctor --trl FILE [--script rloo]                   check the arguments of TRL's own GRPO or RLOO script

`stable-rlhf train --help` lists the usual settings, `--help-all` every one. A FILE is YAML, or recipe:NAME for one that
ships with the package.
`stable-rlhf --version` prints the version."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, one of ``Exit``."""
    # Before torch loads. Threads that spin for long at their barriers make a step 20 times slower once another program
    # wants a core; threads that sleep at once make it a third slower where none does (docs/LOG.md).
    if os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE") == "PASSIVE":
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    protect_terminal()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "train": train,
        "resume": resume,
        "sweep": _sweep,
        "compare": compare,
        "report": report,
        "watch": watch,
        "doctor": doctor,
        "serve-reward": _serve_reward,
        "export": export,
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return Exit.DONE if arguments else Exit.BAD_INPUT
    if arguments[0] == "--version":
        print(f"stable-rlhf {version('stable-rlhf')}")
        return Exit.DONE
    try:
        if arguments[0] not in commands:
            close = difflib.get_close_matches(arguments[0], commands, n=1)
            meant = f". Did you mean {close[0]}?" if close else f"; the commands are {', '.join(commands)}"
            raise ConfigError(f"there is no command {arguments[0]!r}{meant}")
        return commands[arguments[0]](arguments[1:])
    except (StableRLHFError, Interrupted) as error:
        return say(error, error.exit_code)
    except KeyboardInterrupt:
        return say("interrupted before training began", Exit.INTERRUPTED)


def _sweep(arguments: list[str]) -> int:
    from stable_rlhf.cli.sweep import sweep  # it loads scipy

    return sweep(arguments)


def _serve_reward(arguments: list[str]) -> int:
    from stable_rlhf.cli.serve_reward import serve  # it loads torch and a web server

    return serve(arguments)
