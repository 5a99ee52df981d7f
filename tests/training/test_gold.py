"""Gold rewards are measured on the held-out prompts, each by itself, and change nothing of the run."""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from stable_rlhf import ConfigError, RewardError
from stable_rlhf.errors import CheckpointError, RewardInputError
from stable_rlhf.report.html import write_report
from stable_rlhf.runs import gold_figures
from tests.tiny_runs import letters, settings, trainer

HELD_OUT = [{"prompt": f"held out {i}", "label": i} for i in range(11)]


def evaluated(folder: Path, **overrides: Any) -> Any:
    return settings(folder, **{"max_steps": 2, "save_steps": 0, "eval_steps": 1, **overrides})


class Length:
    """A gold reward that keeps what it was asked; every third label is not judged."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, prompts: list[Any], completions: list[str], label: list[int], **others: Any) -> list[Any]:
        self.asked += zip(prompts, completions, strict=True)
        return [None if n % 3 == 0 else float(len(text)) for n, text in zip(label, completions, strict=True)]


class Ones:
    def __call__(self, prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(prompts)


def constant(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [2.5] * len(prompts)


def silent(prompts: list[Any], completions: list[Any], **columns: Any) -> list[None]:
    return [None] * len(prompts)


# -- what it measures ---------------------------------------------------------------------------------------------


def test_each_gold_reward_has_mean_error_and_number_in_every_evaluation(tokenizer, tmp_path: Path) -> None:
    gold = Length()
    seen: list[dict[str, Any]] = []

    class Record(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
            seen.append(metrics)

    run = trainer(
        evaluated(tmp_path), tokenizer, gold_funcs=[gold, constant, silent], eval_dataset=HELD_OUT, callbacks=[Record()]
    )
    result = run.train()
    assert {prompt for prompt, _ in gold.asked} == {row["prompt"] for row in HELD_OUT}
    sides = [result["before"], *result["during"]]  # the last evaluation in training is the one after it too
    assert len(gold.asked) == len(sides) * len(HELD_OUT) == 33
    for number, figures in enumerate(sides):
        texts = [text for _, text in gold.asked[11 * number : 11 * number + 11]]
        scores = [float(len(text)) for n, text in enumerate(texts) if n % 3]
        assert figures["gold/Length/mean"] == pytest.approx(statistics.fmean(scores), rel=1e-12)
        assert figures["gold/Length/se"] == pytest.approx(statistics.stdev(scores) / math.sqrt(7), rel=1e-12)
        assert [figures[f"gold/{name}/judged"] for name in ("Length", "constant", "silent")] == [7, 11, 0]
        assert [figures[f"gold/constant/{name}"] for name in ("mean", "se")] == [2.5, 0.0]
        assert [figures[f"gold/silent/{name}"] for name in ("mean", "se")] == [None, None]
    assert result["after"] == {name: value for name, value in result["during"][1].items() if name != "step"}
    assert json.loads((tmp_path / "evaluation.json").read_text())["during"] == result["during"]
    assert [metrics["eval_gold/Length/mean"] for metrics in seen] == [side["gold/Length/mean"] for side in sides]
    assert result.metrics["eval_gold/Length/mean_before"] == sides[0]["gold/Length/mean"]
    assert run.evaluate()["gold/Length/mean"] == result["after"]["gold/Length/mean"]
    assert {"Length", "constant"} & {name.split("/")[1] for name in json_row(tmp_path) if "/" in name} == set()


def json_row(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def test_card_and_report_have_the_gold_rewards(tokenizer, tmp_path: Path) -> None:
    run = trainer(evaluated(tmp_path), tokenizer, gold_funcs=[Length(), constant], eval_dataset=HELD_OUT)
    result = run.train()
    card = (tmp_path / "final" / "README.md").read_text()
    assert (
        "| gold reward, only measured | `tests.training.test_gold:Length`, `tests.training.test_gold:constant` |"
        in card
    )
    assert "| gold: `constant` | 2.5000 ± 0.0000 | 2.5000 ± 0.0000 | +0.0000 |" in card
    mean, error = (result["after"][f"gold/Length/{name}"] for name in ("mean", "se"))
    assert f"{mean:.4f} ± {error:.4f} (of 7)" in card
    page = write_report(tmp_path).read_text()
    assert "<h4>Reward and gold</h4>" in page
    assert "<td>gold: Length</td>" in page


def by_chance(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward that reads whatever of the process a gold reward could change."""
    noise = random.random() + float(np.random.rand()) + torch.rand(()).item()
    return [score + noise + len(os.environ.get("GOLD", "")) for score in letters(prompts, completions)]


