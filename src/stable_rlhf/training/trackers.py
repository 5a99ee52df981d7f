"""Tables of completions in the trackers that have tables; figures reach every tracker by its ``on_log``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import (
    MLflowCallback,
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)

from stable_rlhf.text import printable

ROWS = 16
"""Completions of a step in a tracker's table: a screen of them. completions/ has all."""

CHARACTERS = 1000
"""Characters shown of a prompt or completion, so that a table opens at once."""


class NumbersToMLflow(MLflowCallback):
    """MLflow's metrics are numbers: Transformers' callback would warn of each text in each step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, model: Any = None, **kwargs: Any) -> None:
        numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
        super().on_log(args, state, control, numbers, model=model, **kwargs)


def trackers(names: Sequence[str]) -> list[type[TrainerCallback]]:
    """The classes of Transformers' callbacks for trackers."""
    found = get_reporting_integration_callbacks(list(names))
    return [NumbersToMLflow if callback is MLflowCallback else callback for callback in found]


def log_completions(
    callbacks: Sequence[TrainerCallback],
    arguments: TrainingArguments,
    step: int,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Hands the first ROWS completions of a step to the trackers among ``callbacks``.

    Texts are made safe to show (`printable`), because trackers render Markdown and HTML. ``step``: steps done.
    """
    shown = [
        {"step": step, **{name: printable(v, CHARACTERS) if isinstance(v, str) else v for name, v in row.items()}}
        for row in rows[:ROWS]
    ]
    columns = list(shown[0])
    data = [list(row.values()) for row in shown]
    for callback in callbacks:
        tracker: Any = callback  # their clients are attributes that Transformers names with an underscore
        if isinstance(callback, TensorBoardCallback):
            if tracker.tb_writer is None:
                tracker._init_summary_writer(arguments)
            writer: Any = tracker.tb_writer
            writer.add_text("completions", _markdown(columns, data), step)
        elif isinstance(callback, WandbCallback) and tracker._wandb is not None:
            tracker._wandb.log({"completions": tracker._wandb.Table(columns=columns, data=data)})
        elif isinstance(callback, TrackioCallback):
            import pandas  # trackio's own dependency

            tracker._trackio.log({"completions": tracker._trackio.Table(dataframe=pandas.DataFrame(shown))})
        elif isinstance(callback, MLflowCallback):
            table = {name: [row[name] for row in shown] for name in columns}
            tracker._ml_flow.log_table(data=table, artifact_file="completions.json")


def _markdown(columns: Sequence[str], data: Sequence[Sequence[Any]]) -> str:
    """A Markdown table. Each text stands as code, in which nothing is markup."""

    def cell(value: Any) -> str:
        if not isinstance(value, str):
            return "" if value is None else f"{value:.4g}"
        return "`" + value.replace("`", "'").replace("|", "\u00a6") + "`"

    lines = [columns, ["---"] * len(columns), *([cell(value) for value in row] for row in data)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
