"""report: crashes against literal series, escaping against hostile text, and what is said about what is missing."""

from __future__ import annotations

import base64
import errno
import hashlib
import html.parser
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stable_rlhf.errors import SaveError
from stable_rlhf.report import crashes
from stable_rlhf.report import html as report_html
from stable_rlhf.report import run as report_run
from stable_rlhf.runs import metrics

HOSTILE = (
    "<script>alert(1)</script></style></pre><img src=x onerror=alert(1)> \" ' & {{ 7*7 }} {% raw %} "
    "javascript:alert(1) $x_{2}$ \x00\x1b[31m\u202egnp.exe \ud800 <!-- ]]> --> <a href='javascript:x'>"
)


def fake_rows(steps: int, *, safe: bool = True, crash_at: int | None = None) -> list[dict]:
    """A run whose reward climbs to about 1, with a deep fall of 25 steps from `crash_at`; deterministic."""
    draw = random.Random(7)
    rows = []
    for step in range(steps):
        crashed = crash_at is not None and crash_at <= step < crash_at + 25
        row = {
            "step": step,
            "episode": 64 * (step + 1),
            "objective/scores": 1 - math.exp(-step / 40) - 0.8 * crashed + draw.gauss(0, 0.03),
            "objective/scores_std": 0.3,
            "objective/kl": 0.3 * (1 - math.exp(-step / 30)) + draw.gauss(0, 0.01),
            "objective/entropy": 2.6 - 0.4 * step / steps + draw.gauss(0, 0.02),
            "loss/value_avg": 0.5 * math.exp(-step / 20),
            "val/explained_variance": 0.8 - 4 * math.exp(-step / 10),
            "completions/mean_length": 28 + draw.gauss(0, 1),
            "completions/min_length": 4,
            "completions/max_length": 32,
        }
        if safe:
            row |= {
                "safe/kl_short": 0.3 * (1 - math.exp(-step / 35)),
                "safe/threshold": 0.25 + 0.1 * step / steps,
                "safe/gate": 1.0 + 0.1 * (step % 3),
                "safe/kl_coef": 0.02 * min(1, step / 50),
                "safe/entropy_floor": 1.3,
                "safe/phase": ("WARMUP", "CLIMBING", "PLATEAU")[min(2, 3 * step // steps)],
                "safe/reason": "KL 0.31 above its threshold 0.30: coefficient up",
            }
        rows.append(row)
    return rows


def fake_run(folder: Path, rows: list[dict], *, text: str = "The film was fine.\nI saw it twice.") -> Path:
    folder.mkdir(parents=True)
    writer = metrics.MetricsWriter(folder)
    for row in rows:
        writer.write(row, {"total_s": 2.0})
    (folder / "config.yaml").write_text(f"preset: safe\nmax_steps: {len(rows)}\nseed: 1\n", encoding="utf-8")
    before = {"reward": 0.1, "reward_se": 0.02, "kl": 0, "entropy": 2.6, "distinct_2": 0.9, "length": 28, "prompts": 64}
    sample = {"prompt": text, "before": text, "after": text, "reward_before": 0.1, "reward_after": 0.9}
    evaluation = {"before": before, "after": {**before, "reward": 0.9, "kl": 0.31}, "samples": [sample] * 4}
    (folder / "evaluation.json").write_text(json.dumps(evaluation), encoding="utf-8")
    completion = {"prompt": text, "completion": text, "score": 0.5, "length": 9, "kl": 0.2}
    metrics.write_completions(folder, rows[-1]["step"], [completion] * 9)
    return folder


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# --- reward crashes. With R_t the mean of rewards t-19..t: a ramp of 1 per step has R = t - 9.5 at t >= 19.


def test_no_crash_while_reward_climbs_or_stays():
    assert crashes.reward_crashes([float(t) for t in range(100)]) == []
    assert crashes.reward_crashes([0.7] * 100) == []
    assert crashes.reward_crashes([]) == []


def test_no_crash_before_the_twenty_first_reward():
    assert crashes.reward_crashes([1.0] * 10 + [-100.0] * 10) == []
    assert [c.begin for c in crashes.reward_crashes([1.0] * 20 + [-100.0])] == [20]


def test_crash_of_a_step_series_has_literal_begin_end_and_depth():
    # R: 0 at 19, 1 from 39 to 59; rewards 0 at 60..79 lower R by 0.05 a step, so D = 0.05 k at 59 + k. R rises again
    # from 80 (where the window holds 1 at 80 and 0 at 61..79: R = 0.05), so the largest D is 1 at 79.
    rewards = [0.0] * 20 + [1.0] * 40 + [0.0] * 20 + [1.0] * 40
    (crash,) = crashes.reward_crashes(rewards)
    assert crash.begin == 65  # D = 0.30 is the first above 0.25 x (1 - 0); 0.25 at 64 is not above
    assert crash.depth == pytest.approx(1.0, abs=1e-12)
    assert crash.end == 89  # R = 0.05 x 10: half of the fall recovered


def test_fall_of_a_quarter_or_less_is_not_a_crash():
    rewards = [0.0] * 20 + [1.0] * 40 + [0.75] * 60  # D ends at exactly 0.25
    assert crashes.reward_crashes(rewards) == []
    assert len(crashes.reward_crashes([0.0] * 20 + [1.0] * 40 + [0.74] * 60)) == 1


def test_share_is_of_the_whole_runs_largest_gain():
    # The same fall of 0.3 after a gain of 1 is no crash in a run that later gains 2.
    fallen = [0.0] * 20 + [1.0] * 40 + [0.7] * 40
    assert len(crashes.reward_crashes(fallen)) == 1
    assert crashes.reward_crashes(fallen + [2.0] * 40) == []


def test_gain_is_counted_from_r_20_not_from_the_lowest_r():
    # max R - R_20 = 2 - 1: a fall of 0.4 is more than a quarter of it, though not of max R - min R = 2.
    rewards = [1.0] * 20 + [0.0] * 20 + [2.0] * 40 + [1.6] * 40
    assert [round(crash.depth, 12) for crash in crashes.reward_crashes(rewards)] == [1.0, 0.4]


def test_crash_that_never_recovers_half_has_no_end():
    rewards = [0.0] * 20 + [1.0] * 40 + [0.0] * 40 + [0.4] * 60
    (crash,) = crashes.reward_crashes(rewards)
    assert crash.end is None
    assert crash.depth == pytest.approx(1.0, abs=1e-12)


def test_half_recovered_fall_counts_once_and_a_second_fall_counts_again():
    once = [0.0] * 20 + [1.0] * 40 + [0.0] * 20 + [0.6] * 60
    assert len(crashes.reward_crashes(once)) == 1  # D stays at 0.4, above a quarter, yet it is the same fall
    twice = crashes.reward_crashes(once + [0.0] * 20 + [1.0] * 40)
    assert [round(crash.depth, 12) for crash in twice] == [1.0, 0.6]


def test_crash_needs_three_standard_errors_of_the_difference():
    rewards = [0.0] * 20 + [1.0] * 40 + [0.0] * 20
    # At t = 65 the windows of s = 59 and t share 14 steps: 6 + 6 others, so sd(D) = se sqrt(12) / 20, D = 0.3.
    limit = 0.3 / 3 * 20 / math.sqrt(12)
    assert crashes.reward_crashes(rewards, [limit * 0.999] * 80)[0].begin == 65
    # D grows as 0.05 k and its error as sqrt(2k): just above the limit the crash is seen one step later.
    assert crashes.reward_crashes(rewards, [limit * 1.001] * 80)[0].begin == 66
    # D = 1 at k = 20 against sd = se sqrt(40) / 20: beyond this no D is enough.
    assert crashes.reward_crashes(rewards, [1.001 / 3 * 20 / math.sqrt(40)] * 80) == []


@pytest.mark.parametrize(("scale", "shift"), [(10.0, 0.0), (1.0, 5.0), (0.01, -3.0)])
def test_scale_and_shift_of_the_reward_change_no_crash(scale: float, shift: float):
    rewards = [row["objective/scores"] for row in fake_rows(200, crash_at=120)]
    plain = crashes.reward_crashes(rewards, [0.04] * 200)
    other = crashes.reward_crashes([scale * r + shift for r in rewards], [0.04 * scale] * 200)
    assert len(plain) == 1
    assert [(c.begin, c.end) for c in other] == [(c.begin, c.end) for c in plain]


def test_crashes_refuse_values_that_are_not_finite_and_other_lengths():
    with pytest.raises(ValueError, match="finite"):
        crashes.reward_crashes([1.0] * 30 + [math.nan])
    with pytest.raises(ValueError, match="3 rewards but 2 standard errors"):
        crashes.reward_crashes([1.0] * 3, [1.0] * 2)


def test_step_errors_are_deviation_over_root_of_one_less_than_the_completions_scored():
    rows = [
        {"step": 0, "episode": 65, "objective/scores_std": 0.8},
        {"step": 1, "episode": 130, "objective/scores_std": 0.6, "completions/skipped": 28},
    ]
    assert crashes.step_errors(rows) == pytest.approx([0.1, 0.1], abs=1e-15)  # 0.8 / sqrt(64), 0.6 / sqrt(36)
    lone = {"step": 2, "episode": 195, "objective/scores_std": 0.0, "completions/skipped": 64}
    assert crashes.step_errors([lone]) is None  # one says nothing
    usual = math.sqrt((65 * 0.1**2 + 37 * 0.1**2) / 2)  # deviation of a completion in the others
    assert crashes.step_errors([*rows, lone]) == pytest.approx([0.1, 0.1, usual], rel=1e-12)
    assert crashes.step_errors([{"step": 0, "episode": 64}]) is None
    assert crashes.step_errors([{"step": 0, "objective/scores_std": 0.1}]) is None


# --- reading ---------------------------------------------------------------------------------------


def test_headline_has_literal_figures(tmp_path: Path):
    rows = [
        {"step": t, "episode": 4 * t + 4, "objective/scores": float(t), "objective/kl": 0.1 * (t % 7)}
        for t in range(30)
    ]
    rows[-1]["objective/scores"] = None  # a step in which every completion was skipped
    head = report_run.headline(report_run.read_run(fake_run(tmp_path / "run", rows)))
    assert (head.steps, head.reward, head.entropy) == (30, 18.5, None)  # mean of 9..28
    assert (head.kl_end, head.kl_max) == pytest.approx((0.1, 0.6))
    assert (head.crashes, head.largest_fall, head.errors_known) == ((), 0.0, False)


@pytest.mark.parametrize(
    ("number", "fault"),
    [
        (errno.ENOSPC, "No space left on device; make room there"),
        (errno.EACCES, "Permission denied; fix that"),
    ],
)
def test_a_report_that_cannot_be_written_is_an_error_of_the_disk(
    number: int, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = fake_run(tmp_path / "run", fake_rows(3))
    write_text = Path.write_text

    def refused(path: Path, *given: object, **named: object) -> int:
        if path.name == "report.html.tmp":
            raise OSError(number, os.strerror(number))
        return write_text(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(SaveError) as caught:
        report_html.write_report(run)
    assert str(caught.value) == f"{run / 'report.html'} could not be written: {fault}"
    assert caught.value.exit_code == 5
    assert not list(run.glob("report.html*"))


def test_missing_run_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "metrics.jsonl"))):
        report_run.read_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="nothing to report before the first step"):
        report_run.read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 0}\n{"step": 1, "objective/kl": NaN}\n', r"metrics\.jsonl:2: .*NaN"),
        ("metrics.jsonl", '{"step": 0}\n{"step": \n{"step": 2}\n', r"metrics\.jsonl:2: not a JSON object"),
        ("metrics.jsonl", '{"step": 0, "objective/kl": "<b>"}\n', r"metrics\.jsonl:1: objective/kl is '<b>'"),
        ("metrics.jsonl", '{"step": 0}\n{"step": 0}\n', r"metrics\.jsonl:2: step 0 follows step 0"),
        ("config.yaml", "preset: safe\nlist: [1,\n", r"config\.yaml:3: not YAML"),
        ("config.yaml", "preset: !!python/object/apply:os.getcwd []\n", r"config\.yaml:1: not YAML"),
        ("config.yaml", "- 1\n", r"config\.yaml:1: a configuration is a mapping"),
        ("evaluation.json", '{"before":\n {"reward": oops}}', r"evaluation\.json:2: "),
        ("evaluation.json", '{"before": {"reward": Infinity}}', r"evaluation\.json:1: Infinity is not a finite number"),
        ("evaluation.json", '{"after": {"reward": 1}}', r"evaluation\.json:1: .*no `before`"),
        ("evaluation.json", '{"before": {}, "after": [1]}', r"evaluation\.json:1: .*`after` is not an object"),
        ("evaluation.json", '{"before": {"reward": "1"}}', r"evaluation\.json:1: reward of `before`"),
        ("evaluation.json", '{"before": {}, "samples": ["x"]}', r"evaluation\.json:1: `samples`"),
        ("completions/step-000002.parquet", "PAR1", r"step-000002\.parquet: not a file of completions"),
    ],
)
def test_malformed_files_are_refused_with_file_and_line(tmp_path: Path, name: str, content: str, message: str):
    run = fake_run(tmp_path / "run", fake_rows(2))
    (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        report_run.read_run(run)


# --- the page --------------------------------------------------------------------------------------


def test_report_of_a_whole_run_is_one_small_file_without_foreign_scripts_links_or_network(tmp_path: Path):
    run = fake_run(tmp_path / "sentiment-safe", fake_rows(200, crash_at=120))
    path = report_html.write_report(run)
    assert path == run / "report.html"
    assert path.stat().st_size < 1_500_000
    assert sorted(p.name for p in run.glob("*.tmp")) == []
    page = Page(path)
    assert not {"img", "a", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    assert page.named("script") == [{}]  # one, inline
    assert not {"src", "href"} & {name for _, attributes in page.tags for name in attributes}
    (policy,) = [meta["content"] or "" for meta in page.named("meta") if "http-equiv" in meta]
    (script,) = re.findall(r"<script>(.*?)</script>", path.read_text(encoding="utf-8"), re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    for text in ("sentiment-safe", "Finished: 200 steps.", "reward crash, largest fall", "0.9000 ± 0.0200"):
        assert text in page.text
    assert [phase for phase in ("WARMUP", "CLIMBING", "PLATEAU") if phase in page.text] == [
        "WARMUP",
        "CLIMBING",
        "PLATEAU",
    ]
    assert "From step 199: 8 of 9." in page.text
    assert {"ul", "li"} & {tag for tag, _ in page.tags} == set()  # no notes


def test_report_is_the_same_bytes_for_the_same_run(tmp_path: Path):
    run = fake_run(tmp_path / "run", fake_rows(30))
    first = report_html.write_report(run).read_bytes()
    assert report_html.write_report(run).read_bytes() == first


def test_hostile_text_is_shown_and_never_acts(tmp_path: Path):
    rows = [row | {"safe/phase": HOSTILE, "safe/reason": HOSTILE} for row in fake_rows(25)]
    run = fake_run(tmp_path / "<b>run&amp;", rows, text=HOSTILE)
    config = "preset: '<script>alert(2)</script>'\nname: \"</pre><svg onload=alert(3)>\"\n"
    (run / "config.yaml").write_text(config, encoding="utf-8")
    path = report_html.write_report(run)
    harmless = [row | {"safe/phase": "PLATEAU", "safe/reason": "none"} for row in fake_rows(25)]
    page, plain = Page(path), Page(report_html.write_report(fake_run(tmp_path / "clean", harmless)))
    assert page.tags == plain.tags  # the same tags with the same attributes: hostile text has added none
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", path.read_text(encoding="utf-8"))
    assert (
        page.text.count("<script>alert(1)</script></style></pre>") == 4 * 3 + 8 * 2 + 2
    )  # samples, completions, 2 texts
    assert r"\x00\x1b[31m\u202egnp.exe \ud800" in page.text
    assert "{{ 7*7 }} {% raw %}" in page.text  # never evaluated as a template
    assert "</pre><svg onload=alert(3)>" in page.text
    assert "<b>run&amp;" in page.text


def test_preset_without_controller_names_what_is_not_recorded(tmp_path: Path):
    page = Page(report_html.write_report(fake_run(tmp_path / "ppo", fake_rows(60, safe=False))))
    assert "Not recorded by this run: objective/kl_exact, safe/kl_short, safe/kl_long, safe/threshold." in page.text
    assert "Gate and KL coefficient: not recorded (safe/gate, safe/kl_coef)." in page.text
    assert titles(page) == [
        "Reward",
        "KL from the reference",
        "Entropy",
        "Spread of the rewards",
        "Critic",
        "Completion length",
        "Seconds of a step",
    ]


def test_run_of_one_row_with_nothing_else_says_what_is_missing(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "objective/scores": 0.25, "safe/threshold": null}\n')
    page = Page(report_html.write_report(tmp_path))
    for text in (
        "config.yaml is missing",
        "evaluation.json is missing",
        "completions/ is empty",
        "reward crashes: need 20 steps",
        "no samples",
        "Entropy: not recorded (objective/entropy, policy/entropy_avg, safe/entropy_floor).",
        "Seconds of a step: not recorded (total_s,",
        "only the first condition was applied",
        "0.250",
    ):
        assert text in page.text
    assert titles(page) == ["Reward"]
    assert {value for _, value in report_html.about(report_run.read_run(tmp_path))} == {"not recorded"}


def titles(page: Page) -> list[str]:
    """The plots that a page has, by what a screen reader says of them."""
    return [(area["aria-label"] or "").removesuffix(": step") for area in page.named("div") if "aria-label" in area]


def test_interrupted_run_says_how_far_it_came(tmp_path: Path):
    run = fake_run(tmp_path / "run", fake_rows(37))
    (run / "config.yaml").write_text("preset: safe\nmax_steps: 200\n")
    evaluation = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({"before": evaluation["before"]}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 37, "obj')
    text = Page(report_html.write_report(run)).text
    assert "Stopped before its end: 37 of 200 steps." in text
    assert "metrics.jsonl ends in an incomplete line" in text
    assert "evaluation.json has no `after`" in text


def test_report_imports_no_torch():
    code = "import sys; import stable_rlhf.report, stable_rlhf.runs; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- incidents ------------------------------------------------------------------------------------------------------


def incident(step: int, action: str, seen: str = "the KL is 3") -> dict:
    return {
        "step": step, "action": action, "rule": "max_kl", "seen": seen, "done": "went back", "advice": "be slower",
        "figures": {"objective/kl": 3.0},
    }  # fmt: skip


def test_incidents_are_told_and_marked_on_every_plot(tmp_path: Path) -> None:
    rows = [{"step": step, "objective/scores": 0.1 * step, "objective/kl": 0.1} for step in range(30)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = [incident(7, "skip"), incident(12, "roll back", "<script>alert(1)</script>"), incident(29, "stop")]
    (tmp_path / "incidents.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    page = report_html.write_report(tmp_path).read_text()
    assert "<h2>Incidents</h2>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script") == 1  # our own
    drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:  # 29 steps on a width of 1000; an upright line from top to bottom at each
        marks = re.findall(r'<path class="mark (\w+)" d="([^"]*)">', drawing)
        assert marks == [("skip", "M242 0V1000"), ("back", "M414 0V1000"), ("stop", "M1000 0V1000")]


def test_a_run_without_incidents_says_nothing_of_them(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "objective/scores": 0.1}) + "\n")
    page = report_html.write_report(tmp_path).read_text()
    assert "Incidents" not in page


def test_a_damaged_incident_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "objective/scores": 0.1}) + "\n")
    (tmp_path / "incidents.jsonl").write_text(json.dumps(incident(0, "skip")) + "\n{}\n")
    with pytest.raises(ValueError, match=r"incidents\.jsonl:2: not an incident"):
        report_html.write_report(tmp_path)
