"""evidence/watched.py: a log is judged by the guard's rules, at once and while it grows. Oracles are literal logs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from stable_rlhf.control import GuardConfig
from stable_rlhf.errors import ConfigError, NoRunError, RunError
from stable_rlhf.evidence.compare import compare
from stable_rlhf.evidence.mapping import MetricMapping, read_mapping
from stable_rlhf.evidence.outcome import Status, read_outcome
from stable_rlhf.evidence.watch_folder import WatchFolder
from stable_rlhf.evidence.watched import Asked, Watched, about, closing, follow
from stable_rlhf.report import read_run, write_report

Rows = list[dict[str, Any]]

KL, REWARD, STD, ENTROPY = "objective/kl", "objective/scores", "objective/scores_std", "objective/entropy"
LENGTH, DISTINCT = "completions/mean_length", "completions/distinct_2"


def healthy(steps: int) -> Rows:
    """Rows with our names: the reward climbs by 1 in all, everything else is steady."""
    return [
        {"step": n, REWARD: n / steps, STD: 0.5, KL: 0.1, ENTROPY: 2.0, LENGTH: 20.0, DISTINCT: 0.8}
        for n in range(steps)
    ]


def since(step: int, rows: Rows, **changed: float) -> Rows:
    """The rows with figures that are others from a step on. Names are the last parts of the metrics'."""
    names = {"kl": KL, "entropy": ENTROPY, "length": LENGTH, "distinct": DISTINCT, "reward": REWARD}
    more = {names[name]: value for name, value in changed.items()}
    return [{**row, **more} if row["step"] >= step else row for row in rows]


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def trl_state(folder: Path, rows: Sequence[Mapping[str, Any]], planned: int) -> Path:
    """A trainer_state.json as Transformers writes it: steps count from 1."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"global_step": rows[-1]["step"], "max_steps": planned, "log_history": list(rows)}
    (folder / "trainer_state.json").write_text(json.dumps(state, indent=2))
    return folder


def trl_rows(rows: Rows) -> Rows:
    """The rows as TRL's GRPO logs them."""
    theirs = {REWARD: "reward", STD: "reward_std", KL: "kl", ENTROPY: "entropy", LENGTH: LENGTH}
    return [
        {"step": row["step"] + 1, "policy_loss": 0.1, **{theirs[name]: row[name] for name in theirs}} for row in rows
    ]


def watched(log: Path, **asked: Any) -> Watched:
    made = Watched(Asked(log=log, **{"guard": GuardConfig(), **asked}))
    made.look()
    return made


def verdict(found: Watched) -> tuple[int, str] | None:
    """(step, rule) at which the run should be stopped."""
    return None if found.stopped is None else (found.stopped["step"], found.stopped["rule"])


# -- what is noticed, and at which row ------------------------------------------------------------------------------


def test_a_healthy_log_has_no_incident(tmp_path: Path) -> None:
    found = watched(jsonl(tmp_path / "log.jsonl", healthy(60)), completions=64)
    assert (verdict(found), found.incidents, len(found.rows)) == (None, [], 60)
    assert closing(found).endswith("log.jsonl: nothing found in 60 steps")


@pytest.mark.parametrize(
    ("changed", "step", "rule"),
    [
        ({"kl": 2.1}, 30, "max_kl"),  # above 2 nats: at once
        ({"entropy": 0.39}, 34, "min_entropy"),  # below a fifth of 2.0: after five steps in a row
        ({"entropy": 4.1}, 34, "max_entropy"),
        ({"distinct": 0.19}, 34, "min_distinct"),
        ({"length": 3.9}, 34, "min_length"),
        ({"kl": float("nan")}, 30, "non_finite"),
        ({"reward": float("inf")}, 30, "non_finite"),
        ({"reward": -1e200}, 30, "non_finite"),  # no figure of a run
    ],
)
def test_a_failure_is_noticed_at_its_row_by_its_rule(
    tmp_path: Path, changed: dict[str, float], step: int, rule: str
) -> None:
    found = watched(jsonl(tmp_path / "log.jsonl", since(30, healthy(60), **changed)), completions=64)
    assert verdict(found) == (step, rule)
    assert len(found.rows) == step + 1
    assert closing(found).endswith(f"stops the run at step {step} (rule {rule}); {59 - step} later rows not judged")


