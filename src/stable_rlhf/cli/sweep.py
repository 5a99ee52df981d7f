"""The command `sweep`."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from stable_rlhf.cli.parser import Parser
from stable_rlhf.config import complete_settings, require, settings_text
from stable_rlhf.errors import ConfigError, Exit
from stable_rlhf.evidence import (
    COMMAND,
    Cell,
    Clock,
    Cluster,
    Place,
    Processes,
    Standing,
    State,
    Sweep,
    clock,
    make_sweep,
    parse_resources,
    places,
    run_sweep,
    share_left,
    standing,
    visible_gpus,
)
from stable_rlhf.text import counted, printable, visible

ABOUT = """\
Trains every cell of a grid: presets x values of settings x seeds. FILE and other flags are settings of every cell, as
`stable-rlhf train --help-all` lists them. A FILE may name the sweep itself, which flags override:

    sweep:
      seeds: 5
      preset: [ppo, safe]
      set: {optim.learning_rate: [1e-4, 3e-4, 1e-3]}
"""

REASON = 500
"""Characters of a failed check that are shown."""

USUAL = (
    "stable-rlhf sweep [FILE] [--preset A,B] [--set SETTING=A,B] [--seeds N] --out SWEEP [--section.field VALUE ...]"
)


def sweep(arguments: list[str]) -> int:
    """Trains the cells of a sweep that are not complete.

    Returns 0 once every cell has ended, however it ended; 130 and 143 after SIGINT and SIGTERM.
    """
    given, settings = parser().parse_known_args(arguments)
    require(given.jobs is None or given.jobs > 0, "--jobs", given.jobs, "must be 1 or more")
    for name in ("address", "resources"):
        value = getattr(given, name)
        require(value is None or given.launcher == "ray", f"--{name}", value, "has no effect without --launcher ray")
    resources = None if given.resources is None else parse_resources(given.resources)
    asked = make_sweep(settings, given.out, given.seeds, given.preset, given.set)
    now = standing(asked, given.out)
    with contextlib.ExitStack() as held:
        if given.launcher == "ray":
            launcher = Cluster(given.out, given.address, resources, given.jobs)
            held.callback(launcher.close)
            on = counted(launcher.hosts, "host")
        else:
            launcher = Processes(_places(asked, given.jobs or 1))
            gpus = {place.gpu for place in launcher.places if place.gpu is not None}
            on = counted(len(gpus), "GPU") if gpus else "the CPU"
            if gpus and len(launcher.places) > len(gpus):
                _say("kernels of cells on one GPU take turns: several at a time gain nothing unless the model is small")
        size = f"{_size(asked)}, {len(launcher.places)} at a time on {on}; {_states(now, given.retry)}"
        if given.dry_run:
            _show_cells(asked, given.out, now, launcher.places, size)
            return Exit.DONE
        _say(size)
        now = run_sweep(asked, given.out, launcher, retry=given.retry, say=_say)
    counts = now.count(State.COMPLETE), now.count(State.FAILED)
    _say(f"{how_all_ended(len(asked.cells), *counts)}: {given.out}")
    return Exit.DONE


def parser() -> Parser:
    made = Parser(
        prog="stable-rlhf sweep",
        usage=USUAL,
        description=ABOUT,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--out", type=Path, required=True, metavar="SWEEP", help="folder of the sweep; an unfinished sweep goes on"
    )
    made.add_argument(
        "--seeds", metavar="N", help="number of seeds (5 is 0 to 4) or a list such as 3,7,11; by default 0"
    )
    made.add_argument("--preset", metavar="A,B", help="presets; by default the FILE's, or safe")
    made.add_argument(
        *("--set",),
        action="append",
        default=[],
        metavar="SETTING=A,B",
        help="values of a setting; may be given again. Values with brackets or quotes are read as a YAML list",
    )
    jobs = "cells at a time on each GPU, or on the CPU, whose cores they share (1 without it); on a cluster in all"
    made.add_argument("--jobs", type=int, metavar="N", help=jobs)
    made.add_argument("--retry", action="store_true", help="try failed cells again, from their newest checkpoint")
    made.add_argument("--dry-run", action="store_true", help="show the cells and how long they take; write nothing")
    made.add_argument("--launcher", choices=("processes", "ray"), default="processes", help="what starts cells")
    made.add_argument("--address", metavar="A", help="of a Ray cluster, such as auto; without it one on this machine")
    resources = "of a cell on a Ray cluster; without it GPU=1,CPU=1 where the cluster has GPUs, else CPU=1"
    made.add_argument("--resources", metavar="GPU=1,CPU=4", help=resources)
    return made


def _places(asked: Sweep, jobs: int) -> list[Place]:
    devices = {cell.config.model.device for cell in asked.cells}
    for device in devices:
        if re.fullmatch(r"cuda:[1-9]\d*", device):
            remedy = "each cell sees one GPU, as cuda:0; set it to auto, and CUDA_VISIBLE_DEVICES to the GPUs to use"
            raise ConfigError(f"model.device={device!r}: {remedy}")
    return places(jobs, [] if devices == {"cpu"} else visible_gpus())


def how_all_ended(cells: int, complete: int, failed: int) -> str:
    """The last line's words on a sweep's cells; those that neither are complete nor failed were stopped."""
    parts = [f"{complete} of {counted(cells, 'cell')} complete"]
    if failed:
        parts.append(f"{failed} failed, which is their result (--retry tries them again)")
    if stopped := cells - complete - failed:
        parts.append(f"{stopped} stopped by a signal; the same command resumes {'it' if stopped == 1 else 'them'}")
    return "; ".join(parts)


def _size(asked: Sweep) -> str:
    arms = len({cell.arm for cell in asked.cells})
    return f"{counted(len(asked.cells), 'cell')}: {counted(arms, 'arm')} x {counted(len(asked.seeds), 'seed')}"


def _states(now: Standing, retry: bool) -> str:
    states = [f"{now.count(state)} {state}" for state in State if now.count(state)]
    if retry and now.count(State.FAILED):
        states.append("the failed ones are tried again")
    return ", ".join(states)


def _say(line: str) -> None:
    print(visible(line, "⏎"), flush=True)


# -- the dry run ----------------------------------------------------------------------------------------------------


def _show_cells(asked: Sweep, out: Path, now: Standing, where: Sequence[Place], size: str) -> None:
    """Prints each cell with its state, and a forecast of the time."""
    for cell in asked.cells:
        reason = now.last[cell.name]["reason"] if now.states[cell.name] is State.FAILED else None
        _say(f"{cell.arm}  seed {cell.seed}  {now.states[cell.name]}{'' if reason is None else f': {reason}'}")
    _say(size)
    to_do = [cell for cell in asked.cells if now.states[cell.name] in (State.NEW, State.BROKEN)]
    known = Clock(asked.cells, now.outcomes)
    by_doctor = False
    for cell in to_do:
        if not known.knows(cell):
            seconds = _seconds_by_doctor(cell, where[0])
            if seconds is None:
                return
            known.learn_seconds(cell, seconds)
            by_doctor = True
    left = known.left([(cell, share_left(cell, out)) for cell in to_do], len(where)) if to_do else 0.0
    source = (
        "as `doctor` forecasts a cell of each preset, loading not counted"
        if by_doctor
        else "as the cells that are complete took"
    )
    _say(f"forecast: {clock(left or 0.0)} for {counted(len(to_do), 'cell')}, {source}")


def _seconds_by_doctor(cell: Cell, place: Place) -> float | None:
    """Seconds of a cell as `doctor` forecasts it; None, with what it said, where it fails."""
    with tempfile.TemporaryDirectory(prefix="stable-rlhf-sweep-") as folder:
        file, run = Path(folder) / "cell.yaml", Path(folder) / "run"
        file.write_text(settings_text(complete_settings(cell.config, run)), encoding="utf-8")
        done = subprocess.run(
            [*COMMAND, "doctor", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **place.environment},
        )
    number = r"([0-9.e+-]+)"
    found = re.search(rf"forecast: (\d+) steps x {number} s and {number} s of evaluation", done.stdout)
    if found is not None:
        return int(found[1]) * float(found[2]) + float(found[3])
    lines = [line for line in done.stdout.splitlines() if line.startswith(("failed", "stable-rlhf: "))]
    why = (lines or done.stdout.splitlines() or ["it said nothing"])[-1]
    _say(f"forecast: unknown, since `doctor` fails for {cell.arm}: {printable(why.strip(), REASON)}")
    return None
