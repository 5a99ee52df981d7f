"""report: which figures, rows and files a report shows, and what a disk that is full leaves of it."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.errors import SaveError
from stable_rlhf.report import html
from stable_rlhf.report import run as report_run
from stable_rlhf.report.crashes import RewardCrash
from stable_rlhf.runs import metrics
from tests.report.test_report import Page, fake_rows, fake_run


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def headline(folder: Path, rows: list[dict[str, Any]]) -> report_run.Headline:
    return report_run.headline(report_run.read_run(written(folder, rows)))


def test_a_report_that_finds_no_room_leaves_the_old_one_as_it_was(tmp_path: Path) -> None:
    rows = [{"step": step} for step in range(3)]
    before = html.write_report(written(tmp_path, rows[:2])).read_bytes()
    written(tmp_path, rows)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(SaveError, match="File too large"):
            html.write_report(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "report.html").read_bytes() == before
    assert html.write_report(tmp_path).read_bytes() != before


def test_the_figures_at_the_top_are_of_the_last_step_of_all_steps_or_of_the_last_twenty(tmp_path: Path) -> None:
    rows = [
        {"step": 2 * t + 5, "objective/scores": float(t), "objective/kl": kl, "objective/entropy": 3.0 - t / 10}
        for t, kl in enumerate([0.1, 0.9, *[0.2] * 24, 0.3])
    ]
    head = headline(tmp_path, rows)
    assert (head.steps, head.reward) == (58, 16.5)  # the last step's number and one; the mean of 7..26
    assert (head.kl_end, head.kl_max) == (0.3, 0.9)  # the largest was long ago
    assert head.entropy == pytest.approx(0.4, abs=1e-12)


@pytest.mark.parametrize(("rewards", "mean"), [([1.0, 2.0, 6.0], 3.0), ([4.0], 4.0), ([0.0] + [1.0] * 20, 1.0)])
def test_the_reward_of_a_short_run_is_the_mean_of_the_steps_that_there_are(
    tmp_path: Path, rewards: list[float], mean: float
) -> None:
    rows = [{"step": step, "objective/scores": reward} for step, reward in enumerate(rewards)]
    assert headline(tmp_path, rows).reward == mean


def test_the_largest_fall_is_the_largest_ever_of_the_average_from_its_own_peak(tmp_path: Path) -> None:
    """R is 1 from 39 on, 0.5 at its lowest, at 69, and back at 1 in the end; a single reward of 9 is no peak of R."""
    rewards = [0.0] * 20 + [1.0] * 40 + [0.0] * 10 + [1.0] * 30
    rewards[3] = 9.0
    rows = [{"step": step, "objective/scores": reward} for step, reward in enumerate(rewards)]
    assert headline(tmp_path, rows).largest_fall == pytest.approx(0.5, abs=1e-12)


def crashing(**more: Any) -> list[dict[str, Any]]:
    """A series whose only crash, without errors, is from 65 to 89 (see test_report.py)."""
    rewards = [0.0] * 20 + [1.0] * 40 + [0.0] * 20 + [1.0] * 40
    return [{"step": step, "objective/scores": reward, **more} for step, reward in enumerate(rewards)]


def test_a_fall_within_its_error_is_not_counted_as_a_crash(tmp_path: Path) -> None:
    """The largest fall, 1, is less than 3 x 1.067 x sqrt(40) / 20; its error comes from 10 completions a step."""
    assert headline(tmp_path, crashing()).crashes == (RewardCrash(begin=65, end=89, depth=1.0),)
    rows = [row | {"objective/scores_std": 3.2, "episode": 10 * (row["step"] + 1)} for row in crashing()]
    head = headline(tmp_path, rows)
    assert (head.crashes, head.errors_known) == ((), True)
    assert head.largest_fall == pytest.approx(1.0, abs=1e-12)


def test_errors_are_those_of_the_steps_that_have_a_reward(tmp_path: Path) -> None:
    """A step in which nothing was scored has neither, and takes no other step's error away."""
    rows = [row | {"objective/scores_std": 0.1, "episode": 65 * (row["step"] + 1)} for row in crashing()]
    rows[30] |= {"objective/scores": None, "objective/scores_std": None}
    head = headline(tmp_path, rows)
    assert head.errors_known
    assert [(crash.begin, crash.end) for crash in head.crashes] == [(64, 88)]  # one reward fewer before them


def test_a_run_is_finished_at_its_last_planned_step_and_not_before(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: safe\nmax_steps: 3\n")
    for done, said in ((2, "Stopped before its end: 2 of 3 steps."), (3, "Finished: 3 steps.")):
        written(tmp_path, [{"step": step} for step in range(done)])
        assert said in Page(html.write_report(tmp_path)).text


def test_the_completions_shown_are_the_newest_by_number(tmp_path: Path) -> None:
    row = {"prompt": "p", "score": 0.5, "length": 9, "kl": 0.2}
    for step in (20, 999_999, 1_000_000):
        metrics.write_completions(tmp_path, step, [row | {"completion": f"of step {step}"}])
    run = report_run.read_run(written(tmp_path, [{"step": 0}]))
    assert run.completions_step == 1_000_000
    assert run.completions == (row | {"completion": "of step 1000000"},)


def test_a_long_run_shows_a_bounded_number_of_texts_of_a_bounded_length(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run", fake_rows(2), text="z" * 4000)
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["samples"] *= 10  # 40
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    shown = re.findall(r"z{9,}[^<]*", html.write_report(run).read_text())
    assert shown == ["z" * 1500 + "… (2500 more characters)"] * (12 * 3 + 8 * 2)


def test_of_a_setting_that_is_a_long_list_the_first_items_are_written_out(tmp_path: Path) -> None:
    """Not all of them and then cut: in YAML, 200 bytes can be a list of 10^9 items."""
    written(tmp_path, [{"step": 0}])
    (tmp_path / "config.yaml").write_text("preset: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]\n")
    assert about(tmp_path)["preset"] == "[0, 1, 2, 3, 4, 5, ...]"


def about(folder: Path) -> dict[str, str]:
    return dict(html.about(report_run.read_run(folder)))


def test_a_crash_is_shaded_on_the_plots_of_a_run_that_has_one(tmp_path: Path) -> None:
    steady = [row | {"objective/scores": 1.0} for row in crashing()]
    shaded = []
    for name, rows in (("crash", crashing()), ("steady", steady)):
        (tmp_path / name).mkdir()
        page = html.write_report(written(tmp_path / name, rows)).read_text()
        shaded.append(re.findall(r'<rect class="crash" x="([\d.]+)" y="0" width="([\d.]+)"', page))
    assert shaded == [[("546.2", "201.7")], []]  # 65 / 119 and (89 - 65) / 119 of the width


def test_the_query_of_a_reward_servers_url_is_not_in_the_report(tmp_path: Path) -> None:
    written(tmp_path, [{"step": 0}])
    (tmp_path / "config.yaml").write_text(
        "preset: safe\nreward:\n  functions:\n  - 'https://host:1/score?token=it''s-secret'\n  - HTTP://h/x?key=secret\n"
    )
    page = html.write_report(tmp_path).read_text()
    assert "secret" not in page
    assert page.count("https://host:1/score") == 2
    assert about(tmp_path)["reward"] == "https://host:1/score, http://h/x"
