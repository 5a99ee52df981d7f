"""The report's script in Chromium: values under the pointer and the keys, and nothing wider than a small screen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.report.html import write_report
from tests.report.test_hostile_browser import opened
from tests.report.test_report import fake_run

NONE = "\N{EN DASH}"
READ = """
const plot = document.querySelector('.plot'), area = plot.querySelector('.panel').getBoundingClientRect();
const values = () => [document.querySelector('.step').textContent,
  ...[...document.querySelectorAll('figure')[0].querySelectorAll('output')].map((output) => output.value)];
const press = (key) => plot.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
const move = (kind, share, more) => plot.dispatchEvent(new PointerEvent(kind,
  { clientX: area.left + share * area.width, clientY: area.top + 9, bubbles: true, pointerType: 'mouse', ...more }));
const found = { begin: values() };
move('pointermove', 0.5); found.middle = values();
move('pointerout', 0.5); found.left = values();
move('pointerdown', 0.251, { pointerType: 'touch' }); found.touched = values();
move('pointerout', 0.251, { pointerType: 'touch' }); found.lifted = values();
press('Home'); found.home = values();
press('ArrowLeft'); found.edge = values();
press('ArrowRight'); press('ArrowUp'); press('PageUp'); found.keys = values();
found.other = document.querySelectorAll('.step')[1].textContent;
plot.focus(); press('End'); found.said = plot.getAttribute('aria-valuetext');
press('Escape'); found.escape = values();
found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.setAttribute('data-found', JSON.stringify(found));
"""


def browsed(chromium: str, folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What READ finds in the report of a run, opened in a window of 500 pixels' width, the least that Chromium has."""
    page = write_report(fake_run(folder / "run", rows)).read_text(encoding="utf-8")
    page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)  # it would stop READ
    (folder / "read.html").write_text(page.replace("</body>", f"<script>{{{READ}}}</script></body>"), encoding="utf-8")
    dom = opened(chromium, folder / "read.html", folder / "profile", "--window-size=500,900")
    (found,) = re.findall(r'data-found="([^"]*)"', dom)
    return json.loads(found.replace("&quot;", '"').replace("&amp;", "&"))


def test_the_pointer_a_finger_and_the_keys_read_the_values_of_a_step(chromium: str, tmp_path: Path) -> None:
    rows = [
        {"step": step, "objective/scores": step / 10, "objective/kl": 0.1, "objective/entropy": 2.0}
        for step in range(41)
    ]
    found = browsed(chromium, tmp_path, rows)
    last = ["last step 40", "4", "3.05"]  # the average of 21..40
    assert found["begin"] == last
    assert found["middle"] == ["step 20", "2", "1.05"]
    assert found["left"] == last
    assert found["touched"] == found["lifted"] == ["step 10", "1", NONE]  # the average begins with step 19
    assert found["home"] == found["edge"] == ["step 0", "0", NONE]
    assert found["keys"] == ["step 6", "0.6", NONE]
    assert found["other"] == "step 6"
    assert found["said"] == "step 40: each step 4, average 3.05"
    assert found["escape"] == last
    assert not found["wide"]


def test_a_thinned_line_is_read_at_its_nearest_point(chromium: str, tmp_path: Path) -> None:
    rows = [{"step": step, "objective/scores": float(step == 2500)} for step in range(5001)]
    found = browsed(chromium, tmp_path, rows)
    assert found["middle"] == ["step 2500", "1", "0.05"]
    assert found["keys"][0] == "step 502"
    assert found["keys"][1] == "0"


@pytest.mark.parametrize("rows", [[{"step": 7, "objective/scores": 0.5}]])
def test_a_run_of_one_step_can_be_read(chromium: str, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    found = browsed(chromium, tmp_path, rows)
    assert found["middle"] == found["keys"] == ["step 7", "0.5"]
