"""Step time and peak memory of step.py against batch, response length and model size.

    python benchmarks/scaling.py                                    all of it, 3B shape first; on CUDA
    python benchmarks/scaling.py --cells 3b/16/128,3b/32/128        these alone: model/batch/response tokens
    python benchmarks/scaling.py --cells none --plot scaling.png    measures nothing, draws what the file holds

Every cell is a run of step.py in a process of its own, so that its memory is its own. The JSON file is written after
each, and what it holds of other cells is kept, so that the sweeps can be measured in several calls. A cell for which
the device has too little memory, or that takes longer than --limit, is written down as such; any other failure ends
the call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import shapes
from measuring import spread

AXES = {"batch": "completions a step", "response": "tokens a completion", "model": "model"}


class Cell(NamedTuple):
    """One run: shape of the policy, completions a step, tokens a completion."""

    model: str
    batch: int
    response: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.batch}/{self.response}"


BASE = Cell("3b", 16, 128)
SWEEPS = [
    BASE,
    *(BASE._replace(batch=batch) for batch in (32, 64, 128, 256)),
    *(BASE._replace(response=response) for response in (256, 512, 1024, 2048)),
    *(BASE._replace(model=model) for model in ("135m", "0.5b", "7b")),
]


def run_cell(cell: Cell, arguments: argparse.Namespace, passed: Sequence[str]) -> dict[str, Any]:
    """The cell's figures; ``status`` is measured, out of memory or over the time limit. Other failures raise."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "step.json"
        command = [sys.executable, str(Path(__file__).with_name("step.py")), f"--model={cell.model}"]
        command += [f"--batch-size={cell.batch}", f"--response-length={cell.response}", f"--steps={arguments.steps}"]
        command += [f"--warmup={arguments.warmup}", f"--device={arguments.device}", f"--json={output}", *passed]
        print(f"{cell.name} ...", file=sys.stderr, flush=True)
        record: dict[str, Any] = {**cell._asdict(), "options": list(passed)}
        try:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=arguments.limit)
        except subprocess.TimeoutExpired:
            return {**record, "status": "over the time limit", "message": f"longer than {arguments.limit} s"}
        result = json.loads(output.read_text())
    if "out_of_memory" in result:
        return {**record, "status": "out of memory", "message": result["out_of_memory"]}
    return {**record, "status": "measured", **figures(cell, result)}


def figures(cell: Cell, result: dict[str, Any]) -> dict[str, Any]:
    """What the table and the plot show of a result of step.py: medians, seconds and MiB."""
    columns = {part: [step[part] for step in result["steps"]] for part in result["steps"][0]}
    step_s = statistics.median(columns["total"])
    return {
        "step_s": step_s,
        "spread_s": spread(columns["total"]),
        "parts_s": {part: statistics.median(column) for part, column in columns.items()},
        "floor_s": sum(floor["seconds"] for floor in result["floors"].values()),
        "tokens_per_s": cell.batch * cell.response / step_s,
        "first_step_s": result["first_step_s"],
        "peak_mib": result["peak_mib"],
        "reserved_mib": result["reserved_mib"],
        "provenance": result["provenance"],
    }


# -- what is kept, printed and drawn ------------------------------------------------------------------------------


def load(path: Path) -> dict[str, dict[str, Any]]:
    """The file's cells by name; none where there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else {}


def table(records: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row a cell, and under it where each sweep first runs out of memory."""
    columns = (
        "model | batch | response | s a step | floor, s | measured / floor | new tokens / s | peak, MiB (reserved)"
    )
    lines = [f"| {columns} |", "|---" * 8 + "|"]
    for record in records.values():
        cell = f"| {record['model']} | {record['batch']} | {record['response']} |"
        if record["status"] == "measured":
            lines.append(
                f"{cell} {record['step_s']:.4f} ({record['spread_s']:.4f}) | {record['floor_s']:.3g} | "
                f"{record['step_s'] / record['floor_s']:.2f} | {record['tokens_per_s']:.0f} | "
                f"{record['peak_mib']:.0f} ({record['reserved_mib']:.0f}) |"
            )
        else:
            lines.append(f"{cell} {record['status']} | | | | |")
    return "\n".join([*lines, "", *(first_out(axis, records) for axis in AXES)])


