"""The arms of the study's benches: names and settings, without torch. An arm is what has an interval of its own."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_rlhf.config import Config
from stable_rlhf.config.presets import PRESETS
from stable_rlhf.control import settings_class
from stable_rlhf.errors import ConfigError

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
"""Learning rates of bench S: two orders of magnitude, PPO's best (1e-4) among them."""
BETAS = (0.005, 0.02, 0.05, 0.1, 0.2)
"""Coefficients that PPO is tuned over; 0.05 is the customary one."""
BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.6, 1.0, 2.0)
"""Budgets of `safe` beside its default, nats per token."""
BASELINES = ("ppo-adaptive", "asymmetric", "pid-lagrangian", "kl-adaptive-lr", "vapo", "paper")
LENGTHS = {16: 2, 64: 5, 256: 15, 1024: 28}
"""Tokens of a completion -> commas that bench L asks for: of SmolLM2-135M-Instruct's texts, 3 to 7 % have that many at
16 to 256 tokens, by 64 to 96 samples; 28 is a guess."""

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Runs that differ in their seed only."""

    part: str
    """The table that it is made for: main, budget, ablation, adversarial."""
    name: str
    """Of the method: `ppo 0.05`, `safe`."""
    rate: float
    preset: str
    settings: Settings
    """Nested, on top of the preset."""

    @property
    def label(self) -> str:
        """``part=main,arm=ppo 0.05,rate=0.0001``: what report.py reads, and the beginning of the cells' names."""
        return f"part={self.part},arm={self.name},rate={self.rate:g}"


def read_label(cell: str) -> dict[str, str]:
    """`part`, `arm`, `rate` and `seed` of a cell's name, which has underscores for spaces; empty for another name."""
    pairs: dict[str, str] = {}
    for piece in cell.rpartition("/")[2].split(","):
        name, _, value = piece.partition("=")
        pairs[name] = value
    if not {"part", "arm", "rate", "seed"} <= pairs.keys():
        return {}
    return {**pairs, "arm": pairs["arm"].replace("_", " ")}


