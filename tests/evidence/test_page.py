"""evidence.page and table: figures against literal ones, hostile names, no network, size and time; colours."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import itertools
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from stable_rlhf.errors import SaveError
from stable_rlhf.evidence import table
from stable_rlhf.evidence.compare import Comparison, compare
from stable_rlhf.evidence.outcome import LARGEST, Outcome, Status
from stable_rlhf.evidence.page import rendered, write_page
from stable_rlhf.files import ASSETS
from tests.evidence.simulated import sweep
from tests.report.test_hostile_text import PAYLOADS
from tests.report.test_report import Page

FINAL = "reward/final"


def run(name: str, arm: str, seed: int, **figures: float) -> Outcome:
    """A run without curves."""
    given = {key.replace("__", "/"): value for key, value in figures.items()}
    return Outcome(
        name=name, status=Status.FINISHED, settings={"way": arm, "seed": seed}, steps=10, figures=given
    )  # fmt: skip


def three_arms() -> list[Outcome]:
    """Final rewards with literal means, intervals and differences; `b` is above `a` by exactly 1 of every seed."""
    values = {"a": (1.0, 2.0, 3.0, 4.0, 5.0), "b": (11.0, 12.5, 12.5, 14.0, 15.0), "c": (3.0, 3.0, 3.0, 3.0, 3.5)}
    return [
        run(f"{arm}{seed}", arm, seed, reward__final=value, kl__final=0.1 * value)
        for arm, rewards in values.items()
        for seed, value in enumerate(rewards)
    ]


class Tables(html.parser.HTMLParser):
    """The texts of the cells of every table: table -> rows -> cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.titles: list[str] = []
        self._in = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in = True
            self.titles += [value for name, value in attrs if name == "title" and value]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in = False
            self.tables[-1][-1][-1] = " ".join(self.tables[-1][-1][-1].split())

    def handle_data(self, data: str) -> None:
        if self._in:
            self.tables[-1][-1][-1] += data + " "


def cells_of(text: str) -> Tables:
    return Tables(text[text.index("<main") : text.index("</main>")])


# --- figures


def test_the_figures_on_the_page_are_those_of_the_runs() -> None:
    made = compare(three_arms(), ["way"])
    found = cells_of(rendered(made))
    reward = found.tables[0]
    assert reward[0] == ["arm", "final reward, more is better"]
    # a: mean 3, standard deviation sqrt(2.5), t of 4 degrees of freedom 2.776: 3 +- 1.96; the bootstrap's error is
    # that within 3 %. The interquartile mean of five runs leaves out one on either side.
    mean, low, high = (float(each) for each in re.findall(r"-?\d+\.\d+", reward[1][1])[:3])
    assert reward[1][0] == "1 a baseline"
    assert (mean, low, high) == (3.0, pytest.approx(1.04, abs=0.1), pytest.approx(4.96, abs=0.1))
    assert "n=5 IQM 3.0 [" in reward[1][1]
    assert "5 %: 1.2, 50 %: 3, 95 %: 4.8" in reward[1][1]
    assert reward[2][1].startswith("13.0 better [")
    assert "better" not in reward[3][1]
    assert "worse" not in reward[3][1]


def test_a_figure_without_a_better_direction_is_higher_or_lower() -> None:
    made = compare(three_arms(), ["way"])
    policy = cells_of(rendered(made)).tables[1]
    assert policy[2][1].startswith("1.30 higher [")
    assert [(gap.measure.key, gap.mark, gap.improvement) for gap in table.gaps(made)][2] == ("kl/final", "higher", "-")


def test_more_of_a_figure_of_which_less_is_better_is_worse() -> None:
    runs = [run(f"{arm}{seed}", arm, seed, kl__max=seed + shift) for arm, shift in (("a", 0.0), ("b", 9.0))
            for seed in range(8)]  # fmt: skip
    ((_, (worse,)),) = (group.rows for group in table.groups(compare(runs, ["way"])))
    ((better,), _) = table.groups(compare(runs, ["way"], baseline="b"))[0].rows
    assert worse is not None
    assert better is not None
    assert (worse.mark, better.mark) == ("worse", "better")