def sweep(axis: str, records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The cells that differ from the first in this axis alone, in its order."""
    base = next(iter(records.values()), None)
    others = [other for other in AXES if other != axis]
    chosen = [record for record in records.values() if all(record[other] == base[other] for other in others)]
    sizes = list(shapes.SHAPES)
    return sorted(chosen, key=lambda record: sizes.index(record[axis]) if axis == "model" else record[axis])


def first_out(axis: str, records: dict[str, dict[str, Any]]) -> str:
    """Where a sweep first runs out of memory, in words."""
    cells = sweep(axis, records)
    out = [record[axis] for record in cells if record["status"] == "out of memory"]
    measured = [record[axis] for record in cells if record["status"] == "measured"]
    if out:
        return f"- {AXES[axis]}: runs out of memory first at {out[0]}"
    return f"- {AXES[axis]}: not out of memory up to {measured[-1]}" if measured else f"- {AXES[axis]}: not measured"


def draw(records: dict[str, dict[str, Any]], path: Path) -> None:
    """A PNG: time above, memory below, a column a sweep; a cross at the foot where memory ran out."""
    import matplotlib  # here, so that measuring does without it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(AXES), figsize=(4 * len(AXES), 6), squeeze=False, layout="constrained")
    rows = {"s a step": ("step_s", 1.0), "peak memory, GiB": ("peak_mib", 1 / 1024)}
    for column, axis in enumerate(AXES):
        cells = sweep(axis, records)
        names = [str(record[axis]) for record in cells]
        for row, (label, (key, unit)) in enumerate(rows.items()):
            panel = axes[row][column]
            panel.plot(names, [record.get(key, float("nan")) * unit for record in cells], marker="o", color="#1f6f8b")
            if key == "step_s":
                panel.plot(
                    names, [record.get("floor_s", float("nan")) for record in cells], "--", marker=".", color="#999999"
                )
                panel.set_yscale("log")
            else:
                panel.set_ylim(bottom=0)
            for place, record in enumerate(cells):
                if record["status"] == "out of memory":
                    panel.plot([place], [0.04], "x", color="#b3261e", transform=panel.get_xaxis_transform())
            panel.set_xlabel(AXES[axis])
            panel.set_ylabel(label)
    figure.suptitle("Step time (dashed: its floor) and peak memory; a red cross: out of memory", fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


# -- the command --------------------------------------------------------------------------------------------------


def cells(given: str) -> list[Cell]:
    """``3b/16/128,7b/16/128`` -> cells; ``all`` the sweeps, ``none`` nothing."""
    if given in ("all", "none"):
        return SWEEPS if given == "all" else []
    chosen = []
    for name in given.split(","):
        model, *numbers = name.split("/")
        if model not in shapes.SHAPES or len(numbers) != 2 or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise argparse.ArgumentTypeError(
                f"{name!r}: give MODEL/BATCH/RESPONSE, as 3b/16/128; models are {', '.join(shapes.SHAPES)}"
            )
        chosen.append(Cell(model, int(numbers[0]), int(numbers[1])))
    return chosen


def parse(given: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cells", type=cells, default="all", help="all, none, or MODEL/BATCH/RESPONSE,...")
    parser.add_argument("--steps", type=int, default=3, help="steps that count, a cell")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--limit", type=float, default=600, help="seconds a cell may take, compilation included")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("scaling.json"), help="read if it is there, and written")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    parser.epilog = "Any other option goes to step.py, as --set optim.microbatch_tokens=4096."
    return parser.parse_known_args(given)


def main(given: Sequence[str]) -> None:
    arguments, passed = parse(given)
    records = load(arguments.output)
    for cell in arguments.cells:
        records[cell.name] = run_cell(cell, arguments, passed)
        arguments.output.write_text(json.dumps(records, indent=1) + "\n")
    if not records:
        raise SystemExit(f"--cells none: {arguments.output} holds no cell to show")
    print(table(records))
    if arguments.plot:
        draw(records, arguments.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