def test_a_fall_that_is_not_as_long_as_the_patience_is_none(tmp_path: Path) -> None:
    rows = since(30, healthy(60), entropy=0.1)
    rows[34] = healthy(60)[34]
    log = jsonl(tmp_path / "log.jsonl", rows)
    assert verdict(watched(log)) == (39, "min_entropy")  # four rows, one good, five rows
    assert verdict(watched(log, guard=GuardConfig(patience=4))) == (33, "min_entropy")
    assert verdict(watched(log, guard=GuardConfig(min_entropy=None))) is None


def crashing() -> Rows:
    """The reward is 0 for 5 steps, 1 until step 40, then 0 again."""
    return [{**row, REWARD: float(5 <= row["step"] < 40)} for row in healthy(60)]


def test_a_crash_of_the_reward_needs_the_number_of_completions(tmp_path: Path) -> None:
    """The mean of 20 steps has lost more than half of the 1 that was gained from the 11th step of the fall on; the
    guard acts at the fifth such step."""
    log = jsonl(tmp_path / "log.jsonl", crashing())
    found = watched(log, completions=64)
    assert verdict(found) == (40 + 11 + 5 - 2, "max_drawdown")
    assert verdict(watched(log)) is None
    assert not any("fall of the reward" in sentence for sentence in about(found))
    assert [s for s in about(watched(log)) if "fall of the reward is not judged: the number of completions" in s]
    assert [s for s in about(watched(log, completions=2)) if "2 completions a step do not show its error" in s]


def test_the_number_of_completions_may_stand_in_settings_json(tmp_path: Path) -> None:
    folder = trl_state(tmp_path / "run", trl_rows(crashing()), planned=60)
    assert verdict(watched(folder)) is None
    assert any("rollout.batch_size in settings.json" in sentence for sentence in about(watched(folder)))
    (folder / "settings.json").write_text('{"rollout.batch_size": 64}')
    assert verdict(watched(folder)) == (54, "max_drawdown")


def test_a_budget_moves_the_ceiling_and_allows_short_and_sure_answers(tmp_path: Path) -> None:
    log = jsonl(tmp_path / "log.jsonl", since(30, healthy(60), kl=0.6))
    assert verdict(watched(log)) is None
    assert verdict(watched(log, budget=0.1)) == (30, "max_kl")  # 5 x 0.1
    assert verdict(watched(log, budget=0.1, guard=GuardConfig(max_kl_ratio=7.0))) is None
    log = jsonl(tmp_path / "log.jsonl", since(30, healthy(60), entropy=0.1, length=2.0))
    assert verdict(watched(log)) == (34, "min_entropy")
    assert verdict(watched(log, budget=0.1)) is None


def test_what_the_log_does_not_have_is_said(tmp_path: Path) -> None:
    rows = [{"step": n, REWARD: 1.0, ENTROPY: 2.0} for n in range(0, 60, 10)]
    said = about(watched(jsonl(tmp_path / "log.jsonl", rows), guard=GuardConfig(max_kl_ratio=3.0)))
    lacking = "KL (objective/kl), variety (completions/distinct_2), length (completions/mean_length)"
    assert f"Not judged, since the log does not have it: {lacking}." in said
    assert "There is a row every 10 steps; a rule's steps in a row are rows." in said
    assert any("guard.max_kl_ratio has no effect" in sentence for sentence in said)
    assert any("no objective/scores_std" in sentence for sentence in said)


