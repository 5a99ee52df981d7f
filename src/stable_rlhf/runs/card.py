"""The model card: README.md of the folder that a run saves its policy in."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stable_rlhf.runs import evaluation, incidents
from stable_rlhf.runs.metrics import read_rows
from stable_rlhf.text import formatted, printable

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Names that the hub accepts in a card's metadata; it refuses the whole card for any other, such as a folder."""

VALUE = 300
"""Characters shown of a setting or name: a line of the card."""

LAST = {
    "objective/scores": "reward",
    "objective/kl": "KL to the reference, nats per token",
    "objective/entropy": "entropy, nats per token",
    "completions/mean_length": "length, tokens",
}
"""Figures of the last step that the card shows, with their labels."""


def model_card(run_dir: Path, settings: Mapping[str, Any], adapter: bool, steps: int | None = None) -> str:
    """The card's Markdown, from the files of a run.

    ``settings``: all of the run's, by their full names; ``adapter``: whether the folder holds a PEFT adapter;
    ``steps``: those done where the policy is that of a checkpoint, whose card has no figures of later ones. Names are
    shown as code, in which nothing is markup; no text of a data set or of a model is part of the card.
    """
    rows = read_rows(run_dir / "metrics.jsonl")[0] if (run_dir / "metrics.jsonl").exists() else []
    known, seen = evaluation.read(run_dir), incidents.read(run_dir)
    if steps is not None:
        is_last = all(row["step"] < steps for row in rows) and not settings["load_best_model_at_end"]
        rows = [row for row in rows if row["step"] < steps]
        seen = [incident for incident in seen if incident["step"] < steps]
        then = [figures for figures in known.get("during", []) if figures["step"] == steps]
        known["after"] = then[-1] if then else known.get("after") if is_last else None
    parts = [
        "---\n" + yaml.safe_dump(_metadata(settings, adapter), sort_keys=False) + "---",
        f"# {_code(run_dir.name)}",
        f"A policy trained by reinforcement learning from {_code(settings['model.name'])} with stable-rlhf "
        f"{importlib.metadata.version('stable-rlhf')}, preset {_code(settings['preset'])}.",
        _table(("", ""), _subject(settings, rows)),
        "## Figures",
        *_figures(known, rows),
        "## Incidents",
        _incidents(seen),
        "## How to load it",
        _loading(adapter, critic=settings.get("critic.heads", 1) > 0),
        "## Settings",
        "\n".join(
            f"    {printable(f'{name}: {value}', VALUE)}"
            for name, value in sorted(settings.items())
            if name != "output_dir"
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(settings: Mapping[str, Any], adapter: bool) -> dict[str, Any]:
    known: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "tags": ["stable-rlhf", "rlhf"]}
    if HUB_NAME.fullmatch(settings["model.name"]) and not Path(settings["model.name"]).exists():
        known["base_model"] = settings["model.name"]
    if HUB_NAME.fullmatch(settings["data.train"]) and not Path(settings["data.train"]).exists():
        known["datasets"] = [settings["data.train"]]
    return known | {"pipeline_tag": "text-generation"}


def _subject(settings: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rewards = settings["reward.functions"]
    weights = settings["reward.weights"] or [1.0] * len(rewards)
    adapter = f"rank {settings['model.lora_r']}" if settings["model.lora_r"] else "none of the settings'"
    gold = ", ".join(map(_code, settings["reward.gold"]))
    return [
        ("policy before training", _code(settings["model.name"])),
        ("adapter", adapter),
        ("prompts", f"{_code(settings['data.train'])}, split {_code(settings['data.split'])}"),
        ("reward", " + ".join(f"{weight:g} x {_code(name)}" for weight, name in zip(weights, rewards, strict=True))),
        *([("gold reward, only measured", gold)] if gold else []),
        ("KL controller", _code(settings["kl.controller"])),
        ("steps", f"{rows[-1]['step'] + 1 if rows else 0} of {_sampled(settings)} each"),
        ("seed", str(settings["seed"])),
    ]


def _sampled(settings: Mapping[str, Any]) -> str:
    """Prompts of a step, and completions of each where there are several."""
    group = settings.get("rollout.num_generations", 1)  # a run of an earlier version has none
    prompts = f"{settings['rollout.batch_size'] // group} prompts"
    return prompts if group == 1 else f"{prompts} with {group} completions"


def _figures(known: Mapping[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    parts = []
    if "before" in known:
        prompts = formatted(known["before"].get("prompts"), ".0f")
        evaluated = evaluation.evaluation_rows(known)
        parts += [
            f"On {prompts} held-out prompts; ± is one standard error.",
            _table(("", "before", "after", "change"), [(_cell(label), *rest) for label, *rest in evaluated]),
        ]
    if rows:
        last = [(label, formatted(rows[-1].get(name), ".4g")) for name, label in LAST.items()]
        parts += ["In the last step of training:", _table(("", "last step"), last)]
    return parts or ["None were recorded."]


def _incidents(found: list[dict[str, Any]]) -> str:
    if not found:
        return "The guard saw none, or was off (`guard.enabled`)."
    rolled = sum(incident["action"] == "roll back" for incident in found)
    lines = [f"- step {incident['step']}: {_code(incident['rule'])}, {incident['action']}" for incident in found]
    return "\n".join([f"The guard saw {len(found)}, and rolled the run back {rolled} times.", "", *lines])


def _loading(adapter: bool, critic: bool) -> str:
    if adapter:
        load = [
            "from peft import AutoPeftModelForCausalLM",
            "",
            "policy = AutoPeftModelForCausalLM.from_pretrained(FOLDER)",
        ]
    else:
        load = [
            "from transformers import AutoModelForCausalLM",
            "",
            "policy = AutoModelForCausalLM.from_pretrained(FOLDER)",
        ]
    load = ["from transformers import AutoTokenizer", *load, "tokenizer = AutoTokenizer.from_pretrained(FOLDER)"]
    code = "\n".join(f"    {line}".rstrip() for line in load)
    of = "has the critic's heads, which generation does not need" if critic else "is empty: there was no critic"
    heads = f"`value_heads.safetensors` {of}."
    return f"FOLDER is this folder, or its name on the hub.\n\n{code}\n\n{heads}"


def _code(text: str) -> str:
    return "`" + printable(str(text), VALUE).replace("`", "'").replace("|", "\u00a6") + "`"


def _cell(label: str) -> str:
    """A label, as code where it has a gold reward's name in it, in which nothing is markup."""
    kind, colon, name = label.partition(": ")
    return f"{kind}{colon}{_code(name)}" if colon else label


def _table(heading: tuple[str, ...], rows: list[Any]) -> str:
    lines = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
