"""The page of a comparison in Chromium: nothing acts; pointer, finger and keys read values; a small screen holds it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stable_rlhf.evidence.compare import compare
from stable_rlhf.evidence.outcome import Outcome, Status
from stable_rlhf.evidence.page import write_page
from tests.evidence.simulated import sweep
from tests.report.test_hostile_browser import opened
from tests.report.test_hostile_text import MARKUP

READ = """
const name = (id) => document.getElementById(id);
const plot = name('plot-1-1'), cloud = name('frontier');
const values = (of) => [of.closest('figure').querySelector('.step').textContent,
  ...[...of.closest('figure').querySelectorAll('output')].map((output) => output.value)];
const press = (of, key) => of.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
const move = (of, kind, across, up, more) => {
  const area = of.querySelector('.panel').getBoundingClientRect();
  of.dispatchEvent(new PointerEvent(kind, { clientX: area.left + across * area.width,
    clientY: area.top + up * area.height, bubbles: true, pointerType: 'mouse', ...more }));
};
const said = () => cloud.closest('figure').querySelector('output').value;
const found = { begin: values(plot), none: said() };
move(plot, 'pointermove', 0.5, 0.5); found.middle = values(plot);
found.other = values(name('plot-2-1'))[0];
move(plot, 'pointerout', 0.5, 0.5); found.left = values(plot);
press(plot, 'Home'); press(plot, 'ArrowRight'); found.keys = values(plot); press(plot, 'Escape');
move(cloud, 'pointermove', 0, 1); found.near = said();
found.ring = !cloud.querySelector('.ring').hidden;
found.still = values(plot);
move(cloud, 'pointerout', 0, 1); found.away = said();
press(cloud, 'ArrowRight'); found.first = said();
press(cloud, 'End'); found.last = said(); found.label = cloud.getAttribute('aria-valuetext');
press(cloud, 'Escape'); found.escape = said();
const hidden = () => getComputedStyle(document.querySelector('.more')).display === 'none';
found.more = [hidden(), (name('more').click(), hidden())];
for (const each of document.querySelectorAll('details')) each.open = true;
found.wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
document.body.setAttribute('data-found', JSON.stringify(found));
"""


def browsed(chromium: str, runs: list[Outcome], folder: Path, width: int) -> dict[str, Any]:
    """What READ finds on the page, in a frame of this width: a window of Chromium's is 500 pixels wide at least."""
    page = write_page(compare(runs), folder / "compare.html").read_text(encoding="utf-8")
    page = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page)  # it would stop READ
    text = page.replace("</body>", f"<script>{{{READ}}}</script></body>").replace("<body>", "<body data-inner>")
    (folder / "read.html").write_text(text, encoding="utf-8")
    outer = folder / "outer.html"
    outer.write_text(
        f"<body><iframe src=read.html style='width:{width}px;height:900px'></iframe><script>onload = () => "
        "document.body.setAttribute('data-found', frames[0].document.body.dataset.found)</script>"
    )
    dom = opened(chromium, outer, folder / "profile", "--window-size=1300,950", "--allow-file-access-from-files")
    (found,) = re.findall(r'data-found="([^"]*)"', dom)
    return json.loads(found.replace("&quot;", '"').replace("&amp;", "&"))


def straight(way: str, seed: int, slope: float) -> Outcome:
    """A run of 41 steps whose reward rises by `slope` a step, and whose KL at the end is slope^2."""
    at = np.arange(41)
    curves = {name: (at, (slope * at).astype(np.float32)) for name in ("objective/scores", "objective/kl")}
    figures = {"reward/final": 40 * slope, "kl/final": slope**2, "healthy": 1.0}
    settings = {"way": way, "seed": seed}
    return Outcome(name=f"{way}{seed}", status=Status.FINISHED, settings=settings, figures=figures, curves=curves)


def test_pointer_and_keys_read_the_curves_of_arms_and_the_points_of_the_frontier(chromium: str, tmp_path: Path) -> None:
    runs = [straight(way, seed, slope) for way, slope in (("a", 0.1), ("b", 0.2)) for seed in (0, 1)]
    found = browsed(chromium, runs, tmp_path, 400)
    last = ["last step 40", "4.0 [4.0, 4.0]", "8.0 [8.0, 8.0]"]
    assert [re.sub(r"\.0\b", "", text) for text in found["begin"]] == [re.sub(r"\.0\b", "", text) for text in last]
    assert found["middle"] == ["step 20", "2 [2, 2]", "4 [4, 4]"]
    assert found["other"] == "step 20"
    assert found["left"] == found["begin"] == found["still"]
    assert found["keys"] == ["step 1", "0.1 [0.1, 0.1]", "0.2 [0.2, 0.2]"]
    assert found["none"] == found["away"] == found["escape"] == "2 arms"
    assert found["near"].startswith("1: a, ")
    assert found["near"].endswith("reward 4, KL 0.01")
    assert found["ring"]
    assert found["first"].startswith("1: a, ")
    assert found["last"] == found["label"]
    assert found["last"].startswith("2: b, ")
    assert found["more"] == [True, False]
    assert not found["wide"]


def test_a_sweep_with_long_names_is_not_wider_than_a_small_screen(chromium: str, tmp_path: Path) -> None:
    runs = [
        replace(each, settings={**each.settings, "preset": f"{each.settings['preset']}{'x' * 90}"}, name="y" * 200)
        for each in sweep(steps=60)
    ]
    assert not browsed(chromium, runs, tmp_path, 400)["wide"]


def test_nothing_acts_when_a_browser_opens_names_that_are_payloads(chromium: str, tmp_path: Path) -> None:
    runs = [
        replace(each, settings={"way": payload, f"k{payload}": payload, "seed": n}, name=payload, why=payload,
                status=Status.CRASHED, gold={payload: each.gold["judge"]}, notes=(payload,), inputs={"data": payload})
        for payload in MARKUP for n, each in enumerate(sweep(presets=("calm",), rates=(1e-4,), seeds=2, steps=25))
    ]  # fmt: skip
    dom = opened(chromium, write_page(compare(runs), tmp_path / "compare.html"), tmp_path / "profile")
    assert "&lt;svg onload=" in dom
    assert "data-acted" not in dom.split("<body")[0]
    assert "ACTED</title>" not in dom
