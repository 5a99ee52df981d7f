"""evidence.curves, frontier and region against literal numbers."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from stable_rlhf.evidence import curves, frontier, plots, region
from stable_rlhf.evidence.compare import compare
from stable_rlhf.evidence.outcome import LARGEST, Outcome, Status
from stable_rlhf.report import Axis


def pair(steps: list[int], values: list[float]) -> curves.Pair:
    return np.asarray(steps, np.int64), np.asarray(values, np.float32)


def run(settings: dict, reward: float = 1.0, kl: float = 0.25, healthy: float = 1.0, **more) -> Outcome:
    """A run of 40 steps from 0 to `reward`, which it has in the last 35."""
    at = np.arange(40)
    course = np.where(at < 5, 0.0, reward).astype(np.float32)
    given = {
        "name": str(settings),
        "status": Status.FINISHED,
        "settings": settings,
        "steps": 40,
        "figures": {"reward/final": reward, "kl/final": kl, "healthy": healthy},
        "curves": {"objective/scores": (at, course)},
    }
    return Outcome(**(given | more))


# --- the mean of an arm


def test_the_mean_of_three_runs_has_students_interval() -> None:
    made = curves.curve([pair([0, 1], [1, 5]), pair([0, 1], [2, 5]), pair([0, 1], [3, 5])], 0, 1)
    assert made is not None
    assert made.mean.tolist() == [2.0, 5.0]
    half = 4.302652729911275 / math.sqrt(3)  # t of 2 degrees of freedom at 97.5 %, standard deviation 1
    assert made.low.tolist() == pytest.approx([2 - half, 5.0])
    assert made.high.tolist() == pytest.approx([2 + half, 5.0])


def test_a_line_goes_on_with_half_of_the_runs_and_ends_with_fewer() -> None:
    runs = [pair([0, 1, 2], [1, 1, 1]), pair([0, 1], [3, 3]), pair([0], [5])]
    made = curves.curve(runs, 0, 2)
    assert made is not None
    assert made.steps.tolist() == [0, 1]  # two of three go on at 1, one of three at 2
    assert made.mean.tolist() == [3.0, 2.0]
    whole = curves.curve(runs[:2], 0, 2)
    assert whole is not None
    assert whole.steps.tolist() == [0, 1, 2]
    assert np.isnan(whole.low).tolist() == [False, False, True]  # of one run there is no interval


def test_runs_without_the_metric_count_among_the_runs_of_the_arm() -> None:
    assert curves.curve([pair([0], [1])], 0, 0, members=3) is None
    assert curves.curve([pair([0], [1])], 0, 0, members=2) is not None
    assert curves.curve([], 0, 0) is None


def test_long_runs_are_binned_to_means_of_neighbours() -> None:
    made = curves.curve([pair(list(range(1000)), [float(n) for n in range(1000)])], 0, 999)
    assert made is not None
    assert len(made.steps) == curves.BINS == 200
    assert made.bin == 5
    assert made.steps[:3].tolist() == [2, 7, 12]
    assert made.mean[:3].tolist() == [2.0, 7.0, 12.0]


def test_a_run_that_logs_more_seldom_is_bridged_and_never_extended() -> None:
    made = curves.curve([pair([0, 1, 2, 3, 4], [0, 0, 0, 0, 0]), pair([0, 3], [0, 6])], 0, 4, members=2)
    assert made is not None
    assert made.mean.tolist() == [0.0, 1.0, 2.0, 3.0, 0.0]
    assert np.isnan(made.low).tolist() == [False, False, False, False, True]


def test_runs_that_all_log_seldom_make_one_unbroken_line() -> None:
    made = curves.curve([pair([0, 10, 20], [1, 2, 3])], 0, 20)
    assert made is not None
    panel = curves.panel("reward", [("a", "c1", made)], Axis(0, 20))
    assert panel["lines"][0]["path"].count("M") == 1
    assert panel["lines"][0]["values"] == {"steps": [0, 10, 20], "values": [1.0, 2.0, 3.0], "bin": 10}


def test_the_largest_values_are_on_the_edge_and_stay_json() -> None:
    made = curves.curve([pair([0, 1], [sign * LARGEST, 1]) for sign in (1, -1, 1)], 0, 1)
    assert made is not None
    panel = curves.panel("reward", [("a", "c1", made)], Axis(0, 1))
    json.dumps(panel, allow_nan=False)
    assert "inf" not in json.dumps(panel)


def test_a_band_that_is_far_wider_than_the_lines_does_not_flatten_them() -> None:
    made = curves.curve([pair([0, 1], [-50, 0]), pair([0, 1], [50, 1])], 0, 1)
    assert made is not None
    ticks = [float(text) for _, text in curves.panel("reward", [("a", "c1", made)], Axis(0, 1))["ticks"]]
    assert min(ticks) >= -0.4
    assert max(ticks) <= 0.9


@pytest.mark.parametrize(
    ("metric", "values", "least", "most"),
    [
        ("val/explained_variance", (-80.0, 0.9), -math.inf, 1.0),
        ("objective/entropy", (0.0, 2.0), 0.0, math.inf),
        ("completions/mean_length", (1.0, 20.0), 0.0, math.inf),
        ("completions/distinct_2", (0.0, 1.0), 0.0, 1.0),
        ("objective/kl", (-0.1, 0.4), -math.inf, math.inf),
    ],
)
def test_an_interval_is_cut_at_what_the_figure_can_be(
    metric: str, values: tuple[float, float], least: float, most: float
) -> None:
    runs = [run({"x": 1, "seed": n}, curves={metric: pair([0, 1], [value, value])}) for n, value in enumerate(values)]
    (drawn,) = [each for of in plots.draw_plots(compare(runs, ["x"])).sections.values() for each in of]
    (line,) = drawn["panels"][0]["lines"]
    half = 12.706204736 / math.sqrt(2) * (values[1] - values[0]) / math.sqrt(2)
    middle = sum(values) / 2
    assert line["values"]["low"][0] == pytest.approx(max(least, middle - half), rel=0.02)
    assert line["values"]["high"][0] == pytest.approx(min(most, middle + half), rel=0.02)


def test_the_axis_of_explained_variance_is_cut_at_minus_1_and_1() -> None:
    runs = [run({"x": 1, "seed": n}, curves={"val/explained_variance": pair([0, 1], [value, 0.9])})
            for n, value in enumerate((-80.0, 0.5))]  # fmt: skip
    (drawn,) = plots.draw_plots(compare(runs, ["x"])).sections["Policy"]
    ticks = [float(text) for _, text in drawn["panels"][0]["ticks"]]
    assert (min(ticks), max(ticks)) == (-1.0, 1.0)


# --- which arms are drawn


def test_of_many_arms_the_twelve_of_the_best_final_reward_are_drawn_in_their_order() -> None:
    made = compare([run({"x": n, "seed": s}, reward=(7 * n) % 15 + 1.0) for n in range(15) for s in (0, 1)], ["x"])
    left = [n for n in range(15) if (7 * n) % 15 < 3]
    assert plots.best_arms(made) == [n for n in range(15) if n not in left]
    styles = plots.arm_styles(made)
    assert [styles[n] for n in left] == ["quiet"] * 3
    drawn = [style for style in styles if style != "quiet"]
    assert drawn == [f"c{n}" for n in range(1, 7)] + [f"c{n} dashed" for n in range(1, 7)]


def test_the_share_of_runs_that_reached_the_reward_rises_at_the_step_at_which_they_did() -> None:
    made = compare([run({"x": 1, "seed": 0}), run({"x": 1, "seed": 1}, reward=0.5)], ["x"])
    drawn = plots.draw_plots(made).sections["Reward"]
    (timed,) = [plot for plot in drawn if plot["title"] == "Time to the reward"]
    assert made.target == pytest.approx(0.675)  # 90 % of the way from 0 to the arm's mean, 0.75
    values = timed["panels"][0]["lines"][0]["values"]
    # the 20-step mean is 0.7 with 14 of 20 at 1: at step 18, but a mean needs 20 steps; so 19, after which 20 are done
    assert values["values"] == [0.0] * 19 + [0.5] * 21


# --- reward against the square root of the KL


def test_the_frontier_has_every_run_and_every_arm_at_its_place() -> None:
    made = compare(
        [run({"x": 1, "seed": 0}, 1.0, 0.16), run({"x": 1, "seed": 1}, 2.0, 0.36), run({"x": 2, "seed": 0}, 0.0, -0.5)],
        ["x"],
    )
    drawn = frontier.frontier(made)
    assert drawn is not None
    points = json.loads(drawn.points)
    texts = {point["text"]: point for point in points}
    assert len(points) == drawn.count == 5
    mean = texts["1: 1, mean of 2 runs: reward 1.5, KL 0.26"]
    (one, two) = (texts[f"1: 1, seed {n}: reward {n + 1}, KL {kl}"] for n, kl in ((0, "0.16"), (1, "0.36")))
    below = texts["2: 2, seed 0: reward 0, KL -0.5"]
    # the axis goes from 0 to 0.6 with 6 % on both sides
    assert below["left"] == pytest.approx(100 * 0.06 / 1.12, abs=0.01)  # a KL below 0 counts as 0
    assert one["left"] == pytest.approx(100 * (0.4 + 0.036) / 0.672, abs=0.01)
    assert two["left"] == pytest.approx(100 * (0.6 + 0.036) / 0.672, abs=0.01)
    assert mean["left"] == pytest.approx(100 * (math.sqrt(0.26) + 0.036) / 0.672, abs=0.01)
    assert mean["top"] == pytest.approx(100 - 100 * (1.5 + 0.12) / 2.24, abs=0.01)
    assert [point["left"] for point in points] == sorted(point["left"] for point in points)


def test_a_name_stands_next_to_its_arm_where_it_meets_nothing() -> None:
    alone, close, closer = (50.0, 10.0, 9), (50.0, 60.0, 9), (52.0, 60.0, 9)
    assert frontier._sides([alone, close, closer]) == ["right", "left", "right"]
    assert frontier._sides([(99.0, 50.0, 9), (50.0, 50.0, 200)]) == ["left", ""]  # inside the panel, or not at all


def test_there_is_no_frontier_without_a_kl() -> None:
    made = compare([run({"x": 1, "seed": 0}, figures={"reward/final": 1.0})])
    assert frontier.frontier(made) is None


# --- the stable region


def grid(**more) -> list[Outcome]:
    """2 rates x 2 limits x 2 seeds: of the high rate one seed is not healthy, of the low limit no reward is high."""
    return [
        run({"rate": rate, "limit": limit, "seed": seed, **more}, reward=1.0 if limit > 0.1 else 0.5,
            healthy=float(rate < 1 or seed == 0))
        for rate in (1.0, 0.01) for limit in (0.1, 0.25) for seed in (0, 1)
    ]  # fmt: skip


def test_a_cell_counts_the_runs_that_are_healthy_and_near_the_best_reward() -> None:
    (found,) = region.regions(compare(grid(), ["rate", "limit"]))
    assert (found.across, found.up, found.given) == ("rate", "limit", {})
    assert found.columns == ("0.01", "1")
    cells = {row: [(each.stable, each.runs, each.shade) for each in shares if each] for row, shares in found.rows}
    assert cells == {"0.1": [(0, 2, 0), (0, 2, 0)], "0.25": [(2, 2, 4), (1, 2, 2)]}


def test_a_setting_that_is_no_number_is_an_axis_where_there_is_one_number_and_others_have_a_grid_each() -> None:
    runs = [run({"way": way, "rate": rate, "seed": 0}) for way in ("a", "b") for rate in (1e-4, 1e-3)]
    (found,) = region.regions(compare(runs, ["way", "rate"]))
    assert (found.across, found.up) == ("rate", "way")
    both = [each for way in ("a", "b") for each in grid(way=way)]
    first, second = region.regions(compare(both, ["way", "rate", "limit"]))
    assert (first.across, first.up, first.given) == ("rate", "limit", {"way": "a"})
    assert second.given == {"way": "b"}


def test_there_is_no_region_of_one_setting_or_of_words_only() -> None:
    assert region.regions(compare(grid(), ["rate"])) == []
    words = [run({"a": a, "b": b, "seed": 0}) for a in "xy" for b in "xy"]
    assert region.regions(compare(words, ["a", "b"])) == []


def test_a_run_that_has_not_ended_is_not_counted_and_an_empty_cell_has_no_share() -> None:
    runs = [each for each in grid() if each.settings["rate"] < 1 or each.settings["limit"] > 0.1]
    runs[0] = run(dict(runs[0].settings), figures={"reward/final": 1.0, "kl/final": 0.2}, status=Status.RUNNING)
    (found,) = region.regions(compare(runs, ["rate", "limit"]))
    shares = dict(found.rows)
    assert shares["0.1"][1] is None
    assert sum(each.runs for row in shares.values() for each in row if each) == len(runs) - 1
