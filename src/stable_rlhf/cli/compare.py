"""The command `compare`."""

from __future__ import annotations

from pathlib import Path

from stable_rlhf.cli.parser import Parser
from stable_rlhf.errors import Exit
from stable_rlhf.text import visible


def compare(arguments: list[str]) -> int:
    """Compares runs: tables on the console, a page with --out, JSON with --json. Returns 0."""
    made = Parser(prog="stable-rlhf compare", allow_abbrev=False)
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="runs, sweeps, or other trainers' logs")
    made.add_argument("--by", help="settings that make an arm, with commas; by default all in which the runs differ")
    made.add_argument("--baseline", help="the arm that the others are compared with; by default the first")
    made.add_argument("--mapping", type=Path, help="a file that says what the columns of a CSV or JSONL mean")
    made.add_argument("--out", type=Path, help="write a page, such as compare.html")
    made.add_argument("--json", action="store_true", help="print JSON instead of tables")
    given = made.parse_args(arguments)
    from rich.console import Console
    from rich.text import Text

    from stable_rlhf.evidence import compare as compared
    from stable_rlhf.evidence import console_tables, find_outcomes, notes, to_json, write_page

    by = None if given.by is None else [name.strip() for name in given.by.split(",") if name.strip()]
    found = compared(find_outcomes(given.runs, given.mapping), by, given.baseline)
    if given.json:
        print(to_json(found))
    else:
        console = Console()
        for table in console_tables(found):
            console.print(table)
        for sentence in notes(found):
            console.print(Text(sentence), soft_wrap=True)
    if given.out is not None:
        path = write_page(found, given.out)
        if not given.json:
            print(f"Page: {visible(str(path), '⏎')}")
    return Exit.DONE
