"""The command `watch`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from stable_rlhf.cli.parser import Parser
from stable_rlhf.cli.signals import noted_signals
from stable_rlhf.config import given_settings, require
from stable_rlhf.config.checks import made
from stable_rlhf.control import GuardConfig
from stable_rlhf.errors import ConfigError, Exit, Interrupted
from stable_rlhf.text import visible

if TYPE_CHECKING:
    from stable_rlhf.evidence import Watched, WatchFolder

USUAL = "stable-rlhf watch LOG [--follow] [--budget B] [--completions N] [--guard.RULE VALUE ...] [--out FOLDER]"

ABOUT = """\
Judges the log of any run by the rules of the guard: a trainer_state.json of TRL or the folder that has it, itself or in
checkpoint-N; a CSV or JSON-lines file; the folder of a run of this package.

Exit code 0: nothing to stop the run for. 3: the run should be stopped. 2: the log cannot be read."""

NOT_OF_A_LOG = ("enabled", "snapshot_steps", "max_rollbacks", "rollback_factor")
"""Settings of the guard that have no effect on a log, which cannot be rolled back."""


def watch(arguments: list[str]) -> int:
    """Judges a log, once or with ``--follow`` while it is written.

    Returns 0, or 3 where the run should be stopped; with ``--follow`` 130 after SIGINT and 143 after SIGTERM.
    """
    made = parser()
    given = made.parse_args(arguments)
    _check(given)
    guard = _guard(given)
    from stable_rlhf.evidence import Asked, Watched, WatchFolder, read_mapping, takes_mapping

    if given.mapping is not None and not takes_mapping(given.log):
        raise ConfigError(
            f"--mapping {given.mapping}: has no effect, as LOG is no CSV or JSON-lines file; leave it out"
        )
    asked = Asked(
        log=given.log,
        guard=guard,
        mapping=None if given.mapping is None else read_mapping(given.mapping),
        completions=given.completions,
        budget=given.budget,
        planned=given.max_steps,
    )
    folder = None if given.out is None else WatchFolder(given.out, given.log)
    watched = Watched(asked, folder)
    try:
        signum = _follow(watched, given.every or 5.0) if given.follow else _once(watched)
    finally:
        if folder is not None:
            folder.close()
    return _end(watched, folder, signum)


def parser() -> Parser:
    made = Parser(
        prog="stable-rlhf watch",
        usage=USUAL,
        description=ABOUT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("log", type=Path, metavar="LOG", help="the log; with --follow it need not exist yet")
    made.add_argument("--follow", action="store_true", help="judge new rows as they are written, until the run should "
                      "be stopped (exit code 3) or has done its steps")  # fmt: skip
    made.add_argument("--every", type=float, metavar="SECONDS", help="how often --follow looks; by default every 5 s")
    made.add_argument("--mapping", type=Path, metavar="FILE", help="what the columns of a CSV or JSONL mean")
    made.add_argument("--budget", type=float, metavar="B", help="KL that is intended, nats per token: the KL's ceiling "
                      "is guard.max_kl_ratio times it; up to it short or sure answers are no failure")  # fmt: skip
    made.add_argument("--completions", type=int, metavar="N", help="completions of a step; without it a fall of the "
                      "reward is judged only where the log says it")  # fmt: skip
    made.add_argument("--max_steps", type=int, metavar="N", help="steps of the run, where the log does not say it")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="write rows and incidents as a run, with a report")
    rules = made.add_argument_group("rules of the guard (docs/algorithm.md, Guard); null switches one off")
    for field in dataclasses.fields(GuardConfig):
        default = "null" if field.default is None else field.default
        shown = argparse.SUPPRESS if field.name in NOT_OF_A_LOG else f"by default {default}"
        rules.add_argument(f"--guard.{field.name}", metavar="VALUE", help=shown)
    return made


def _check(given: argparse.Namespace) -> None:
    require(given.every is None or given.follow, "--every", given.every, "has no effect without --follow: leave it out")
    positive = given.every is None or (math.isfinite(given.every) and given.every > 0)
    require(positive, "--every", given.every, "give a number of seconds above 0")
    budget = given.budget is None or (math.isfinite(given.budget) and given.budget > 0)
    require(budget, "--budget", given.budget, "give nats per token, above 0")
    for name in ("completions", "max_steps"):
        value = getattr(given, name)
        require(value is None or value > 0, f"--{name}", value, "must be 1 or more")


def _guard(given: argparse.Namespace) -> GuardConfig:
    """The guard's settings, read as those of `train` are. Raises ConfigError for one without effect on this log."""
    texts = {name: value for name, value in vars(given).items() if name.startswith("guard.") and value is not None}
    for name in NOT_OF_A_LOG:
        value = texts.get(f"guard.{name}")
        require(
            value is None, f"--guard.{name}", value, "has no effect on a log, which is judged and never rolled back"
        )
    ceiling = texts.get("guard.max_kl")
    remedy = "has no effect with --budget, whose ceiling is guard.max_kl_ratio: leave one out"
    require(ceiling is None or given.budget is None, "--guard.max_kl", ceiling, remedy)
    if not texts:
        return GuardConfig()
    return made(GuardConfig, given_settings([f"--{name}={value}" for name, value in texts.items()])["guard"])


def _once(watched: Watched) -> None:
    from stable_rlhf.evidence import about
    from stable_rlhf.runs import incidents

    watched.look()
    for sentence in (*about(watched), *map(incidents.sentence, watched.incidents)):
        _say(sentence)


def _follow(watched: Watched, every: float) -> int | None:
    """Follows the log; returns the number of the signal that ended it, if one did."""
    from stable_rlhf.evidence import follow

    stopped = threading.Event()
    with noted_signals(stopped.set) as signals:
        follow(watched, _say, every=every, stopped=stopped)
    if not signals or watched.stopped is not None:
        return None
    if signals[0] == signal.SIGINT:
        print(file=sys.stderr)  # after the ^C that the terminal shows
    return signals[0]


def _end(watched: Watched, folder: WatchFolder | None, signum: int | None) -> int:
    """Says the verdict, writes the report, and gives the exit code."""
    from stable_rlhf.evidence import closing

    _say(closing(watched))
    if folder is not None and watched.rows:
        from stable_rlhf.report import write_report

        _say(f"Report: {write_report(folder.path)}")
    if signum is not None:
        return Interrupted(signum).exit_code
    return Exit.DONE if watched.stopped is None else Exit.GUARD


def _say(sentence: str) -> None:
    print(visible(sentence, "⏎"), flush=True)
