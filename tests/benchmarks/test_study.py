"""benchmarks/study: labels, arms, packing, and the tables from tiny rows with known answers."""

from __future__ import annotations

import gzip
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from study import arms, bench, frontier, halves, mechanisms, pack, report, rewards, runs, trl_peers
from study.aims import adversarial_table, baselines_table, budget_table, frontier_table, gold_table, rate_table
from study.runs import Run

from stable_rlhf.config.presets import PRESETS
from stable_rlhf.evidence.outcome import Status
from stable_rlhf.evidence.statistics import Difference


def run(arm: str = "safe", seed: int = 0, part: str = "main", rate: float = 1e-4, **more: Any) -> Run:
    given = {"bench": "S", "status": Status.FINISHED, "figures": {}, **more}
    return Run(part=part, arm=arm, rate=rate, seed=seed, **given)


# -- the cells ---------------------------------------------------------------------------------------------------------


def made(folder: Path) -> dict[str, arms.Maker]:
    model = {"name": "some/model"}
    return {
        "S": arms.bench_s(300),
        "M": arms.bench_m(120, model, ["ppo-adaptive", "asymmetric"]),
        "L": arms.bench_l(100, model, [16, 1024], folder),
        "H": arms.bench_h(120, model, folder / "pairs.jsonl", folder / "proxy", folder / "gold"),
    }


def test_every_cell_of_every_bench_has_settings_that_are_valid_and_a_name_of_its_own(tmp_path: Path) -> None:
    for name, maker in made(tmp_path).items():
        sweep = bench.cells_of(maker.arms, range(2), tmp_path / name, {"model": {"device": "cpu"}})
        assert len({cell.name for cell in sweep.cells}) == len(sweep.cells) == 2 * len(maker.arms)
        assert [cell.seed for cell in sweep.cells] == sorted(cell.seed for cell in sweep.cells)
        assert all(arms.read_label(cell.name)["seed"] == str(cell.seed) for cell in sweep.cells)


def test_bench_s_has_ppos_ladder_at_every_rate_and_every_ablation(tmp_path: Path) -> None:
    found = made(tmp_path)["S"].arms
    assert {(a.name, a.rate) for a in found if a.name.startswith("ppo ")} == {
        (f"ppo {beta:g}", rate) for beta in arms.BETAS for rate in arms.RATES
    }
    assert {a.name for a in found if a.part == "ablation"} == {name for name in PRESETS if name.startswith("safe-")}
    cell = bench.cells_of([a for a in found if a.name == "ppo 0.02"][:1], [3], tmp_path, {}).cells[0]
    assert cell.name == "part=main,arm=ppo_0.02,rate=3e-05,seed=3"
    assert (cell.config.kl.settings.beta, cell.config.optim.learning_rate, cell.config.seed) == (0.02, 3e-5, 3)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_preset_that_is_not_there_is_told(tmp_path: Path) -> None:
    maker = arms.Maker({})
    maker.add("main", "x", "no-such-preset", [1e-4])
    assert (maker.arms, maker.missing) == ([], ["no-such-preset"])


def test_a_label_is_read_back_and_other_names_are_none() -> None:
    label = arms.read_label("S/part=main,arm=ppo_0.05,rate=0.0001,seed=2")
    assert label == {"part": "main", "arm": "ppo 0.05", "rate": "0.0001", "seed": "2"}
    assert arms.read_label("preset=safe,seed=0") == {}


def test_trls_runs_have_labels_and_can_be_chosen() -> None:
    chosen = trl_peers.peers(2, ["grpo,0,1e-4"])
    assert [peer.name for peer in chosen] == [f"part=main,arm=TRL_grpo_0,rate=0.0001,seed={n}" for n in (0, 1)]
    everything = trl_peers.peers(1, [])
    assert len({trl_peers.log_of(Path(peer.name)).name for peer in everything}) == 8
    with_safe = trl_peers.peers(1, [], budget=0.3, rates=[1e-3])
    assert [arms.read_label(peer.name)["arm"] for peer in with_safe] == ["TRL grpo SAFE 0.3", "TRL rloo SAFE 0.3"]
    assert "--budget" in with_safe[0].command("m", None, 5, Path("o"))


def test_dialogues_that_begin_alike_are_in_one_half(tmp_path: Path) -> None:
    rows = [
        {"chosen": f"\n\nHuman: {q}?\n\nAssistant: yes" + more, "rejected": "x"}
        for q in range(40)
        for more in ("", "\n\nHuman: and?\n\nAssistant: no")
    ]
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    found = halves.halves(file, tmp_path / "halves")
    sides = [[json.loads(line)["chosen"] for line in file.read_text().splitlines()] for file in found.values()]
    first = [{text.split("\n\nAssistant:")[0] for text in side} for side in sides]
    assert sum(map(len, sides)) == 80
    assert first[0].isdisjoint(first[1])
    assert min(map(len, first)) >= 10


