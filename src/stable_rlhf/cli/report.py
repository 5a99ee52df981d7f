"""The command `report`."""

from __future__ import annotations

import signal
import sys
import threading
from pathlib import Path

from stable_rlhf.cli.parser import Parser
from stable_rlhf.cli.signals import noted_signals
from stable_rlhf.config import require
from stable_rlhf.errors import Exit
from stable_rlhf.text import visible


def report(arguments: list[str]) -> int:
    """Writes a run's report, or shows it while the run goes on.

    Returns 0; with `--watch` 130 after SIGINT and 0 after SIGTERM, as `serve-reward` does.
    """
    made = Parser(prog="stable-rlhf report", allow_abbrev=False)
    made.add_argument("run", type=Path, help="the run's folder")
    made.add_argument("--watch", action="store_true", help="serve the report on this machine, always up to date")
    made.add_argument("--port", type=int, help="port of --watch; by default a free one")
    given = made.parse_args(arguments)
    from stable_rlhf.report import write_report

    if given.watch:
        require(given.port is None or 0 <= given.port < 2**16, "--port", given.port, "give 1 to 65535, or leave it out")
        return _watch(given.run, given.port or 0)
    require(given.port is None, "--port", given.port, "has no effect without --watch: leave it out")
    print(visible(str(write_report(given.run))))
    return Exit.DONE


def _watch(run: Path, port: int) -> int:
    from stable_rlhf.report import watch

    def say(address: str, begun: bool) -> None:
        waits = "" if begun else "there is no run yet, the page waits for it; "
        print(f"stable-rlhf report: {visible(str(run), '⏎')} at {address} ({waits}Ctrl-C ends it)", flush=True)

    stopped = threading.Event()
    with noted_signals(stopped.set) as signals:
        watch(run, port, say, stopped)
    if signal.SIGINT in signals:
        print(file=sys.stderr)  # after the ^C that the terminal shows
        return Exit.INTERRUPTED
    return Exit.DONE