def test_differences_are_paired_by_seed_and_carry_holms_p() -> None:
    runs = [run(f"{arm}{seed}", arm, seed, reward__final=seed + shift) for arm, shift in (("a", 0.0), ("b", 1.0))
            for seed in range(8)]  # fmt: skip
    (gap,) = table.gaps(compare(runs, ["way"]))
    # every seed gains exactly 1: no test of t sees that; of 2^8 signs, the two in which all agree are as extreme
    assert (gap.difference, gap.interval, gap.paired, gap.p, gap.holm) == ("+1", "[1, 1]", True, "0.0078", "0.0078")
    assert gap.mark == "better"
    assert gap.improvement.startswith("0.62 [")  # of 64 pairs 36 are better, and 7 are ties
    less = compare(runs, ["way"], baseline="b")
    assert [each.mark for each in table.gaps(less)] == ["worse"]
    row = cells_of(rendered(less)).tables[1][1]
    assert row[2:7] == ["-1 reward", "[-1, -1]", "8 pairs", "0.0078", "0.0078"]


@pytest.mark.parametrize(
    ("value", "low", "high", "found"),
    [
        (0.51234, 0.48, 0.5446, ("0.512", "[0.480, 0.545]")),
        (3033.4, 2827.0, 3240.0, ("3033", "[2827, 3240]")),
        (2 / 3, -0.77, 2.1033, ("0.67", "[-0.77, 2.10]")),
        (-0.0001, -0.1, 0.1, ("0.00", "[-0.10, 0.10]")),
        (1e-6, 0.9e-6, 1.1e-6, ("1e-06", "[9e-07, 1.1e-06]")),
        (3.2, 3.2, 3.2, ("3.2", "[3.2, 3.2]")),
        (1e300, -1e300, 1e300, ("1e+300", "[-1e+300, 1e+300]")),
        (1.7e308, -math.inf, math.inf, ("1.7e+308", "[-inf, inf]")),
        (0.123456, None, None, ("0.1235", "")),
    ],
)
def test_a_value_has_the_digits_that_its_interval_allows(
    value: float, low: float | None, high: float | None, found: tuple[str, str]
) -> None:
    assert table.in_words(value, low, high) == found


def test_how_many_figures_were_tested_is_said_in_plain_words() -> None:
    said = table.method(compare(three_arms(), ["way"]))
    assert "Runs by way: 3 arms of 15 runs." in said
    assert "compared with a: 4 differences of 2 figures tested" in said
    assert "one in twenty figures without any difference" in said
    assert table.method(compare(three_arms()[:5], [])) == "All runs are one arm: 5 runs."


def test_numbers_of_arms_are_written_with_spans() -> None:
    assert table.numbered([3, 1, 2, 7, 9, 10]) == "1-3, 7, 9-10"
    assert table.numbered([]) == ""


# --- what is the matter with arms and runs


def test_what_makes_arms_not_comparable_stands_at_the_top_and_what_runs_lack_in_their_rows() -> None:
    runs = three_arms()
    runs[7] = replace(runs[7], inputs={"data": "mine"})
    runs[0] = replace(runs[0], inputs={"data": "yours"})
    runs[1] = replace(runs[1], status=Status.CRASHED, why="it ended with exit code 1")
    gone = Outcome(name="lost", status=Status.MISSING, why="there is no folder", settings={"way": "b", "seed": 9})
    text = rendered(compare([gone, *runs], ["way"]))
    assert 0 < text.index('class="verdict bad"') < text.index("the data differs between the arms") < text.index("<h2>")
    assert text.index('class="verdict look"') < text.index("1 of 16 runs has no figures") < text.index("<h2>")
    rows = {row[0]: row for found in cells_of(text).tables for row in found if row[1:2] and row[0] in ("lost", "a1")}
    assert rows["lost"][1:5] == ["b", "9", "missing there is no folder", "0"]
    assert rows["a1"][3] == "crashed it ended with exit code 1"


def test_settings_in_which_arms_differ_are_listed_with_the_arms_that_have_each_value() -> None:
    runs = [replace(each, settings={**each.settings, "lr": 0.1 if each.settings["way"] == "a" else 0.2, "same": 1})
            for each in three_arms()]  # fmt: skip
    found = cells_of(rendered(compare(runs, ["way"])))
    (rows,) = [each for each in found.tables if each[0][0] == "setting"]
    assert rows[1:] == [["way", "a arm 1 b arm 2 c arm 3"], ["lr", "0.1 arm 1 0.2 arms 2-3"]]