# -- rewards -----------------------------------------------------------------------------------------------------------


def test_verifiable_rewards_count_what_they_say() -> None:
    texts = ["a, b", "a, b, c", "none"]
    assert rewards.exact(texts, texts, commas=[2, 2, 0]) == [0.0, 1.0, 1.0]
    assert rewards.listed([""] * 3, ["Warm, warm and QUIET.", "", " ".join(sorted(rewards.LISTED))]) == [
        *(0.2, 0.0, 1.0)
    ]


def test_scaled_rewards_are_the_built_in_one_times_and_plus_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewards, "_builtin", lambda: lambda prompts, completions: [0.5, -1.0])
    assert rewards.tiny(["", ""], ["", ""]) == pytest.approx([1.0005e-3, 0.999e-3])
    assert rewards.huge(["", ""], ["", ""]) == [-999_500_000.0, -1_001_000_000.0]


# -- packing -----------------------------------------------------------------------------------------------------------


def test_a_packed_sweep_is_small_and_is_read_as_before(tmp_path: Path) -> None:
    sweep = tmp_path / "S"
    name = "part=main,arm=safe,rate=0.0001,seed=0"
    cell = sweep / "cells" / name
    other = "part=main,arm=safe,rate=0.0001,seed=1"  # stopped by the time
    (cell / "checkpoints").mkdir(parents=True)
    (sweep / "cells" / other).mkdir()
    (sweep / "cells" / other / "metrics.jsonl").write_text('{"step": 0}\n')
    said = {"reason": None, "seconds": 1.0, "ended": "2026-11-27T00:00:00Z"}
    ends = [{"cell": name, "exit_code": 0, **said}, {"cell": other, "exit_code": 143, **said}]
    (cell / "checkpoints" / "big").write_bytes(b"x" * 1000)
    (sweep / "outcomes.jsonl").write_text("".join(json.dumps(end) + "\n" for end in ends))
    (sweep / "sweep.yaml").write_text(
        json.dumps({"version": 1, "base": {}, "grid": {}, "seeds": [0], "cells": [name, other]})
    )
    rows = [
        {"step": n, "episode": 8 * n, "objective/scores": n + 1 / 3, "objective/kl": 0.1, "lr": 1.0} for n in (0, 1)
    ]
    (cell / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2')
    (cell / "evaluation.json").write_text(
        json.dumps({"before": {"reward": 1 / 3}, "samples": [{"prompt": "p"}], "after": {"reward": 2 / 3}})
    )
    assert pack.pack(sweep, tmp_path / "S.tar.xz") == 1
    with tarfile.open(tmp_path / "S.tar.xz") as archive:
        archive.extractall(tmp_path / "out", filter="data")
    assert not (tmp_path / "out" / "S" / "cells" / name / "checkpoints").exists()
    (found,) = runs.read_bench("S", [tmp_path / "out" / "S"])
    assert (found.arm, found.rate, found.seed, found.part) == ("safe", 1e-4, 0, "main")
    assert found.rows == [
        {"step": n, "episode": 8 * n, "objective/scores": [0.3333, 1.333][n], "objective/kl": 0.1} for n in (0, 1)
    ]
    assert found.evaluation == {"before": {"reward": 0.3333}, "samples": [], "after": {"reward": 0.6667}}
    assert found.figures["reward/average"] == pytest.approx((0.3333 + 1.333) / 2)


# -- figures of a run --------------------------------------------------------------------------------------------------


def test_the_share_of_steps_near_the_threshold_is_counted_from_the_first() -> None:
    kls = [0.0, 0.1, 0.26, 0.31, 0.2, 0.3]
    found = runs.own_figures([{"step": n, "objective/kl": kl, "safe/threshold": 0.3} for n, kl in enumerate(kls)])
    assert found["kl/first"] == 2.0
    assert found["kl/held"] == 0.75


def test_a_better_estimate_of_the_kl_is_taken_where_there_is_one() -> None:
    rows = [{"step": 0, "objective/kl": 0.9, "objective/kl_exact": 0.3, "safe/threshold": 0.3}]
    assert runs.own_figures(rows)["kl/held"] == 1.0


def test_distinct_2_and_length_are_of_the_ends() -> None:
    rows = [
        {"step": n, "completions/distinct_2": 0.8 if n < 5 else 0.6, "completions/mean_length": 10.0 + n // 5}
        for n in range(10)
    ]
    found = runs.own_figures(rows)
    assert found["distinct_2/share"] == pytest.approx(0.75)
    assert found["length/change"] == 1.0


def evaluated(*points: tuple[int, float, float]) -> dict[str, Any]:
    """An evaluation.json of (step, reward, gold), each with a standard error of .1."""
    made = [
        {"step": step, "reward": reward, "reward_se": 0.1, "kl": 0.0, "gold/g/mean": gold, "gold/g/se": 0.1}
        for step, reward, gold in points
    ]
    return {"before": made[0], "during": made[1:-1], "after": made[-1]}


def test_gold_falls_only_where_both_move_and_in_the_steps_that_are_asked_for() -> None:
    rows = [{"step": 9}]
    fell = evaluated((0, 0.0, 1.0), (5, 1.0, 0.5), (10, 1.0, 0.5))
    assert runs.gold_falls(run(evaluation=fell, rows=rows), "g") is True
    assert runs.gold_falls(run(evaluation=fell, rows=rows), "g", 3) is None
    assert runs.gold_falls(run(evaluation=fell, rows=rows), "g", 5) is True
    noise = evaluated((0, 0.0, 1.0), (5, 1.0, 0.8), (10, 0.1, 0.0))
    assert runs.gold_falls(run(evaluation=noise, rows=rows), "g") is False


# -- tables ------------------------------------------------------------------------------------------------------------


def test_the_frontier_is_straight_over_the_root_of_the_kl() -> None:
    points = [(0.04, 1.0), (0.16, 2.0)]
    assert frontier.frontier_reward(points, 0.09) == pytest.approx(1.5)
    assert frontier.frontier_reward(points, 0.0) == 1.0
    assert frontier.frontier_reward(points, 4.0) == 2.0


def ladder(seed: int, **more: Any) -> list[Run]:
    """Two healthy PPOs at the ends of a frontier and one that collapsed far above it."""
    figures = {"healthy": 1.0, "reward/average": 1.0}
    return [
        run("ppo 0.05", seed, figures={**figures, "kl/final": 0.04, "reward/final": 1.0 + seed}, **more),
        run("ppo 0.005", seed, figures={**figures, "kl/final": 0.16, "reward/final": 2.0 + seed}, **more),
        run("ppo 0.02", seed, figures={"healthy": 0.0, "kl/final": 0.09, "reward/final": 9.0}, **more),
    ]


def test_safe_is_measured_against_the_healthy_ppo_runs_of_its_own_seed() -> None:
    safe = [
        run(seed=n, figures={"kl/final": 0.09, "reward/final": 1.7 + 1.01 * n, "reward/average": 1.1 + 0.01 * n})
        for n in (0, 1)
    ]
    everything = [*safe, *ladder(0), *ladder(1)]
    assert list(frontier.above_frontier(safe, everything[2:]).values()) == pytest.approx([0.2, 0.21])
    assert frontier.best_ppo(everything) == ("ppo 0.005", 1e-4)
    rows = frontier_table("S", everything).rows
    assert rows[0][0] == "final reward above PPO's frontier at the same KL"
    assert rows[0][1].startswith("0.205 [0.14")  # t of one degree of freedom is 12.7, the error .005
    assert rows[0][2] == "above"
    assert rows[1][2] == "above, +10.5 %"


@pytest.mark.parametrize(
    ("gaps", "word"),
    [
        ([(0.1, 0.3), (-1.0, 1.0)], "helps"),
        ([(-0.3, -0.1), (-1.0, 1.0)], "hurts"),
        ([(-0.1, 0.1), (-1.0, 1.0)], "does nothing"),
        ([(0.1, 0.3), (-2.0, -1.0)], "mixed"),
        ([], "not known"),
    ],
)
def test_a_verdict_follows_from_the_intervals(gaps: list[tuple[float, float]], word: str) -> None:
    made = [Difference((low + high) / 2, low, high, 0.5, (5, 5), True) for low, high in gaps]
    assert mechanisms.verdict(made) == word


def test_a_mechanism_is_compared_at_the_ablations_rates() -> None:
    def of(arm: str, part: str, rate: float, seed: int, reward: float) -> Run:
        return run(arm, seed, part, rate, figures={"reward/final": reward, "healthy": 1.0})

    found = [of("safe", "main", rate, n, 2.0 + n) for rate in (1e-4, 3e-3) for n in (0, 1)]
    found += [of("safe-no-threshold", "ablation", 1e-4, n, 1.0 + n) for n in (0, 1)]
    (row,) = mechanisms.mechanism_table("S", found).rows
    assert row[:3] == ["threshold", "2 and 2", "1 [1, 1]"]
    assert row[-1] == "helps"


@pytest.mark.parametrize(("arm", "name"), [("safe-double-critic", "double-critic"), ("safe-gate", "gate")])
def test_a_mechanism_that_safe_does_not_have_is_judged_by_the_runs_that_put_it_in(arm: str, name: str) -> None:
    def of(made: str, part: str, seed: int, reward: float) -> Run:
        return run(made, seed, part, figures={"reward/final": reward, "healthy": 1.0})

    found = [of("safe", "main", n, 2.0 + n) for n in (0, 1)] + [of(arm, "ablation", n, 2.5 + n) for n in (0, 1, 2)]
    (row,) = mechanisms.mechanism_table("S", found).rows
    assert row[:2] == [name, "2 and 3"]
    assert row[2].startswith("0.5 [0.5, 0.5]")  # with it less without, on the seeds that both have
    assert row[-1] == "helps"


def test_each_baseline_is_taken_at_its_best_setting() -> None:
    figures = {"reward/average": 2.0, "healthy": 1.0}
    safe = [run(seed=n, figures={**figures, "reward/final": 2.5 + n}) for n in (0, 1)]
    safe += [run(rate=1e-3, figures={**figures, "reward/final": 9.0})]
    broken = [run("TRL grpo 0.04", n, figures={"reward/final": 9.0, "healthy": 0.0}) for n in (0, 1)]
    rows = {row[0]: row for row in baselines_table("M", [*safe, *ladder(0), *ladder(1), *broken]).rows}
    assert rows["ppo"][1:4] == ["3", "4 of 6", "ppo 0.005, 0.0001"]
    assert rows["ppo"][5:] == ["1 [1, 1]", "0.5 [0.5, 0.5]"]
    assert rows["TRL grpo"][1:4] == ["1", "0 of 2", "none mostly healthy"]
    assert rows["safe"][1:4] == ["2", "3 of 3", "safe, 0.001"]


def test_budgets_are_in_order_and_the_default_is_last() -> None:
    figures = {"kl/held": 0.9, "kl/final": 0.1, "reward/final": 1.0, "incidents": 1.0}
    found = [run(f"safe {b}", part="budget", figures=figures) for b in ("0.2", "0.02")] + [run(figures=figures)]
    assert [row[0] for row in budget_table("S", found).rows] == ["0.02", "0.2", "default"]
    assert budget_table("S", found).rows[0] == ["0.02", "1", "0.9", "0.1", "1", "1 in 1 runs"]


def test_rates_are_compared_with_the_arm_itself_at_ppos_best_rate() -> None:
    def climbs(rate: float, steps: int, final: float) -> Run:
        rows = [{"step": n, "objective/scores": min(1.0, n / steps) * final} for n in range(100)]
        return run("ppo 0.05", rate=rate, rows=rows, figures={"reward/final": final, "healthy": 1.0})

    rows = rate_table("S", [climbs(1e-4, 20, 1.0), climbs(1e-3, 60, 0.97), climbs(1e-5, 60, 0.5)]).rows
    assert [row[1] for row in rows] == ["0.0001", "0.001"]
    assert rows[0][3:] == ["+0.0 %", "1.00", "1 of 1"]
    assert rows[1][3] == "-3.0 %"
    assert 1.5 < float(rows[1][4]) < 3.0


def test_scaled_rewards_show_how_far_the_decisions_are_apart() -> None:
    plain = run(rows=[{"step": 0, "safe/kl_coef": 1.0}, {"step": 1, "safe/kl_coef": 2.0}])
    scaled = run("huge", part="adversarial", rows=[{"step": 0, "safe/kl_coef": 1.0}, {"step": 1, "safe/kl_coef": 1.5}])
    (row,) = adversarial_table("S", [plain, scaled]).rows
    assert (row[0], row[-1]) == ("huge", "0.25")


def test_gold_is_counted_by_runs() -> None:
    evaluation = evaluated((0, 0.0, 1.0), (5, 1.0, 0.5), (10, 1.0, 0.4))
    late = [run(seed=n, evaluation=evaluation, rows=[{"step": 9}], figures={"kl/first": 4.0 + n}) for n in (0, 1)]
    (row,) = gold_table("H", late).rows
    assert row == ["safe", "0.0001", "1 [1, 1]", "-0.6 [-0.6, -0.6]", "-", "1 of 1", "2 of 2"]
    (row,) = gold_table("H", [run("ppo 0.05", evaluation=evaluation, rows=[{"step": 9}])]).rows
    assert row[-2:] == ["-", "1 of 1"]


def test_the_page_has_tables_and_pictures_of_what_there_is(tmp_path: Path) -> None:
    safe = run(figures={"kl/final": 0.09, "reward/final": 1.7, "reward/average": 1.1, "healthy": 1.0})
    found = {"S": [safe, *ladder(0), run("safe", rate=1e-3, figures=safe.figures)]}
    drawn = report.draw("S", found["S"], tmp_path)
    assert [file.name for file in drawn] == ["S-frontier.svg", "S-rates.svg"]
    assert all(file.read_text().startswith("<?xml") for file in drawn)
    text = report.page(found, drawn)
    assert "### Aim 1, bench S" in text
    assert "![Bench S: S-rates](S-rates.svg)" in text
