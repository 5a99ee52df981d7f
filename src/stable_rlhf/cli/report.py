"""The command `report`."""

from __future__ import annotations

from pathlib import Path

from stable_rlhf.cli.parser import Parser
from stable_rlhf.errors import Exit
from stable_rlhf.text import visible


def report(arguments: list[str]) -> int:
    made = Parser(prog="stable-rlhf report", allow_abbrev=False)
    made.add_argument("run", type=Path, help="the run's folder")
    run = made.parse_args(arguments).run
    from stable_rlhf.report import write_report

    print(visible(str(write_report(run))))
    return Exit.DONE