def test_a_left_out_update_is_an_incident_but_no_stop(tmp_path: Path) -> None:
    rows = healthy(20)
    rows[7]["policy/skipped_steps"] = 1
    found = watched(jsonl(tmp_path / "log.jsonl", rows))
    assert [(each["step"], each["action"], each["done"]) for each in found.incidents] == [
        (7, "skip", "the run goes on")
    ]
    assert closing(found).endswith("1 incident, but no reason to stop the run, in 20 steps")


# -- every kind of log ----------------------------------------------------------------------------------------------


def test_a_state_of_trl_is_judged_in_our_steps_and_units(tmp_path: Path) -> None:
    rows = trl_rows(since(30, healthy(60), kl=2.1))
    found = watched(trl_state(tmp_path / "out" / "checkpoint-60", rows, planned=100).parent)
    assert verdict(found) == (30, "max_kl")
    assert (found.planned, found.finished) == (100, False)
    assert found.rows[0] == {"step": 0, REWARD: 0.0, STD: 0.5, KL: 0.1, ENTROPY: 2.0, LENGTH: 20.0}


MAPPING = """
step: iteration
objective/scores: mean reward
objective/kl: {column: kl_sum, per: length}
objective/entropy: {column: bits, scale: 0.5}
completions/mean_length: length
max_steps: 60
"""


def mapped(folder: Path, rows: Rows) -> tuple[Path, MetricMapping]:
    """A CSV with names and units of its own, and what they mean."""
    (folder / "mapping.yaml").write_text(MAPPING)
    cells = [[r["step"] + 1, r[REWARD], r[KL] * r[LENGTH], r[LENGTH], 2 * r[ENTROPY]] for r in rows]
    lines = ["iteration,mean reward,kl_sum,length,bits", *(",".join(map(str, row)) for row in cells)]
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    return folder / "log.csv", read_mapping(folder / "mapping.yaml")


def test_a_csv_is_judged_by_its_mapping(tmp_path: Path) -> None:
    log, mapping = mapped(tmp_path, since(30, healthy(60), kl=2.1))
    assert verdict(watched(log, mapping=mapping)) == (30, "max_kl")
    log, mapping = mapped(tmp_path, since(30, healthy(60), entropy=0.39))
    found = watched(log, mapping=mapping)
    assert (verdict(found), found.planned) == ((34, "min_entropy"), 60)
    with pytest.raises(RunError, match="neither ours nor TRL's"):
        watched(log)


def test_a_run_folder_of_ours_has_its_own_threshold_and_completions(tmp_path: Path) -> None:
    rows = [{**row, "episode": 64 * (row["step"] + 1), "safe/threshold": 0.3, "safe/reason": "x"} for row in crashing()]
    jsonl(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "config.yaml").write_text("max_steps: 60\nguard: {max_kl: 1.0}\n")
    found = watched(tmp_path)
    assert (verdict(found), found.finished) == ((54, "max_drawdown"), True)
    jsonl(tmp_path / "metrics.jsonl", [{**row, KL: 1.6} for row in rows])
    assert verdict(watched(tmp_path)) == (0, "max_kl")


@pytest.mark.parametrize(
    ("name", "text", "error", "said"),
    [
        ("none.csv", None, NoRunError, "none.csv does not exist; check the path"),
        ("empty.csv", "step,reward\n", NoRunError, "empty.csv:1: no complete row yet"),
        ("word.csv", "step,reward\n1,0.5\n2,much\n", RunError, "word.csv:3: reward is 'much', which is not a number"),
        ("true.jsonl", '{"step": 1, "reward": true}\n', RunError, "true.jsonl:1: reward is True"),
        ("back.csv", "step,reward\n2,1\n1,1\n", RunError, "back.csv:3: step 1 follows step 2"),
        ("log.txt", "step,reward\n1,1\n", RunError, "is no log that can be read"),
        ("trainer_state.json", "{", RunError, "trainer_state.json:1: not JSON"),
    ],
)
def test_a_log_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, text: str | None, error: type[RunError], said: str
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error) as caught:
        watched(tmp_path / name)
    assert said in str(caught.value)
    assert isinstance(caught.value, NoRunError) is (error is NoRunError)


