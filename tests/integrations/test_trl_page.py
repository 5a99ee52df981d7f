"""The examples of docs/trl.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.runs import read_rows

PAGE = Path(__file__).parents[2] / "docs" / "trl.md"


def examples() -> list[str]:
    return re.findall(r"<!-- tests/.*? -->\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.filterwarnings("default")
def test_the_three_lines_train_with_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl")
    import trl
    from datasets import Dataset

    from stable_rlhf.config import ModelConfig
    from stable_rlhf.policy import load_policy, load_tokenizer
    from tests.integrations.trl_tiny import PROMPTS, vowels

    monkeypatch.chdir(tmp_path)
    config = ModelConfig(device="cpu")
    tokenizer = load_tokenizer(config)
    tokenizer.padding_side = "left"
    small = {"max_steps": 2, "per_device_train_batch_size": 4, "num_generations": 4, "use_cpu": True, "bf16": False}
    arguments, whole = trl.GRPOConfig, trl.GRPOTrainer
    monkeypatch.setattr(trl, "GRPOConfig", lambda **given: arguments(**given, **small, report_to="none"))
    monkeypatch.setattr(trl, "GRPOTrainer", lambda **given: whole(**given, processing_class=tokenizer))
    given: dict[str, Any] = {"model": load_policy(config)[0], "reward": vowels}
    given["dataset"] = Dataset.from_dict({"prompt": PROMPTS})
    exec(compile(examples()[0], str(PAGE), "exec"), given)  # noqa: S102  our own text
    rows, _ = read_rows(tmp_path / "runs" / "grpo" / "safe" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1]


def test_the_monitor_needs_a_loop_and_two_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    coefficients: list[float] = []
    exec(  # noqa: S102  our own text
        compile(examples()[1], str(PAGE), "exec"),
        {"my_step": lambda: (0.5, 0.4, 3.0), "set_coefficient": coefficients.append},
    )
    rows, _ = read_rows(tmp_path / "runs" / "mine" / "metrics.jsonl")
    assert coefficients == [row["safe/kl_coef"] for row in rows]
    assert len(rows) == 100
