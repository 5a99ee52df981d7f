"""The Python examples in README.md and docs/algorithm.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.tiny_runs import rows, settings, trainer

ROOT = Path(__file__).resolve().parents[1]


def example(page: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return found


def test_the_python_example_trains_and_writes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = example("README.md")
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "example"})  # noqa: S102  our own text
    (run,) = (tmp_path / "runs").iterdir()
    written = rows(run)
    assert [row["step"] for row in written] == [0, 1, 2, 3, 4]
    assert {"rewards/brevity/mean", "rewards/builtin/mean"} <= written[0].keys()
    assert (run / "final" / "model.safetensors").is_file()


def test_a_loop_of_ones_own_gives_the_rows_of_train_and_the_model(tokenizer, tmp_path: Path) -> None:
    made = {name: trainer(settings(tmp_path / name), tokenizer) for name in ("own", "train")}
    made["train"].train()
    code = compile(example("docs/algorithm.md"), "docs/algorithm.md", "exec")
    exec(code, {"trainer": made["own"]})  # noqa: S102  our own text
    assert rows(made["own"].run_dir) == rows(made["train"].run_dir)
    assert (tmp_path / "own" / "final" / "model.safetensors").is_file()
    assert not (tmp_path / "own" / "snapshot").exists()