def test_a_folder_without_a_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(NoRunError, match=r"neither metrics\.jsonl nor trainer_state\.json"):
        watched(tmp_path)


# -- row by row -----------------------------------------------------------------------------------------------------


def by_four(rows: Rows) -> Rows:
    """Rows of TRL where four optimiser steps share a rollout: only the first has the reward."""
    found = []
    for row in rows:
        first = 4 * (row["step"] - 1) + 1
        found.append({**row, "step": first})
        found += [{"step": first + n, "kl": 9.0, "entropy": 0.0, "policy_loss": 0.1} for n in (1, 2, 3)]
    return found


def prefixes(folder: Path, kind: str, rows: Rows) -> tuple[Path, dict[str, Any], list[Callable[[], object]]]:
    """(log, what is asked of it, a call for each state of the growing log)."""
    if kind == "csv":
        log, mapping = mapped(folder, rows)
        text = log.read_text()
        log.unlink()
        ends = range(len("iteration"), len(text) + 1, 13)  # mostly within a line
        return log, {"mapping": mapping}, [lambda end=end: log.write_text(text[:end]) for end in (*ends, len(text))]
    if kind == "jsonl":
        log = folder / "log.jsonl"
        return log, {}, [lambda n=n: jsonl(log, rows[:n]) for n in range(1, len(rows) + 1)]
    theirs = by_four(trl_rows(rows)) if kind == "trl by four" else trl_rows(rows)
    counts = range(1, len(theirs) + 1)
    return folder / "run", {}, [lambda n=n: trl_state(folder / "run", theirs[:n], len(theirs)) for n in counts]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "trl", "trl by four"])
@pytest.mark.parametrize("changed", [{}, {"kl": 2.1}, {"entropy": 0.39}, {"reward": -9.0}])
def test_row_by_row_the_verdicts_are_those_of_the_whole_log(
    tmp_path: Path, kind: str, changed: dict[str, float]
) -> None:
    log, asked, states = prefixes(tmp_path, kind, since(30, healthy(50), **changed))
    growing = Watched(Asked(log=log, guard=GuardConfig(), completions=64, **asked))
    for write in states:
        write()
        if growing.stopped is None:
            try:
                assert not growing.look(live=True, growing=True)
            except NoRunError:
                assert growing.rows == []
    whole = watched(log, completions=64, **asked)
    assert growing.rows == whole.rows
    assert growing.incidents == whole.incidents
    assert (growing.stopped is None) is (changed == {} or (kind == "csv" and "reward" in changed))


# -- following ------------------------------------------------------------------------------------------------------


class Story:
    """Follows a log whose author writes between two looks: each act stands for one poll, of ``seconds``."""

    def __init__(self, acts: Sequence[Callable[[], object]], seconds: float = 5.0) -> None:
        self.acts, self.seconds, self.now, self.said = list(acts), seconds, 0.0, list[str]()

    def is_set(self) -> bool:
        return not self.acts

    def wait(self, timeout: float) -> None:
        self.now += self.seconds
        self.acts.pop(0)()

    def follow(self, log: Path, **asked: Any) -> Watched:
        made = Watched(Asked(log=log, **{"guard": GuardConfig(), **asked}))
        follow(made, self.said.append, every=1.0, stopped=self, clock=lambda: self.now)  # pyright: ignore[reportArgumentType]
        return made


def nothing() -> None: ...


def test_a_log_that_is_not_there_yet_is_waited_for_and_stops_at_its_row(tmp_path: Path) -> None:
    log, rows = tmp_path / "log.jsonl", since(30, healthy(60), kl=2.1)
    story = Story([*(nothing,) * 20, *(lambda n=n: jsonl(log, rows[:n]) for n in (1, 20, 31, 60)), nothing])
    found = story.follow(log)
    assert verdict(found) == (30, "max_kl")
    assert len(story.acts) == 2  # what came later was not read
    assert story.said[0].startswith("waiting for the first row (")
    assert story.said[-1].startswith("step 30: the KL is 2.1 nats per token")
    assert len([sentence for sentence in story.said if "waiting" in sentence]) == 1


