"""The study's page: tables of every bench as Markdown, and pictures, from its runs.

    mkdir runs; for file in *.tar.xz; do tar -xf $file -C runs; done
    python benchmarks/study/report.py S=runs/S M=runs/M M=runs/TRL/part=main* L=runs/L H=runs/H --out runs/page

A bench may be given several folders: sweeps as bench.py makes them, and runs of TRL as trl_peers.py makes them. Figures
are those of `stable-rlhf compare` where it has them (docs/compare.md): a mean has the interval of Student's t over
seeds with the bootstrap's error, a difference is over pairs of one seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script, whose own folder has names that libraries have too
    sys.path[0] = str(Path(__file__).parents[1])

from study.aims import (
    adversarial_table,
    arms_table,
    baselines_table,
    budget_table,
    frontier_table,
    gold_table,
    rate_table,
    variety_table,
)
from study.mechanisms import length_table, mechanism_table
from study.pictures import draw
from study.runs import Run, read_bench
from study.tables import Table

BENCHES = ("S", "M", "L", "H")


def tables_of(bench: str, runs: Sequence[Run]) -> list[Table]:
    """The tables that a bench has runs for, in the order of the aims."""
    if bench == "L":
        return [length_table(bench, runs)]
    aims = (frontier_table, budget_table, rate_table, adversarial_table, gold_table, variety_table)
    made = [make(bench, runs) for make in (*aims, baselines_table, mechanism_table, arms_table)]
    return [table for table in made if table.rows]


def page(runs: dict[str, list[Run]], pictures: Sequence[Path]) -> str:
    parts = []
    for bench, found in runs.items():
        seeds = {run.seed for run in found}
        parts.append(f"## Bench {bench}\n\n{len(found)} runs, {len(seeds)} seeds.\n")
        parts += [f"![Bench {bench}: {file.stem}]({file.name})\n" for file in pictures if file.stem[0] == bench]
        parts += [table.markdown() for table in tables_of(bench, found)]
    return "\n".join(parts)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="BENCH=FOLDER", help="a sweep or a run of TRL, of S, M, L or H")
    parser.add_argument("--out", type=Path, required=True, help="folder of study.md and the pictures")
    given = parser.parse_args(arguments)
    paths: dict[str, list[Path]] = {}
    for text in given.runs:
        bench, equals, folder = text.partition("=")
        if bench not in BENCHES or not equals:
            parser.error(f"{text}: give BENCH=FOLDER, such as S=runs/S")
        paths.setdefault(bench, []).append(Path(folder))
    runs = {bench: read_bench(bench, paths[bench]) for bench in BENCHES if bench in paths}
    given.out.mkdir(parents=True, exist_ok=True)
    pictures = [file for bench, found in runs.items() for file in draw(bench, found, given.out)]
    text = page(runs, pictures)
    (given.out / "study.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