def over(*parts: Settings) -> dict[str, Any]:
    """Nested settings, the later ones on top."""
    made: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            inner = made.get(name)
            made[name] = over(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return made


class Maker:
    """Makes the arms of a bench; presets that this version lacks are kept in `missing`, to be said."""

    def __init__(self, common: Settings) -> None:
        self.common = common
        self.arms: list[Arm] = []
        self.missing: list[str] = []

    def add(self, part: str, name: str, preset: str, rates: Iterable[float], settings: Settings | None = None) -> None:
        if preset not in PRESETS:
            self.missing.append(preset)
            return
        for rate in rates:
            chosen = over(self.common, settings or {}, {"optim": {"learning_rate": rate}})
            self.arms.append(Arm(part=part, name=name, rate=rate, preset=preset, settings=chosen))

    def tuned_ppo(
        self, part: str, betas: Iterable[float], rates: Sequence[float], settings: Settings | None = None
    ) -> None:
        for beta in betas:
            self.add(part, f"ppo {beta:g}", "ppo", rates, over(settings or {}, {"kl": {"settings": {"beta": beta}}}))

    def budgets(self, budgets: Iterable[float], rates: Sequence[float]) -> None:
        for budget in budgets:
            self.add("budget", f"safe {budget:g}", "safe", rates, {"kl": {"settings": {"budget": budget}}})

    def ablations(self, rates: Sequence[float]) -> None:
        for preset in (name for name in PRESETS if name.startswith("safe-")):
            self.add("ablation", preset, preset, rates)


def bench_s(steps: int) -> Maker:
    """The built-in pair. Gold is VADER's lexicon."""
    made = Maker({"max_steps": steps, "eval_steps": max(1, steps // 5), "reward": {"gold": [GOLD_LEXICON]}})
    made.add("main", "safe", "safe", RATES)
    made.tuned_ppo("main", BETAS, RATES)
    for preset in BASELINES:
        made.add("main", preset, preset, RATES)
    made.budgets(BUDGETS, [1e-4])
    made.ablations([1e-4, 1e-3])
    for reward in ("constant", "noise", "tiny", "huge"):
        made.add("adversarial", reward, "safe", [1e-4], {"reward": {"functions": [f"study.rewards:{reward}"]}})
    return made


GOLD_LEXICON = "stable_rlhf.rewards.vader:compound"


def bench_m(steps: int, model: Settings, best: Sequence[str]) -> Maker:
    """SmolLM2-135M with an adapter, sentiment, as the recipe smollm2-sentiment. `best`: presets beside PPO's ladder."""
    made = Maker(
        {
            "max_steps": steps,
            "eval_steps": max(1, steps // 4),
            "model": {"lora_r": 32, **model},
            "data": {"train": "builtin", "max_prompt_length": 32},
            "reward": {"functions": [GOLD_LEXICON]},
            "rollout": {"batch_size": 64, "max_completion_length": 32},
        }
    )
    rates = (3e-4, 1e-3, 3e-3)  # PPO's best (docs/results.md), 3 and 10 times it
    made.add("main", "safe", "safe", rates)
    made.tuned_ppo("main", (0.005, 0.01, 0.02, 0.05, 0.1), rates)
    for preset in best:
        made.add("main", preset, preset, rates)
    made.budgets((0.02, 0.05, 0.1, 0.2, 0.6), [3e-4])
    made.ablations([3e-4, 1e-3])
    return made


def bench_l(steps: int, model: Settings, lengths: Sequence[int], folder: Path) -> Maker:
    """Verifiable rewards at several lengths. Writes the prompts, which carry the number of commas, to `folder`."""
    made = Maker({"max_steps": steps})
    own = {field.name for field in dataclasses.fields(settings_class("safe"))}
    for length in lengths:
        file = write_prompts(folder / f"prompts-{length}.jsonl", LENGTHS[length])
        common: dict[str, Any] = {
            "model": {"lora_r": 32, **model} if model else {},
            "data": {"train": str(file), "max_prompt_length": 32, "eval_size": 0},
            "rollout": {"batch_size": 64, "max_completion_length": length},
        }
        rate = 3e-4 if model else 1e-4
        for reward in ("exact", "listed"):
            part, chosen = f"{reward}-{length}", over(common, {"reward": {"functions": [f"study.rewards:{reward}"]}})
            made.tuned_ppo(part, (0.005, 0.05), [rate], chosen)
            made.add(part, "safe", "safe", [rate], chosen)
            if "budget_per" in own:
                other = over(chosen, {"kl": {"settings": {"budget_per": "sequence", "budget": PER_SEQUENCE}}})
                made.add(part, "safe per sequence", "safe", [rate], other)
    if "budget_per" not in own:
        made.missing.append("kl.settings.budget_per")
    return made


PER_SEQUENCE = 9.6
"""Nats: what the default of 0.3 a token allows a completion of 32 tokens, at which it was found."""


def bench_h(steps: int, model: Settings, data: Path, proxy: Path, gold: Path) -> Maker:
    """HH: a proxy reward model of one half of the pairs is trained on, gold of the other half judges."""
    made = Maker(
        {
            "max_steps": steps,
            "eval_steps": max(1, steps // 12),
            "model": {"lora_r": 32, **model},
            "data": {"train": str(data), "format": "hh", "max_prompt_length": 256},
            "reward": {"functions": [str(proxy)], "gold": [str(gold)]},
            "rollout": {"batch_size": 64, "max_completion_length": 64},
        }
    )
    made.add("main", "safe", "safe", [3e-4])
    made.tuned_ppo("main", (0.005, 0.01, 0.02, 0.05), [3e-4])
    made.add("main", "ppo-nokl", "ppo-nokl", [3e-4])  # shows that there is something to over-optimise
    return made


def write_prompts(file: Path, commas: int) -> Path:
    """The built-in training prompts as JSON lines, each with the number of commas that is asked for."""
    import stable_rlhf

    source = Path(stable_rlhf.__file__).parent / "assets" / "prompts.json"
    rows = [{"prompt": prompt, "commas": commas} for prompt in json.loads(source.read_text(encoding="utf-8"))["train"]]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def config_of(arm: Arm, seed: int, output_dir: Path, more: Settings) -> Config:
    """The settings of a cell. Raises ConfigError with the arm's name."""
    whole = over({"save_steps": 0, "log": {"progress": False, "completions_steps": 0}}, arm.settings, more)
    try:
        return Config.from_preset(arm.preset, seed=seed, output_dir=str(output_dir), **whole)
    except ConfigError as error:
        raise ConfigError(f"{arm.label}: {error}") from error