def unruly(prompts: list[Any], completions: list[Any], log_metric: Any = None, **columns: Any) -> list[float]:
    os.environ["GOLD"] = "was here"
    torch.set_default_dtype(torch.float64)
    log_metric("of_gold", 1.0)
    return [random.random() + float(np.random.rand()) + torch.rand(()).item() for _ in prompts]


def test_a_run_with_gold_is_byte_for_byte_the_run_without(tokenizer, tmp_path: Path) -> None:
    runs = []
    for name, gold in (("without", {}), ("with", {"gold_funcs": [unruly, "builtin"]})):
        config = evaluated(tmp_path / name, save_steps=1, log={"completions_steps": 1})
        run = trainer(config, tokenizer, by_chance, eval_dataset=HELD_OUT, **gold)
        run.train()
        runs.append((run, random.random(), float(np.random.rand()), torch.rand(()).item()))
    (without, *own), (with_gold, *others) = runs
    assert own == others
    for file in ("metrics.jsonl", "completions/step-000001.parquet", "final/model.safetensors"):
        assert (without.run_dir / file).read_bytes() == (with_gold.run_dir / file).read_bytes(), file
    for step in ("step-000001", "step-000002"):
        here, there = (run.run_dir / "checkpoints" / step for run in (without, with_gold))
        for file in sorted(here.glob("*.safetensors")):
            tensors = load_file(file), load_file(there / file.name)
            assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
        states = [json.loads((folder / "state.json").read_text()) for folder in (here, there)]
        for parts in zip(*((state["parts"], state["snapshot"]["parts"]) for state in states), strict=True):
            for part in {"settings", "inputs"} & set(parts[0]):
                assert parts[0].pop(part) != parts[1].pop(part)
        assert states[0] == states[1]
    evaluations = [json.loads((run.run_dir / "evaluation.json").read_text()) for run in (without, with_gold)]
    for side in ("before", "after"):
        kept = {name: value for name, value in evaluations[1][side].items() if not name.startswith("gold/")}
        assert kept == evaluations[0][side]
        assert set(evaluations[1][side]) - set(kept) == {
            f"gold/{name}/{figure}" for name in ("unruly", "builtin") for figure in ("mean", "se", "judged")
        }
    assert evaluations[0]["samples"] == evaluations[1]["samples"]


def test_a_gold_reward_that_draws_gives_the_same_in_every_evaluation(tokenizer, tmp_path: Path) -> None:
    run = trainer(settings(tmp_path), tokenizer, by_chance, gold_funcs=unruly, eval_dataset=HELD_OUT)
    figures = run.evaluate()
    assert run.evaluate() == figures
    assert figures["gold/unruly/mean"] != figures["reward"]


