"""The short help of commands that take settings: those that runs change most, on a screen or two."""

from __future__ import annotations

import textwrap

from jsonargparse import ArgumentParser

COMMON = {
    "The run": ("preset", "output_dir", "max_steps", "save_steps", "eval_steps", "seed"),
    "The policy": ("model.name", "model.device", "model.lora_r", "model.gradient_checkpointing"),
    "The prompts": ("data.train", "data.prompt_column", "data.eval", "data.eval_size", "data.max_prompt_length"),
    "The reward": ("reward.functions", "reward.weights", "reward.gold", "reward.missing_eos_penalty"),
    "Sampling": ("rollout.batch_size", "rollout.max_completion_length", "rollout.temperature"),
    "Learning": ("optim.learning_rate", "optim.num_iterations", "optim.num_mini_batches", "optim.microbatch_tokens"),
    "The KL to the policy before training": ("kl.controller", "kl.settings.budget", "kl.settings.beta"),
    "Output": ("log.report_to", "log.progress"),
}
"""Settings by what they are of. A setting that the chosen controller does not have is left out."""

WIDTH, COLUMN = 100, 33
"""Columns of a line, and of a setting with its default: the longest is --model.gradient_checkpointing."""


def short_help(made: ArgumentParser, command: str) -> str:
    """The settings of COMMON, with the first sentence of the help and the default that a parser has."""
    by_name = {action.dest: action for action in made._actions}
    lines = [
        f"usage: {made.usage}",
        "",
        f"The settings that runs change most; `stable-rlhf {command} --help-all` lists every setting. FILE is YAML, or "
        "recipe:NAME for one that ships with the package.",
    ]
    lines[-1:] = textwrap.wrap(lines[-1], WIDTH)
    for heading, names in COMMON.items():
        lines += ["", f"{heading}:"]
        for action in (by_name[name] for name in names if name in by_name):
            lines += textwrap.wrap(
                f"{_beginning(action.help or '')} (default: {_shown(action.default)})",
                WIDTH,
                initial_indent=f"  --{action.dest}".ljust(COLUMN) + " ",
                subsequent_indent=" " * (COLUMN + 1),
                break_on_hyphens=False,
            )
    return "\n".join([*lines, ""])


def _beginning(text: str) -> str:
    """The first sentence, and the second where the first is only a few words."""
    sentences = " ".join(text.replace("``", "").split()).rstrip(".").split(". ")
    return ". ".join(sentences[: 1 if len(sentences[0].split()) > 3 else 2]) + "."


def _shown(default: object) -> str:
    """A default as the command line and YAML have it."""
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default).replace("'", "")
