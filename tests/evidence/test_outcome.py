"""The figures of one run, against literal numbers; what is missing or broken is an outcome that says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.evidence.compare import compare, to_json
from stable_rlhf.evidence.outcome import LARGEST, Outcome, Status, flat, reached, read_outcome
from stable_rlhf.evidence.page import rendered
from tests.evidence.outcomes import SCORES, incident, write_run


def rows(count: int, **figures: Any) -> list[dict[str, Any]]:
    """`count` rows; a figure is a value or a function of the step."""
    names = {"scores": SCORES, "kl": "objective/kl", "entropy": "objective/entropy"}
    return [
        {names.get(name, name): value(step) if callable(value) else value for name, value in figures.items()}
        for step in range(count)
    ]


def read(folder: Path) -> Outcome:
    return read_outcome(folder, folder.name)


def test_the_reward_is_averaged_over_all_steps_and_over_the_last_twenty(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "run", rows(100, scores=lambda step: float(step))))
    assert found.figures["reward/average"] == pytest.approx(49.5)
    assert found.figures["reward/final"] == pytest.approx(89.5)
    assert (found.status, found.why, found.steps) == (Status.FINISHED, None, 100)


def test_figures_at_the_end_are_means_of_five_steps(tmp_path: Path) -> None:
    many: Any = {
        "kl": lambda step: step / 10,
        "entropy": lambda step: 10.0 - step,
        "completions/distinct_2": lambda step: step / 100,
        "objective/ref_nll": lambda step: 3.0 + step,
        "completions/mean_length": lambda step: 2.0 * step,
        "val/explained_variance": lambda step: step / 10,
    }
    found = read(write_run(tmp_path / "run", rows(10, scores=1.0, **many))).figures
    assert found["kl/final"] == pytest.approx(0.7)
    assert found["kl/max"] == pytest.approx(0.9)
    assert found["entropy/final"] == pytest.approx(3.0)
    assert found["distinct_2/final"] == pytest.approx(0.07)
    assert found["ref_nll/final"] == pytest.approx(10.0)
    assert found["length/final"] == pytest.approx(14.0)
    assert found["explained_variance"] == pytest.approx(0.45)  # of all steps


def test_the_share_near_the_threshold_counts_steps_that_have_one(tmp_path: Path) -> None:
    kls, thresholds = [0.2, 0.251, 0.26, 0.344, 0.35, 0.3], [None, 0.3, 0.3, 0.3, 0.3, None]
    pairs = [{"objective/kl": k, "safe/threshold": t} for k, t in zip(kls, thresholds, strict=True)]
    assert read(write_run(tmp_path / "run", pairs)).figures["kl/near"] == pytest.approx(2 / 4)
    exact = [row | {"objective/kl_exact": 0.3} for row in pairs[:3]]  # what the controller saw
    assert read(write_run(tmp_path / "exact", [*exact, *pairs[3:]])).figures["kl/near"] == pytest.approx(3 / 4)


def test_steps_that_the_guard_undid_are_not_in_the_means(tmp_path: Path) -> None:
    scores = [1.0] * 30 + [-100.0] * 2 + [1.0] * 8
    done = [incident(30, "roll back"), incident(31, "roll back"), incident(33, "skip")]
    found = read(write_run(tmp_path / "run", [{SCORES: score} for score in scores], incidents=done)).figures
    assert found["reward/average"] == pytest.approx(1.0)
    assert (found["incidents"], found["rollbacks"], found["skipped"], found["healthy"]) == (3, 2, 1, 0)


def test_skipped_counts_the_guards_and_the_optimisers(tmp_path: Path) -> None:
    given = rows(4, scores=1.0, **{"policy/skipped_steps": 2, "safe/step_scale": lambda step: step / 4})
    found = read(write_run(tmp_path / "run", given, config={"guard": {"enabled": True}})).figures
    assert (found["skipped"], found["step_scale"], found["incidents"]) == (8, 0.375, 0)


def test_where_nobody_watches_there_are_no_incidents_to_count(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "run", rows(4, scores=1.0), config={"guard": {"enabled": False}})).figures
    assert not {"incidents", "rollbacks", "skipped"} & found.keys()


def test_costs_are_medians_and_the_largest_memory(tmp_path: Path) -> None:
    timings = [
        {"total_s": seconds, "tokens_per_s": 100 / seconds, "memory_gb": memory}
        for seconds, memory in ((9.0, 1.0), (1.0, 3.0), (2.0, 2.0))
    ]
    found = read(write_run(tmp_path / "run", rows(3, scores=1.0), timings=timings))
    assert (found.figures["seconds"], found.figures["tokens_per_s"], found.figures["memory"]) == (2.0, 50.0, 3.0)


def test_a_crash_and_the_drawdown_are_the_reports(tmp_path: Path) -> None:
    scores = [step / 50 for step in range(50)] + [0.0] * 50
    found = read(write_run(tmp_path / "run", [{SCORES: score} for score in scores])).figures
    assert (found["crashes"], found["healthy"]) == (1, 0)
    assert found["drawdown"] == pytest.approx(sum(range(30, 50)) / 20 / 50)


@pytest.mark.parametrize(
    ("name", "end", "healthy"), [("distinct", 0.45, 0), ("distinct", 0.55, 1), ("entropy", 0.2, 0)]
)
def test_a_run_that_lost_its_variety_or_entropy_is_not_healthy(
    tmp_path: Path, name: str, end: float, healthy: int
) -> None:
    metric = {"distinct": "completions/distinct_2", "entropy": "objective/entropy"}[name]
    given = rows(40, scores=1.0, **{metric: lambda step: 1.0 if step < 20 else end})
    assert read(write_run(tmp_path / "run", given)).figures["healthy"] == healthy


def test_a_run_that_stopped_early_says_so_and_is_neither_healthy_nor_not(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "run", rows(3, scores=1.0), config={"max_steps": 9}))
    assert (found.status, found.why) == (Status.UNFINISHED, "it did 3 of 9 steps")
    assert "healthy" not in found.figures


def test_a_run_that_the_guard_gave_up_says_why(tmp_path: Path) -> None:
    found = read(
        write_run(tmp_path / "run", rows(3, scores=1.0), config={"max_steps": 9}, incidents=[incident(2, "stop")])
    )
    assert (found.status, found.why) == (Status.GIVEN_UP, "the guard gave it up at step 2: seen")
    assert found.figures["healthy"] == 0


def test_gold_is_that_of_the_evaluation_after_training(tmp_path: Path) -> None:
    sides = {
        "before": {"reward": 0.1, "gold/lexicon/mean": 0.5},
        "during": [{"step": 2, "reward": 0.2, "gold/lexicon/mean": 0.7}],
        "after": {"reward": 0.9, "gold/lexicon/mean": 0.6},
    }
    found = read(write_run(tmp_path / "run", rows(4, scores=1.0), evaluation=sides))
    assert found.figures["gold/lexicon"] == pytest.approx(0.6)
    assert found.figures["reward/held_out"] == pytest.approx(0.9)
    steps, values = found.gold["lexicon"]
    assert (steps.tolist(), values.tolist()) == ([0, 2, 4], pytest.approx([0.5, 0.7, 0.6]))


def test_time_to_a_reward_is_when_the_average_of_twenty_steps_is_there(tmp_path: Path) -> None:
    given = rows(60, scores=lambda step: 1.0 if step >= 10 else 0.0)
    found = read(write_run(tmp_path / "run", given, timings=[{"total_s": 2.0}] * 60))
    assert reached(found, 0.75) == (25, pytest.approx(50.0))  # steps 5 to 24: fifteen of twenty are 1
    assert reached(found, 1.01) is None


def test_a_folder_without_a_run_is_missing_and_a_broken_one_says_where(tmp_path: Path) -> None:
    assert read(tmp_path / "none").status is Status.MISSING
    run = write_run(tmp_path / "run", rows(3, scores=1.0))
    (run / "metrics.jsonl").write_text('{"step": 0, "objective/scores": NaN}\n')
    found = read(run)
    assert found.status is Status.BROKEN
    assert found.why is not None
    assert "metrics.jsonl:1:" in found.why


def test_a_truncated_last_line_is_left_out_and_noted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows(3, scores=1.0))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "objective/sco')
    found = read(run)
    assert found.steps == 3
    assert any("incomplete line" in note for note in found.notes)


def test_values_that_float32_does_not_have_are_the_largest_that_it_has(tmp_path: Path) -> None:
    found = read(write_run(tmp_path / "run", [{SCORES: sign * 1e99} for sign in (1, -1) * 20]))
    assert found.curves[SCORES][1].tolist() == [LARGEST, -LARGEST] * 20
    assert reached(found, 1.0) is None  # the mean of twenty is 0


def test_the_device_is_an_input_without_its_number(tmp_path: Path) -> None:
    for device, name in (("cuda:1, NVIDIA H100", "NVIDIA H100"), ("cpu", "cpu")):
        start = {"time": "2026-01-01", "device": device}
        found = read(write_run(tmp_path / name, rows(2), starts=[start]))
        assert found.inputs["device"] == name


def test_settings_are_flat() -> None:
    assert flat({"kl": {"settings": {"budget": 0.3}}, "seed": 1, 2: 3}) == {
        "kl.settings.budget": 0.3,
        "seed": 1,
        "2": 3,
    }


def test_a_comparison_shows_no_secret_of_a_url(tmp_path: Path) -> None:
    found = []
    for host in ("host1", "host2"):
        url = f"https://me:hunter2@{host}/score?key=hunter2"
        found.append(read_outcome(write_run(tmp_path / host, rows(30), config={"reward": {"functions": [url]}}), host))
    made = compare(found)
    assert "host1" in rendered(made)
    assert "hunter2" not in rendered(made)
    assert "hunter2" not in to_json(made)
