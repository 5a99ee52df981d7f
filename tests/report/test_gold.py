"""Gold rewards in the report: the plot, and the verdict where gold falls while the reward rises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.errors import RunError
from stable_rlhf.report.facts import Gold, facts_of
from stable_rlhf.report.plots import draw_plots
from stable_rlhf.report.run import headline, read_run
from stable_rlhf.report.verdict import Tone
from tests.report.test_verdict import rows, run, said


def gold(change: float, error: float = 0.05, reward: float = 1.47, **more: Any) -> Gold:
    return Gold(
        **{"name": "judge", "change": change, "error": error, "reward_change": reward, "reward_error": 0.05} | more
    )


@pytest.mark.parametrize(
    ("golds", "words", "tone"),
    [
        ([gold(-0.2)], "the reward rises, gold falls (judge by 0.2 ± 0.05): over-optimised", Tone.BAD),
        ([gold(-0.2, since=40)], "gold falls (judge by 0.2 ± 0.05 since step 40): over-optimised", Tone.BAD),
        ([gold(-0.2, reward=0.09)], ", gold falls (judge by 0.2 ± 0.05), KL", Tone.BAD),
        ([gold(-0.09)], "gold did not change beyond its error (judge by 0.09 ± 0.05)", Tone.LOOK),
        ([gold(0.2)], "gold rose (judge by 0.2 ± 0.05)", Tone.FINE),
        ([gold(0.2), gold(-0.3, name="b")], "gold falls (b by 0.3 ± 0.05): over-optimised", Tone.BAD),
        ([gold(0.2), gold(0.0, name="b")], "gold did not change beyond its error (b by 0 ± 0.05)", Tone.LOOK),
        (
            [gold(0.2)] * 5,
            "gold rose (judge by 0.2 ± 0.05, judge by 0.2 ± 0.05, judge by 0.2 ± 0.05 and 2 more)",
            Tone.FINE,
        ),
    ],
)
def test_gold_that_falls_while_the_reward_rises_is_over_optimised(golds: list[Gold], words: str, tone: Tone) -> None:
    sentence, found = said(golds=tuple(golds))
    assert words in sentence
    assert found == tone
    assert sentence.endswith("look at the samples.") == (tone == Tone.BAD)


def side(reward: float, judge: float | None, error: float = 0.1, **more: Any) -> dict[str, Any]:
    figures = {"gold/judge/mean": judge, "gold/judge/se": error, "gold/judge/judged": 8}
    return {"reward": reward, "reward_se": 0.1, "prompts": 8, **figures, **more}


def golds(folder: Path, **evaluation: Any) -> tuple[Gold, ...]:
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    read = read_run(run(folder, rows(10)))
    return facts_of(read, headline(read)).golds


def test_gold_is_compared_with_its_start_or_with_a_best_that_is_clearly_above_the_end(tmp_path: Path) -> None:
    (found,) = golds(tmp_path, before=side(1, 5), after=side(2, 4.5))
    assert (found.name, found.change, found.reward_change, found.since) == ("judge", -0.5, 1, 0)
    assert (found.error, found.reward_error) == (pytest.approx(0.1 * 2**0.5), pytest.approx(0.1 * 2**0.5))
    near = 5.5 - 3 * 0.1 * 2**0.5  # three standard errors below the best
    (found,) = golds(tmp_path, before=side(1, 4), during=[side(2, 5.5, step=4)], after=side(3, near + 0.01))
    assert (found.since, found.change) == (0, pytest.approx(near + 0.01 - 4))
    (found,) = golds(tmp_path, before=side(1, 4), during=[side(2, 5.5, step=4)], after=side(3, near - 0.01))
    assert (found.since, found.change, found.reward_change) == (4, pytest.approx(near - 0.01 - 5.5), 1)
    # The policy that is kept counts, not that of the last step.
    (found,) = golds(
        tmp_path, before=side(1, 4), during=[side(2, 5.5, step=4), side(3, 2, step=10)], after=side(2, 5.5)
    )
    assert (found.since, found.change) == (0, 1.5)
    (found,) = golds(tmp_path, before=side(1, 4), during=[side(2, 3.9, step=4)])
    assert found.change == pytest.approx(-0.1)
    assert golds(tmp_path, before=side(1, 4)) == ()
    assert golds(tmp_path, before=side(1, None), after=side(2, 4)) == ()
    assert golds(tmp_path, before=side(1, 4), after=side(2, None)) == ()


def plots(folder: Path, **evaluation: Any) -> list[dict[str, Any]]:
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    read = read_run(run(folder, rows(10)))
    drawn = draw_plots(read.rows, measured=read.measured)["Objective"]
    return [plot for plot in drawn if plot["title"] == "Reward and gold"]


def test_reward_and_gold_are_drawn_by_step(tmp_path: Path) -> None:
    during = [side(2, 5.5, step=4), side(2.5, 5, step=9)]
    (plot,) = plots(tmp_path, before=side(1, 4), during=during, after=side(3, 2))
    lines = [line for panel in plot["panels"] for line in panel["lines"]]
    assert [(line["label"], line["values"]["values"]) for line in lines] == [
        ("reward", [1, 2, 3]),
        ("judge", [4, 5.5, 2]),
    ]
    assert lines[1]["values"]["steps"] == [0, 4, 9]  # the last step of ten, whose place the end takes
    ended = [*during, side(4, 1, step=10)]
    (plot,) = plots(tmp_path, before=side(1, 4), during=ended, after=side(2, 5.5))  # the best policy of step 4
    assert plot["panels"][1]["lines"][0]["values"]["values"] == [4, 5.5, 1]
    assert plots(tmp_path, before={"reward": 1.0}, after={"reward": 2.0}) == []


@pytest.mark.parametrize(
    ("during", "sentence"),
    [
        (3, "`during` is not a list of objects"),
        ([{"reward": 1.0}], "an entry of `during` has no whole number `step`"),
        ([side(1, 2, step=3), side(1, 2, step=3)], "the steps of `during` must be above 0 and increase"),
        ([side(1, 2, step=3) | {"gold/judge/mean": "x"}], "gold/judge/mean of step 3 in evaluation.json is 'x'"),
    ],
)
def test_a_damaged_evaluation_in_training_is_a_sentence(tmp_path: Path, during: Any, sentence: str) -> None:
    with pytest.raises(RunError, match=sentence):
        golds(tmp_path, before=side(1, 4), during=during)
