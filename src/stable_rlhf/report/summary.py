"""The tables printed at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stable_rlhf.runs import evaluation_rows
from stable_rlhf.text import counted, formatted, printable, visible


def summary_table(evaluation: Mapping[str, Any], rollbacks: int = 0) -> Table:
    """Before and after training on the same prompts; ± is one standard error of the mean reward.

    Below it stands how often the guard rolled the run back, if it did.
    """
    prompts = formatted(evaluation.get("before", {}).get("prompts"), ".0f")
    caption = Text(rolled_back(rollbacks)) if rollbacks else None
    table = Table(title=Text(f"Evaluation on {prompts} prompts"), caption=caption)
    for heading in ("", "before", "after", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in evaluation_rows(evaluation):
        table.add_row(*(Text(cell) for cell in row))
    return table


def samples_table(evaluation: Mapping[str, Any], count: int = 3, limit: int = 240) -> Table:
    """The first `count` samples: prompt, completion before, completion after, each at most `limit` characters."""
    table = Table(title=Text("Samples (reward in brackets)"), show_lines=True)
    for heading in ("prompt", "before", "after"):
        table.add_column(heading, ratio=1, overflow="fold")
    for sample in evaluation.get("samples", [])[:count]:
        cells = [Text(printable(sample["prompt"], limit))]
        for side in ("before", "after"):
            text = printable(sample.get(side) or "", limit)
            cells.append(Text(f"[{formatted(sample.get(f'reward_{side}'), '.3f')}] {text}"))
        table.add_row(*cells)
    return table


def rolled_back(rollbacks: int) -> str:
    """A clause on the roll-backs of a run."""
    times = "once" if rollbacks == 1 else f"{rollbacks} times"
    return f"The guard rolled this run back {times}: see incidents.jsonl"


def closing_line(run_dir: Path, evaluation: Mapping[str, Any], steps: int) -> str:
    """One line at the end of a run whose tables are not shown: the policy's folder, its reward, and where to look."""
    before, after = (evaluation.get(side, {}).get("reward") for side in ("before", "after"))
    known = before is not None and after is not None
    reward = f", reward {formatted(before, '.3f')} before and {formatted(after, '.3f')} after" if known else ""
    where = f"the policy is in {run_dir / 'final'}, the report in {run_dir / 'report.html'}"
    return f"{counted(steps, 'step')} done{reward}; {where}"


def print_summary(
    run_dir: str | Path,
    evaluation: Mapping[str, Any],
    resume_command: str | None,
    console: Console | None = None,
    rollbacks: int = 0,
) -> None:
    """Prints both tables (if there are held-out prompts), the run's folder, and the command that resumes it.

    ``rollbacks`` of the guard are said under the first table, or alone where there is none.
    """
    console = console or Console()
    if evaluation:
        console.print(summary_table(evaluation, rollbacks))
    elif rollbacks:
        console.print(Text(rolled_back(rollbacks)))
    if evaluation.get("samples"):
        console.print(samples_table(evaluation))
    lines = {"Run": str(run_dir), "Report": str(Path(run_dir) / "report.html"), "Resume": resume_command}
    for label, line in lines.items():
        if line is not None:  # soft wrap: a path or command that is copied must not contain line breaks
            console.print(Text(f"{label}: {visible(line, '⏎')}"), soft_wrap=True)