def test_a_setting_that_an_arm_lacks_is_none_in_which_it_differs() -> None:
    runs = [replace(each, settings={**each.settings, "same": 1, "lr": 0.1 if each.settings["way"] == "a" else 0.2})
            for each in three_arms()[:10]]  # fmt: skip
    peer = replace(three_arms()[10], settings={"way": "c", "seed": 0})
    found = cells_of(rendered(compare([*runs, peer], ["way"])))
    (rows,) = [each for each in found.tables if each[0][0] == "setting"]
    assert rows[1:] == [["way", "a arm 1 b arm 2 c arm 3"], ["lr", "0.1 arm 1 0.2 arm 2 - arm 3"]]


def test_the_list_of_differences_has_as_many_as_its_head_and_the_top_say() -> None:
    made = compare(three_arms(), ["way"])
    text = rendered(made)
    assert "4 differences, 4 of them tested" in text
    assert "4 differences of 2 figures tested" in text
    (rows,) = [each for each in cells_of(text).tables if each[0][2:3] == ["difference"]]
    assert len(rows) - 1 == 4


def test_the_reward_to_reach_is_said_before_the_tables() -> None:
    made = compare(sweep(presets=("calm",), rates=(1e-4,), seeds=2, steps=40))
    assert made.target is not None
    assert f"The reward to reach is {made.target:.4g}, as a mean of 20 steps." in table.method(made)


@pytest.mark.parametrize("count", [1, 2])
def test_one_run_and_two_have_a_page(count: int) -> None:
    text = rendered(compare(sweep(presets=("calm",), rates=(1e-4,), seeds=count, steps=30)))
    assert f"1 arm, {count} run" in text
    assert "nan" not in text.lower().replace("nano", "")


def test_a_run_of_a_single_step_and_one_without_curves_have_a_page() -> None:
    runs = sweep(presets=("calm",), rates=(1e-4,), seeds=2, steps=1)
    assert "<h4>Reward</h4>" in rendered(compare(runs))
    assert "<h4>Reward</h4>" not in rendered(compare([replace(each, curves={}, gold={}) for each in runs]))


# --- hostile texts


@pytest.fixture(scope="module")
def hostile() -> Comparison:
    """Every text that a run brings is a payload, a different one in each arm."""
    runs = [
        replace(
            each,
            name=f"{payload}/{each.settings['seed']}",
            settings={"seed": each.settings["seed"], f"key {payload}": payload, "kl": number, "rate": number % 3},
            inputs={"data": payload},
            status=Status.CRASHED,
            why=payload,
            notes=(payload,),
            gold={payload: each.gold["judge"]},
            figures={**each.figures, f"gold/{payload}": 0.5},
        )
        for number, payload in enumerate(PAYLOADS)
        for each in sweep(presets=("calm",), rates=(1e-4,), seeds=2, steps=25)
    ]
    return compare(runs, [*(f"key {payload}" for payload in PAYLOADS[:4]), "kl", "rate"])


