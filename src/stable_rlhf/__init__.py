"""stable-rlhf: reinforcement learning from human feedback that does not fall over (SAFE and PPO)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_rlhf.config import Config as Config
    from stable_rlhf.control import Decision as Decision
    from stable_rlhf.control import Observation as Observation
    from stable_rlhf.control import make_controller as make_controller
    from stable_rlhf.data import load_prompts as load_prompts
    from stable_rlhf.errors import ConfigError as ConfigError
    from stable_rlhf.errors import PromptError as PromptError
    from stable_rlhf.errors import RewardError as RewardError
    from stable_rlhf.errors import StableRLHFError as StableRLHFError
    from stable_rlhf.integrations import RunMonitor as RunMonitor
    from stable_rlhf.report import write_report as write_report
    from stable_rlhf.rewards import RewardModel as RewardModel
    from stable_rlhf.training import SAFETrainer as SAFETrainer

_ROOMS = {
    "Config": "config",
    "ConfigError": "errors",
    "Decision": "control",
    "Observation": "control",
    "make_controller": "control",
    "PromptError": "errors",
    "load_prompts": "data",
    "write_report": "report",
    "RewardError": "errors",
    "RewardModel": "rewards",
    "RunMonitor": "integrations",
    "StableRLHFError": "errors",
    "SAFETrainer": "training",
}
__all__ = [
    "Config",
    "ConfigError",
    "Decision",
    "Observation",
    "PromptError",
    "RewardError",
    "RewardModel",
    "RunMonitor",
    "SAFETrainer",
    "StableRLHFError",
    "load_prompts",
    "make_controller",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import stable_rlhf.control` and `stable-rlhf report` need no torch.
    if name not in _ROOMS:
        raise AttributeError(f"module 'stable_rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stable_rlhf.{_ROOMS[name]}"), name)
