"""benchmarks/: the scripts run, measure what they say, and print the figures that docs/ quote."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from stable_rlhf.training.trainer import SAFETrainer

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["--batch-size", "4", "--max-completion-length", "4", "--device", "cpu"]


def script(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT / "benchmarks"))  # as for `python benchmarks/overhead.py`, which imports its neighbours
overhead = script("overhead")


@pytest.fixture
def tiny(tiny_folder: Path) -> list[str]:
    return [*SIZES, "--model", str(tiny_folder)]


def test_overhead_prints_every_part_and_the_origin(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overhead.main([*tiny, "--pairs", "4", "--warmup", "1", "--memory-repeats", "0"])
    printed = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:5] for line in printed.splitlines() if line.startswith("| ")}
    parts = ("rollout", "scoring", "update", "total")
    seconds = {part: [float(cell.split("(")[0]) for cell in rows[f"{part}, s a step"][:2]] for part in parts}
    for preset in (0, 1):
        assert seconds["update"][preset] > 0
        assert seconds["rollout"][preset] + seconds["update"][preset] < 1.5 * seconds["total"][preset]
        # 16 tokens a step; the table rounds seconds to 1e-4
        per_token = float(rows["microseconds a token"][preset])
        assert per_token == pytest.approx(seconds["total"][preset] / 16 * 1e6, abs=0.6e-4 / 16 * 1e6)
    ratio, low, high = map(float, re.findall(r"\d+\.\d+", rows["total, s a step"][2]))
    assert low <= ratio <= high
    assert "4 pairs after 1; 4 completions of 4 tokens; seed 0" in printed
    assert f"torch {overhead.torch.__version__}" in printed


def test_both_presets_see_the_same_texts_of_the_same_length_and_learn_nothing(tiny: list[str], tmp_path: Path) -> None:
    arguments = overhead.parse([*tiny, "--pairs", "3", "--warmup", "0"])
    scored: dict[str, list[list[str]]] = {"safe": [], "ppo": []}
    for preset, texts in scored.items():
        trainer: SAFETrainer = overhead.make_trainer(preset, tmp_path / preset, arguments)
        score = trainer.scorer.score

        def keep(prompts, completions, *more, texts=texts, score=score):
            texts.append(list(completions))
            return score(prompts, completions, *more)

        trainer.scorer.score = keep  # type: ignore[method-assign]
        for _ in range(3):
            seconds, cpu = overhead.take_step(trainer, seed=0)
            assert min(seconds, cpu) > 0
        rows = [json.loads(line) for line in (tmp_path / preset / "metrics.jsonl").read_text().splitlines()]
        assert {row["completions/min_length"] for row in rows} == {4}
        assert {row["completions/max_length"] for row in rows} == {4}
        assert all(abs(row["objective/kl"]) < 1e-5 for row in rows)
        assert not (tmp_path / preset / "checkpoints").exists()
    assert scored["safe"] == scored["ppo"]
    assert len(set(map(tuple, scored["safe"]))) == 3


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="compares with what Linux says of the process")
def test_peak_memory_counts_what_a_process_of_its_own_holds(
    tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overhead.main([*tiny, "--memory-of", "ppo"])
    mebibytes = float(capsys.readouterr().out.splitlines()[-1])
    resident = int(re.findall(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) / 1024
    assert mebibytes >= 0.9 * resident > 100  # the peak is no less than what is held now


def test_the_ratio_is_the_median_over_pairs_and_its_interval_holds_the_truth_in_19_of_20_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert overhead.ratio([2.0, 12.0, 9.0], [1.0, 3.0, 2.0])[0] == 4.0  # of 2, 4 and 4.5; the medians' ratio is 4.5
    assert overhead.ratio([3.0] * 9, [2.0] * 9) == (1.5, 1.5, 1.5)
    rng, held = overhead.random.Random(1), 0
    monkeypatch.setattr(overhead, "RESAMPLES", 200)  # ends of the interval to a per cent or two: enough here
    for _ in range(100):
        load = [rng.lognormvariate(0, 0.5) for _ in range(30)]  # falls on both of a pair alike
        first = [1.1 * each * rng.lognormvariate(0, 0.05) for each in load]
        second = [each * rng.lognormvariate(0, 0.05) for each in load]
        _, low, high = overhead.ratio(first, second)
        held += low <= 1.1 <= high
        assert high - low < 0.2  # the load, ten times the noise, cancels
    assert held >= 88


def test_spread_is_half_the_distance_between_the_quartiles() -> None:
    assert overhead.spread([1.0, 2.0, 3.0, 4.0, 5.0]) == 1.0
    assert overhead.spread([7.0]) == 0.0


def test_overhead_measures_a_shape_with_its_adapter_and_prompts_of_one_length(tmp_path: Path) -> None:
    arguments = overhead.parse([*SIZES, "--shape", "tiny", "--prompt-length", "6", "--pairs", "1", "--warmup", "0"])
    trainers = [overhead.make_trainer(preset, tmp_path / preset, arguments) for preset in ("safe", "ppo")]
    weights = [dict(trainer.model.policy.named_parameters()) for trainer in trainers]
    for trainer, own in zip(trainers, weights, strict=True):
        assert {len(ids) for ids in trainer.train_prompts.input_ids} == {6}
        adapters = [weight for name, weight in own.items() if "lora_A" in name]
        assert len(adapters) == 2 * 7  # two layers of seven linear maps
        assert {len(weight) for weight in adapters} == {128}
        assert min(overhead.take_step(trainer, seed=0)) > 0
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0] if "lora_" not in name)
    assert "shape tiny, LoRA 128, prompts of 6 tokens" in overhead.origin(arguments, torch.device("cpu"))


def test_overhead_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        overhead.parse(["--presets", "safe"])
    assert "expected 2 arguments" in capsys.readouterr().err
