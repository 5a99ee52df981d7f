"""Which settings may change when a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stable_rlhf.config.checks import is_url
from stable_rlhf.errors import CheckpointError

MAY_CHANGE = {
    "preset", "output_dir", "overwrite_output_dir", "max_steps", "save_steps", "save_total_limit", "log", "guard",
    "eval_steps", "load_best_model_at_end", "push_to_hub", "hub_model_id", "hub_private",
    "model.name", "model.revision", "model.gguf_file", "model.trust_remote_code",  # its weights are compared
    "model.device", "model.self_check", "model.gradient_checkpointing", "model.cuda_graphs", "model.torch_compile",
    "optim.microbatch_tokens",
    "reward.batch_size", "reward.trust_remote_code", "reward.timeout", "reward.retries",
    "reward.max_wait", "reward.token_env",
    "reward.accept_changed",
}  # fmt: skip
"""Settings that may change at a resume: they say where and how a run continues, not which run it is."""


def refuse_changes(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises CheckpointError for the first setting that differs from the run's own, unless it may change."""

    def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in settings.items():
            if isinstance(value, Mapping):
                found |= {f"{name}.{field}": inner for field, inner in flat(value).items()}
            else:
                found[name] = value
        return found

    here, there = flat(settings), flat(saved)
    for name in sorted(here.keys() | there.keys()):
        if name in MAY_CHANGE or name.split(".")[0] in MAY_CHANGE or here.get(name) == there.get(name):
            continue
        if name in ("reward.functions", "reward.gold") and _moved(here[name], there[name]):
            continue
        raise CheckpointError(
            f"{name} is {here.get(name)!r} here and {there.get(name)!r} in the checkpoint: resume with the run's own, "
            "or start a new run"
        )


def given_in_python(settings: Mapping[str, Any]) -> str | None:
    """The first setting that stands for an object given to SAFETrainer, which no command can load; None without one."""
    named = {
        "model.name": [settings["model"]["name"]],
        "data.train": [settings["data"]["train"]],
        "reward.functions": settings["reward"]["functions"],
        "reward.gold": settings["reward"].get("gold", []),  # a run of an earlier version has none
    }
    for name, values in named.items():
        for value in values:
            local = value.startswith(("<", "__main__:")) or ":<" in value or ".<locals>." in value
            if local and not is_url(value):
                return f"{name}={value!r}"
    return None


def _moved(here: list[str], there: list[str]) -> bool:
    """Whether two lists of rewards differ only in the addresses of servers."""
    return len(here) == len(there) and all(
        a == b or (is_url(a) and is_url(b)) for a, b in zip(here, there, strict=True)
    )
