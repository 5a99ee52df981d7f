"""report.chart: ticks, axes, paths and thinning against literal numbers; and every recorded figure has a plot."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.report import chart, figures, plots
from stable_rlhf.report.chart import Axis, Series
from stable_rlhf.report.html import write_report
from stable_rlhf.runs import METRICS
from stable_rlhf.runs.names import TEXT_METRICS, TIMINGS
from tests.report.test_report import Page, fake_rows, fake_run


def series(values: list[float | None], first: int = 0) -> Series:
    """As the plots make it of rows with these values."""
    return plots._recorded([{"step": first + n, "x": value} for n, value in enumerate(values)], ())["x"]


@pytest.mark.parametrize(
    ("low", "high", "most", "found"),
    [
        (0.0, 1.0, 4, [0.0, 0.5, 1.0]),
        (-0.02, 0.43, 4, [0.0, 0.2, 0.4]),
        (0.31, 0.36, 4, [0.32, 0.34, 0.36]),
        (-3.0, 7.0, 4, [0.0, 5.0]),
        (9.4e-5, 1.06e-4, 4, [9.5e-5, 1e-4, 1.05e-4]),
        (-1e300, 1e300, 4, [-1e300, 0.0, 1e300]),
    ],
)
def test_ticks_are_round_and_not_too_many(low: float, high: float, most: int, found: list[float]) -> None:
    assert chart.ticks(Axis(low, high), most) == pytest.approx(found, rel=1e-9)


@pytest.mark.parametrize(
    ("steps", "found"),
    [
        ([0, 1, 2], [0, 1, 2]),
        ([7, 8], [7, 8]),
        ([3], [2, 3, 4]),
        ([0, 199], [0, 50, 100, 150]),
        ([10**6, 10**6 + 7], [10**6, 10**6 + 2, 10**6 + 4, 10**6 + 6]),
    ],
)
def test_ticks_of_steps_are_whole_numbers(steps: list[int], found: list[int]) -> None:
    assert chart.ticks(chart.step_axis(steps), 6, whole=True) == found


def test_a_value_is_placed_by_its_share_of_the_axis_and_kept_within_it() -> None:
    axis = Axis(-1.0, 3.0)
    assert [axis.place(value) for value in (-1.0, 0.0, 3.0, -9.0, 9.0)] == [0, 250, 1000, 0, 1000]


def test_an_axis_has_room_around_the_values_and_a_bound_where_asked() -> None:
    assert chart.value_axis([0.0, 1.0]) == Axis(-0.06, 1.06)
    assert chart.value_axis([2.0, 2.0]) == Axis(1.8, 2.2)  # of a constant line a tenth of it
    assert chart.value_axis([0, 0]) == Axis(-0.06, 1.06)  # a count that stays 0
    cut = chart.value_axis([-40.0, 0.5], least=-1)
    assert (cut.low, cut.high) == pytest.approx((-1.09, 0.59))
    for wild in ([-1.7e308, 1.7e308], [5e-324, 1e-323], [1.7e308]):
        axis = chart.value_axis(wild)
        assert all(math.isfinite(axis.place(value)) for value in wild)
        assert len(chart.ticks(axis, 4)) <= 4


def test_a_line_is_broken_where_a_row_has_no_value_and_a_lone_point_is_a_dot() -> None:
    across, up = Axis(0, 5), Axis(0, 10)
    path = chart.path(series([0.0, 10.0, None, 5.0, None, 10.0]), across, up)
    assert path == "M0 1000L200 0M600 500h0M1000 0h0"


def test_a_step_without_a_row_does_not_break_the_line() -> None:
    rows = [{"step": step, "x": 0.0} for step in (0, 2)]  # the row of a step whose figures were not finite is missing
    assert chart.path(plots._recorded(rows, ())["x"], Axis(0, 2), Axis(0, 1)) == "M0 1000L1000 1000"


def test_few_points_are_dots_as_well() -> None:
    assert chart.dots(series([0.0, 1.0]), Axis(0, 1), Axis(0, 1)) == "M0 1000h0M1000 0h0"


def test_upright_lines_that_fall_on_one_pixel_are_one() -> None:
    assert chart.uprights([0, 1, 2000], Axis(0, 2000)) == "M0 0V1000M1000 0V1000"
    assert chart.uprights(range(100_000), Axis(0, 100_000)).count("M") <= 501


def test_long_runs_stay_small_and_keep_their_spikes() -> None:
    values: list[float | None] = [0.0] * 50_000
    values[31_337] = 9.0
    thin = chart.thinned(series(values))
    assert len(thin.steps) <= chart.POINTS
    assert thin.values[list(thin.steps).index(31_337)] == 9.0
    assert list(thin.steps) == sorted(set(thin.steps))
    assert thin.bin == 167  # 50,000 points as 300 pairs
    whole = series([0.0] * chart.POINTS)
    assert chart.thinned(whole) is whole


def test_every_figure_that_a_run_records_is_in_a_plot_and_in_one_only() -> None:
    drawn = Counter(line.metric for section in figures.SECTIONS.values() for plot in section for line in plot.lines)
    others = {"step", "episode", "epoch", "rewards/<name>/mean", "user/<name>"}
    numbers = (set(METRICS) | set(TIMINGS)) - TEXT_METRICS - others
    assert set(drawn) == numbers | {figures.AVERAGE}
    assert set(drawn.values()) == {1}
    for plot in (plot for section in figures.SECTIONS.values() for plot in section):
        assert {line.panel for line in plot.lines} == set(range(len(plot.units)))


def rewarded(names: list[str]) -> list[dict[str, Any]]:
    return [{"step": step, **{f"rewards/{name}/mean": step / 4 for name in names}} for step in range(3)]


def test_each_reward_function_is_a_line_with_its_name(tmp_path: Path) -> None:
    names = ["length", "<b>bold", "x" * 200]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rewarded(names)))
    page = Page(write_report(run))
    assert "length 0.5" in " ".join(page.text.split())
    assert "<b>bold 0.5" in " ".join(page.text.split())
    assert "x" * 80 + "… (120 more characters)" in page.text


def test_of_very_many_reward_functions_the_first_are_drawn_and_the_number_is_said() -> None:
    plot = figures.rewards_plot(rewarded([f"r{n}" for n in range(40)]))
    assert [line.label for line in plot.lines] == [f"r{n}" for n in range(12)]
    assert plot.caption.endswith("The first 12 of 40.")
    assert len({line.style for line in plot.lines}) == 12


def test_values_that_are_read_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = fake_rows(40)
    page = Page(write_report(fake_run(tmp_path / "run", rows)))
    read = [json.loads(output["data-line"] or "") for output in page.named("output")]
    kl = [float(f"{row['objective/kl']:.5g}") for row in rows]
    assert {"steps": list(range(40)), "values": kl, "bin": 1} in read
    assert {"steps": list(range(40)), "values": [2.0] * 40, "bin": 1} in read  # seconds, of timings.jsonl


def test_what_reward_functions_record_has_a_plot_of_its_own_where_there_is_any() -> None:
    rows = [{"step": 0, "user/length": 3.0, "rewards/a/mean": 1.0}, {"step": 1, "user/length": 4.0, "user/b/c": 1.0}]
    plot = figures.recorded_plot(rows)
    assert [(line.metric, line.label) for line in plot.lines] == [("user/length", "length"), ("user/b/c", "b/c")]
    assert plot in figures.sections(rows)["Objective"]
    titles = [plot.title for plot in figures.sections(rows[:0])["Objective"]]
    assert "Recorded by rewards" not in titles