def test_a_gold_reward_that_fails_is_named(tokenizer, tmp_path: Path) -> None:
    def fails(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        raise TimeoutError("no answer")

    run = trainer(settings(tmp_path), tokenizer, gold_funcs=[fails], eval_dataset=HELD_OUT)
    with pytest.raises(RewardError, match="gold reward 'fails' raised TimeoutError: 'no answer'"):
        run.evaluate()


@pytest.mark.usefixtures("module_that_draws")
def test_what_a_gold_reward_does_when_it_is_loaded_stays_its_own(tokenizer, tmp_path: Path) -> None:
    plain = trainer(settings(tmp_path / "a"), tokenizer, eval_dataset=HELD_OUT)
    own = torch.rand(())
    gold = trainer(settings(tmp_path / "b"), tokenizer, gold_funcs="gold_that_draws:score", eval_dataset=HELD_OUT)
    assert (torch.rand(()), torch.get_default_dtype()) == (own, torch.float32)
    assert torch.equal(gold._random["cpu"], plain._random["cpu"])


def test_a_module_of_a_reward_and_a_gold_reward_does_the_same_to_the_run(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is imported once, for the reward."""
    code = "import torch\ntorch.rand(3)\ndef one(prompts, completions, **columns): ...\ndef two(*_, **__): ...\n"
    (tmp_path / "both_of_one_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    states = []
    for gold in (None, "both_of_one_module:two"):
        sys.modules.pop("both_of_one_module", None)
        config = settings(tmp_path / "run")
        run = trainer(config, tokenizer, "both_of_one_module:one", gold_funcs=gold, eval_dataset=HELD_OUT)
        states.append(run._random["cpu"])
    assert torch.equal(*states)


def test_settings_of_texts_act_on_gold_rewards(tokenizer, tmp_path: Path) -> None:
    seen: list[str] = []

    def ends(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(completions)
        return [0.0] * len(prompts)

    config = settings(tmp_path, reward={"skip_special_tokens": False, "append_eos": True})
    many = [{"prompt": f"held out {i}"} for i in range(100)]  # every 86th token of the policy is a special one
    run = trainer(config, tokenizer, "builtin", gold_funcs=[ends], eval_dataset=many)
    run.evaluate()
    assert any(token in text for text in seen for token in tokenizer.all_special_tokens)
    with pytest.raises(ConfigError, match="append_eos=True: has no effect unless one of the rewards is a reward model"):
        trainer(config, tokenizer, gold_funcs=[ends], eval_dataset=HELD_OUT)
    trainer(config, tokenizer, gold_funcs=["builtin"], eval_dataset=HELD_OUT)


@pytest.fixture
def module_that_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import torch\ntorch.rand(3)\ntorch.set_default_dtype(torch.float64)\n"
    code += "def score(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n"
    (tmp_path / "gold_that_draws.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


def test_the_figures_of_few_scores() -> None:
    assert gold_figures("a", []) == {"gold/a/mean": None, "gold/a/se": None, "gold/a/judged": 0}
    assert gold_figures("a", [1.5]) == {"gold/a/mean": 1.5, "gold/a/se": None, "gold/a/judged": 1}
    two = gold_figures("a", [1.0, 3.0])  # deviation sqrt(2), over sqrt(2)
    assert two == {"gold/a/mean": 2.0, "gold/a/se": pytest.approx(1.0), "gold/a/judged": 2}


# -- the best checkpoint ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gold/nears/mean", "gold/nears"])
def test_the_best_checkpoint_may_be_that_of_a_gold_reward(tokenizer, tmp_path: Path, name: str) -> None:
    def nears(prompts: list[Any], completions: list[Any], trainer_state: Any, **columns: Any) -> list[float]:
        return [(0.0, 7.0, 5.0)[trainer_state.global_step]] * len(prompts)

    run = trainer(evaluated(tmp_path, metric_for_best_model=name), tokenizer, gold_funcs=[nears], eval_dataset=HELD_OUT)
    result = run.train()
    assert [side["gold/nears/mean"] for side in (result["before"], *result["during"])] == [0.0, 7.0, 5.0]
    assert (run.state.best_metric, run.state.best_global_step) == (7.0, 1)


def test_a_best_metric_of_a_gold_reward_that_is_not_there_lists_those_that_are(tokenizer, tmp_path: Path) -> None:
    config = evaluated(tmp_path, metric_for_best_model="gold/other")
    with pytest.raises(ConfigError, match=r"metric_for_best_model='gold/other/mean': .*, length, gold/constant/mean$"):
        trainer(config, tokenizer, gold_funcs=constant, eval_dataset=HELD_OUT)
    with pytest.raises(ConfigError, match=r"metric_for_best_model='gold/other/mean': choose one of .*, length$"):
        trainer(config, tokenizer, eval_dataset=HELD_OUT)


# -- what is refused ----------------------------------------------------------------------------------------------


def test_gold_without_held_out_prompts_would_do_nothing(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.gold=\['tests.*constant'\]: there are no held-out prompts; give"):
        trainer(settings(tmp_path), tokenizer, gold_funcs=[constant])


def test_a_gold_reward_that_is_trained_on_is_refused_and_one_of_the_same_name_is_not(tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"reward\.gold: 'tests\.tiny_runs:letters' is one of the rewards"):
        trainer(settings(tmp_path), tokenizer, letters, gold_funcs=[letters], eval_dataset=HELD_OUT)
    config = settings(tmp_path, reward={"gold": ["tests.tiny_runs:letters"]})
    with pytest.raises(ConfigError, match=r"reward\.gold: 'tests\.tiny_runs:letters' is one of the rewards"):
        trainer(config, tokenizer, letters, eval_dataset=HELD_OUT)
    (tmp_path / "judge").mkdir()
    with pytest.raises(ConfigError, match=r"reward\.gold: '.*/judge' is one of the rewards"):
        trainer(settings(tmp_path), tokenizer, f"{tmp_path}/judge/", gold_funcs=tmp_path / "judge")
    config = settings(tmp_path, reward={"gold": ["builtin"]})
    with pytest.raises(ConfigError, match=r"reward\.gold: 'builtin' is one of the rewards"):
        trainer(config, tokenizer, None, eval_dataset=HELD_OUT)
    assert trainer(config, tokenizer, eval_dataset=HELD_OUT).gold.names == ["builtin"]
    run = trainer(settings(tmp_path), tokenizer, Ones(), gold_funcs=[Ones(), Ones()], eval_dataset=HELD_OUT)
    assert (run.scorer.names, run.gold.names) == (["Ones"], ["Ones", "Ones-2"])
    with pytest.raises(RewardInputError, match="gold reward 'Length' asks for 'label', which is no column"):
        trainer(settings(tmp_path), tokenizer, gold_funcs=Length(), eval_dataset=[{"prompt": "p"}])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"gold_funcs": [3]}, r"SAFETrainer\(gold_funcs=3\): is an int; give functions"),
        ({"gold_funcs": [constant], "gold_processing_classes": "x"}, r"SAFETrainer\(gold_processing_classes='x'\)"),
        (
            {"gold_funcs": [constant], "gold_processing_classes": [None, None]},
            "gold_processing_classes has 2 entries for 1 gold_funcs",
        ),
    ],
)
def test_an_argument_of_another_kind_is_named(tokenizer, tmp_path: Path, arguments: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        trainer(settings(tmp_path), tokenizer, eval_dataset=HELD_OUT, **arguments)


# -- resume -------------------------------------------------------------------------------------------------------


def test_a_resume_measures_on_and_refuses_another_gold_reward(tokenizer, tmp_path: Path, capsys: Any) -> None:
    given = {"gold_funcs": [constant], "eval_dataset": HELD_OUT}
    whole = trainer(evaluated(tmp_path / "whole"), tokenizer, **given)
    whole.train()
    trainer(evaluated(tmp_path / "parts", max_steps=1), tokenizer, **given).train()

    def another(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return [3.5] * len(prompts)

    def resumed(gold: Any, **overrides: Any) -> None:
        arguments = {"gold_funcs": [gold], "eval_dataset": HELD_OUT}
        run = trainer(evaluated(tmp_path / "parts", **overrides), tokenizer, **arguments)
        run.train(resume_from_checkpoint=True)

    with pytest.raises(CheckpointError, match=r"reward\.gold is \['tests.*another'\] here and \['tests.*constant'\]"):
        resumed(another)
    another.__qualname__ = another.__name__ = "constant"
    with pytest.raises(CheckpointError, match="the gold reward 'constant' is not the one that the run began with"):
        resumed(another)
    resumed(constant)
    assert (tmp_path / "whole/evaluation.json").read_text() == (tmp_path / "parts/evaluation.json").read_text()
    resumed(another, max_steps=3, reward={"accept_changed": True})
    assert "the gold reward 'constant' is not the one" in capsys.readouterr().err
