"""stable-rlhf: reinforcement learning from human feedback that does not fall over (SAFE and PPO)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_rlhf.config import Config as Config
    from stable_rlhf.config import ConfigError as ConfigError
    from stable_rlhf.control import Decision as Decision
    from stable_rlhf.control import Observation as Observation
    from stable_rlhf.control import make_controller as make_controller
    from stable_rlhf.prompts import PromptError as PromptError
    from stable_rlhf.prompts import load_prompts as load_prompts
    from stable_rlhf.report import write_report as write_report
    from stable_rlhf.scoring import RewardError as RewardError
    from stable_rlhf.scoring import RewardModel as RewardModel
    from stable_rlhf.trainer import SAFETrainer as SAFETrainer

_ROOMS = {
    "Config": "config",
    "ConfigError": "config",
    "Decision": "control",
    "Observation": "control",
    "make_controller": "control",
    "PromptError": "prompts",
    "load_prompts": "prompts",
    "write_report": "report",
    "RewardError": "scoring",
    "RewardModel": "scoring",
    "SAFETrainer": "trainer",
}
__all__ = [
    "Config",
    "ConfigError",
    "Decision",
    "Observation",
    "PromptError",
    "RewardError",
    "RewardModel",
    "SAFETrainer",
    "load_prompts",
    "make_controller",
    "write_report",
]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import stable_rlhf.control` and `stable-rlhf report` need no torch.
    if name not in _ROOMS:
        raise AttributeError(f"module 'stable_rlhf' has no attribute {name!r}")
    return getattr(importlib.import_module(f"stable_rlhf.{_ROOMS[name]}"), name)