def test_payloads_are_text_and_the_page_refers_to_nothing_outside_it(hostile: Comparison, tmp_path: Path) -> None:
    path = write_page(hostile, tmp_path / "compare.html")
    page, plain = Page(path), Page(write_page(compare(sweep(steps=25)), tmp_path / "plain.html"))
    assert {tag for tag, _ in page.tags} <= {"caption", *(tag for tag, _ in plain.tags)}
    assert len(page.named("script")) == 1
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "action", "onload", "onerror"} & set(attributes)
    (policy,) = [each["content"] for each in page.named("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    text = path.read_text(encoding="utf-8")
    (script,) = re.findall(r"(?s)<script>(.*?)</script>", text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}';")
    assert not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]", text)
    assert "url(" not in re.sub(r"(?s)<main.*</main>", "", text)
    assert "<script>document.title='ACTED'" in page.text  # shown


def test_texts_of_millions_of_characters_leave_the_page_small() -> None:
    runs = [
        replace(each, name="n" * 3_000_000, why="w" * 3_000_000, settings={"way": "v" * 3_000_000 + str(n), "seed": 0})
        for n, each in enumerate(sweep(presets=("calm",), rates=(1e-4,), seeds=3, steps=25))
    ]
    text = rendered(compare(runs, ["way"]))
    assert len(text) < 500_000
    assert "The correction does not go over the figures" in table.method(compare(three_arms(), ["way"]))


def test_the_console_shows_payloads_as_text(hostile: Comparison) -> None:
    written = io.StringIO()
    console = Console(file=written, width=100, force_terminal=False)
    for each in table.console_tables(hostile):
        console.print(each)
    text = written.getvalue()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_the_console_has_the_rows_of_the_page() -> None:
    made = compare(three_arms(), ["way"])
    written = io.StringIO()
    for each in table.console_tables(made):
        Console(file=written, width=80).print(each)
    text = written.getvalue()
    assert "[bold" not in text
    (group, _) = table.groups(made)
    for row in group.rows:
        (entry,) = row
        assert entry is not None
        assert f"{entry.mean} {entry.interval} n=5" in text
        assert f"IQM {entry.iqm}" in text
    assert text.count("* better") == 1
    assert text.count("baseline") == 2  # of two tables
    assert max(map(len, text.splitlines())) <= 80


# --- the file


def test_200_runs_of_1000_rows_in_40_arms_are_a_small_page_soon() -> None:
    made = compare(
        sweep(presets=("calm", "wild"), rates=(1e-4, 2e-4, 3e-4, 5e-4, 1e-3), betas=(0.02, 0.05, 0.1, 0.2), seeds=5)
    )
    assert (len(made.runs), len(made.arms)) == (200, 40)
    begin = time.process_time()
    text = rendered(made)
    assert time.process_time() - begin < 5
    assert len(text.encode()) < 5_000_000
    assert "12 arms with the best final reward. Left out: arms" in text


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    path.write_text("old")
    (tmp_path / "compare.html.tmp").mkdir()  # what is written aside cannot be
    with pytest.raises(SaveError, match=r"compare\.html could not be written"):
        write_page(compare(three_arms()), path)
    assert path.read_text() == "old"


def test_a_page_in_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match=r"the folder .*/nodir does not exist; make it$"):
        write_page(compare(three_arms()), tmp_path / "nodir" / "x.html")


def test_the_same_runs_have_the_same_page() -> None:
    runs = sweep(steps=40, seeds=2)
    assert rendered(compare(runs)) == rendered(compare(runs))


# --- colours

MACHADO = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Machado, Oliveira & Fernandes (2009), severity 1, for linear RGB."""

TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    wide = colour if len(colour) == 7 else "#" + "".join(2 * each for each in colour[1:])
    share = np.array([int(wide[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = TO_XYZ @ np.clip(rgb, 0, 1) / TO_XYZ.sum(axis=1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_the_six_colours_stay_apart_for_the_colour_blind_and_clear_of_the_paper(scheme: int) -> None:
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    colours = [linear(re.findall(rf"--c{n}: (#\w+)", style)[scheme]) for n in range(1, 7)]
    (_, paper) = TO_XYZ[:2] @ linear(re.findall(r"--paper: (#\w+)", style)[scheme])
    for colour in colours:
        bright, dark = sorted([paper, TO_XYZ[1] @ colour], reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 3  # WCAG 2.2, 1.4.11
    for seen in (np.eye(3), *map(np.array, MACHADO.values())):
        apart = [np.linalg.norm(lab(seen @ a) - lab(seen @ b)) for a, b in itertools.combinations(colours, 2)]
        assert min(apart) >= 30  # a difference is just seen at 2.3


def test_every_value_that_is_read_is_strict_json() -> None:
    runs = sweep(steps=60, seeds=2)
    wild = {key: (at, np.full_like(values, LARGEST)) for key, (at, values) in runs[0].curves.items()}
    text = rendered(compare([replace(runs[0], curves=wild), *runs[1:]]))
    lines = re.findall(r'data-line="([^"]*)"', text)
    assert len(lines) > 50
    for line in lines:
        json.loads(line.replace("&#34;", '"').replace("&quot;", '"'), parse_constant=lambda name: pytest.fail(name))
