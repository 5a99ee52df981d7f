"""The model card: what it says, and that no name in it acts as markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from stable_rlhf import Config
from stable_rlhf.config import flat_settings
from stable_rlhf.runs import evaluation, incidents, model_card


def card(run: Path, adapter: bool = False, **sections: dict[str, Any]) -> str:
    return model_card(run, flat_settings(Config.from_preset("safe", **sections).to_dict()), adapter)


def test_the_card_has_data_reward_figures_incidents_and_settings(tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    row = {"step": 3, "objective/scores": 1.25, "objective/kl": 0.125, "objective/entropy": 2.5}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    sample = {"prompt": "SECRET PROMPT", "completion": "SECRET ANSWER", "reward": 1.0}
    for side, reward in (("before", 1.0), ("after", 1.5)):
        evaluation.record(run, side, {"reward": reward, "reward_se": 0.25, "prompts": 8}, [sample])
    incident = {"step": 2, "action": "roll back", "rule": "max_kl", "seen": "", "done": "", "advice": "", "figures": {}}
    incidents.record(run, incident)
    text = card(
        run, model={"name": "org/base"}, data={"train": "org/prompts"}, reward={"functions": ["a.b:f", "c.d:g"]}
    )
    lines = text.splitlines()
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "library_name": "transformers",
        "tags": ["stable-rlhf", "rlhf"],
        "base_model": "org/base",
        "datasets": ["org/prompts"],
        "pipeline_tag": "text-generation",
    }
    assert "| reward | 1.0000 ± 0.2500 | 1.5000 ± 0.2500 | +0.5000 |" in lines
    assert "| reward | 1.25 |" in lines
    assert "| reward | 1 x `a.b:f` + 1 x `c.d:g` |" in lines
    assert "The guard saw 1, and rolled the run back 1 times." in lines
    assert "- step 2: `max_kl`, roll back" in lines
    assert "    optim.learning_rate: 1e-05" in lines or "    optim.learning_rate: " in text
    assert "SECRET" not in text
    assert "AutoPeftModelForCausalLM" not in text
    assert "AutoPeftModelForCausalLM" in card(run, adapter=True)


def test_names_are_code_and_only_hub_names_are_metadata(tmp_path: Path) -> None:
    hostile = "`|<img src=x>\n# [a](b)\x1b[2J"
    text = card(tmp_path, model={"name": hostile}, data={"train": "/a/folder"})
    assert "`'\u00a6<img src=x>\u23ce# [a](b)\\x1b[2J`" in text
    assert not {"base_model", "datasets"} & yaml.safe_load(text.split("---\n")[1]).keys()
    outside = [line for line in text.splitlines() if "<img" in line and not line.startswith("    ")]
    assert all("`'\u00a6<img" in line for line in outside)
    assert "\n# [a]" not in text


def test_the_card_of_a_checkpoint_has_no_figures_of_later_steps(tmp_path: Path) -> None:
    rows = [{"step": step, "objective/scores": step + 0.5} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"prompt": "p", "completion": "c", "reward": 1.0}
    for side, reward in (("before", 1.0), ("after", 9.0)):
        evaluation.record(tmp_path, side, {"reward": reward, "prompts": 8}, [sample])
    evaluation.record_during(tmp_path, 2, {"reward": 3.0, "prompts": 8})
    for step in (1, 3):
        fields = {"step": step, "action": "skip", "rule": "max_kl", "seen": "", "done": "", "advice": "", "figures": {}}
        incidents.record(tmp_path, fields)
    known = flat_settings(Config.from_preset("safe").to_dict())
    reward = {}
    for steps in (1, 2, 4):
        lines = model_card(tmp_path, known, adapter=False, steps=steps).splitlines()
        reward[steps] = next(line for line in lines if line.startswith("| reward | 1.0000"))
        assert f"| reward | {steps - 0.5:g} |" in lines
        seen = sum(line.startswith("- step ") for line in lines)
        assert seen == {1: 0, 2: 1, 4: 2}[steps]
    assert reward == {
        1: "| reward | 1.0000 | - | - |",
        2: "| reward | 1.0000 | 3.0000 | +2.0000 |",
        4: "| reward | 1.0000 | 9.0000 | +8.0000 |",
    }
    best = {**known, "load_best_model_at_end": True}  # what was evaluated at the end is then another checkpoint's
    assert reward[1] in model_card(tmp_path, best, adapter=False, steps=4)
