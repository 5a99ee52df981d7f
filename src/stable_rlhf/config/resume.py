"""Which settings may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_rlhf.config.checks import is_url
from stable_rlhf.config.sections import SECTIONS
from stable_rlhf.errors import CheckpointError

MAY_CHANGE = {
    "preset", "output_dir", "overwrite_output_dir", "max_steps", "save_steps", "save_total_limit", "log", "guard",
    "model.name", "model.revision", "model.gguf_file", "model.trust_remote_code",  # its weights are compared
    "model.device", "model.self_check", "model.gradient_checkpointing", "model.cuda_graphs", "model.torch_compile",
    "optim.microbatch_tokens",
    "reward.batch_size", "reward.trust_remote_code", "reward.timeout", "reward.retries",
    "reward.max_wait", "reward.token_env",
}  # fmt: skip
"""Settings that may change at a resume: they say where and how a run continues, not which run it is."""


def refuse_changes(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the first setting that differs from the run's own, unless it may change."""

    def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
        sections = {name: value for name, value in settings.items() if name in SECTIONS}
        plain = {name: value for name, value in settings.items() if name not in SECTIONS}
        return plain | {
            f"{name}.{field}": value for name, section in sections.items() for field, value in section.items()
        }

    here, there = flat(settings), flat(saved)
    for name in sorted(here.keys() | there.keys()):
        if name in MAY_CHANGE or name.split(".")[0] in MAY_CHANGE or here.get(name) == there.get(name):
            continue
        if name == "reward.functions" and _moved(here[name], there[name]):
            continue
        raise CheckpointError(
            f"{name} is {here.get(name)!r} here and {there.get(name)!r} in the checkpoint: resume with the run's own, "
            "or start a new run"
        )


def _moved(here: list[str], there: list[str]) -> bool:
    """Whether two lists of rewards differ only in the addresses of servers."""
    return len(here) == len(there) and all(
        a == b or (is_url(a) and is_url(b)) for a, b in zip(here, there, strict=True)
    )