def test_it_ends_when_the_planned_steps_are_done(tmp_path: Path) -> None:
    rows = trl_rows(healthy(40))
    acts = [lambda n=n: trl_state(tmp_path / "run", rows[:n], 40) for n in (10, 20, 40)]
    story = Story([*acts, nothing])
    found = story.follow(tmp_path / "run")
    assert (len(found.rows), found.finished, verdict(found)) == (40, True, None)
    assert story.acts == [nothing]


def test_a_log_that_is_replaced_is_judged_anew_and_says_so(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    collapsing = since(10, healthy(60), entropy=0.1)
    acts = [lambda: jsonl(log, collapsing[:14]), lambda: jsonl(log, healthy(60)[:3]), lambda: jsonl(log, healthy(60))]
    story = Story([*acts, nothing])
    found = story.follow(log)
    assert (verdict(found), len(found.rows)) == (None, 60)
    assert len([sentence for sentence in story.said if "judged again from its beginning" in sentence]) == 1


def test_a_torn_line_is_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    whole = "step,reward,kl\n1,0.1,0.1\n2,0.2,0.1\n"
    acts = [lambda: log.write_text(whole + "3,0.3,3"), nothing, lambda: log.write_text(whole + "3,0.3,3e-1\n"), nothing]
    story = Story(acts)
    found = story.follow(log)
    assert ([row[KL] for row in found.rows], found.incidents) == ([0.1, 0.1, 0.3], [])


def test_a_last_line_without_its_newline_counts_once_the_log_has_rested(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    acts: list[Callable[[], object]] = [lambda: log.write_text("step,reward,kl\n1,0.1,0.1\n2,0.2,3.0")]
    assert len(Story([*acts, *(nothing,) * 5]).follow(log).rows) == 1
    assert verdict(Story([*acts, *(nothing,) * 9]).follow(log)) == (1, "max_kl")


def test_a_log_that_stays_unreadable_is_an_error_and_one_that_is_repaired_is_none(tmp_path: Path) -> None:
    folder = trl_state(tmp_path / "run", trl_rows(healthy(10)), 10)
    state = folder / "trainer_state.json"
    text = state.read_text()
    state.write_text(text[:100])
    story = Story([*(nothing,) * 3, lambda: state.write_text(text), nothing])
    assert len(story.follow(folder).rows) == 10
    assert [s for s in story.said if "tried again for 30 s" in s] == story.said[:1]
    state.write_text(text[:100])
    with pytest.raises(RunError, match=r"trainer_state\.json:\d+: not JSON"):
        Story([nothing] * 9).follow(folder)


def test_a_file_that_a_thread_grows_is_followed(tmp_path: Path) -> None:
    log, rows = tmp_path / "log.jsonl", since(30, healthy(200), kl=2.1)
    ended = threading.Event()

    def write() -> None:
        with log.open("w") as file:
            for row in rows:
                text = json.dumps(row) + "\n"
                for part in (text[:9], text[9:]):
                    file.write(part)
                    file.flush()
                    if ended.wait(0.002):
                        return

    thread = threading.Thread(target=write)
    thread.start()
    made = Watched(Asked(log=log, guard=GuardConfig()))
    said: list[str] = []
    follow(made, said.append, every=0.01, stopped=threading.Event())
    ended.set()
    thread.join()
    assert verdict(made) == (30, "max_kl")


# -- the folder -----------------------------------------------------------------------------------------------------


def test_rows_and_incidents_are_written_as_a_run(tmp_path: Path) -> None:
    log, out = jsonl(tmp_path / "log.jsonl", since(30, healthy(60), kl=float("nan"))), tmp_path / "out"
    for _ in range(2):  # the second time over the first
        folder = WatchFolder(out, log)
        asked = Asked(log=log, guard=GuardConfig(), completions=64, budget=0.3, planned=100)
        made = Watched(asked, folder)
        made.look()
        folder.close()
    run = read_run(out)
    assert (len(run.rows), run.rows[30][KL], run.rows[29]["safe/threshold"]) == (31, None, 0.3)
    assert [(each["step"], each["action"], each["figures"][KL]) for each in run.incidents] == [(30, "stop", "nan")]
    assert run.config["watched"] == {"log": str(log), "budget": 0.3, "completions": 64}
    assert (run.config["max_steps"], run.config["guard"]["max_rollbacks"], run.running) == (100, 0, False)
    assert "given up by the guard at step 30" in write_report(out).read_text().replace("Given", "given")
    assert read_outcome(out, "x").status is Status.GIVEN_UP


def test_a_log_that_is_begun_anew_begins_its_folder_anew(tmp_path: Path) -> None:
    log = jsonl(tmp_path / "log.jsonl", healthy(20))
    folder = WatchFolder(tmp_path / "out", log)
    made = Watched(Asked(log=log, guard=GuardConfig()), folder)
    assert not made.look(live=True)
    jsonl(log, since(5, healthy(9), kl=3.0))
    assert made.look(live=True)
    folder.close()
    assert len(read_run(tmp_path / "out").rows) == 6
    assert [each["step"] for each in read_run(tmp_path / "out").incidents] == [5]


def test_a_folder_with_what_is_not_watchs_own_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    jsonl(run / "metrics.jsonl", healthy(5))
    with pytest.raises(ConfigError, match="has the log itself"):
        WatchFolder(run, run)
    with pytest.raises(ConfigError, match="has the log itself"):
        WatchFolder(run, run / "metrics.jsonl")
    for name in ("metrics.jsonl", "config.yaml"):
        other = tmp_path / name
        other.mkdir()
        (other / name).write_text("optim: {learning_rate: 1}\n")
        with pytest.raises(ConfigError, match=rf"has a {name} that `watch` did not write"):
            WatchFolder(other, run)
    assert len(read_run(run).rows) == 5


def test_names_and_texts_of_a_stranger_reach_no_terminal_and_no_row(tmp_path: Path) -> None:
    hostile = "\x1b]0;gone\x07<script>alert(1)</script>"
    rows = [{**row, hostile: 1.0, f"rewards/{hostile.replace('/', '')}/mean": float("nan")} for row in healthy(9)]
    log = jsonl(tmp_path / "log.jsonl", rows)
    assert watched(log).incidents == []  # columns that nobody mapped are not read
    mapping = {"step": "step", f"rewards/{hostile.replace('/', '')}/mean": f"rewards/{hostile.replace('/', '')}/mean"}
    (tmp_path / "mapping.yaml").write_text(json.dumps(mapping))
    folder = WatchFolder(tmp_path / "out", log)
    made = Watched(Asked(log=log, guard=GuardConfig(), mapping=read_mapping(tmp_path / "mapping.yaml")), folder)
    made.look()
    folder.close()
    assert verdict(made) == (0, "non_finite")
    page = write_report(tmp_path / "out").read_text()
    assert "\x1b" not in page
    assert "<script>alert" not in page


def test_a_watched_log_stands_in_a_comparison(tmp_path: Path) -> None:
    log = jsonl(tmp_path / "log.jsonl", healthy(60))
    folder = WatchFolder(tmp_path / "out", log)
    Watched(Asked(log=log, guard=GuardConfig(), completions=64), folder).look()
    folder.close()
    outcomes = [read_outcome(tmp_path / "out", name) for name in ("a", "b")]
    assert outcomes[0].figures["reward/final"] == pytest.approx(sum(range(40, 60)) / 60 / 20, rel=1e-6)
    assert len(compare(outcomes, ["watched.log"]).arms) == 1
