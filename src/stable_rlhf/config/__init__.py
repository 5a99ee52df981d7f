"""The settings of a run: sections, presets, and reading them from YAML files and the command line."""

from stable_rlhf.config.algorithm import CriticConfig, KLConfig, OptimConfig
from stable_rlhf.config.checks import is_url, only_with, require, url_without_secrets
from stable_rlhf.config.config import Config, complete_settings, flat_settings
from stable_rlhf.config.files import settings_text
from stable_rlhf.config.loading import HELP, HELP_ALL, help_text, load_config, probable_setting
from stable_rlhf.config.presets import PRESETS
from stable_rlhf.config.resume import given_in_python, refuse_changes
from stable_rlhf.config.sections import DataConfig, ModelConfig, RewardConfig, RolloutConfig

__all__ = [
    "HELP",
    "HELP_ALL",
    "PRESETS",
    "Config",
    "CriticConfig",
    "DataConfig",
    "KLConfig",
    "ModelConfig",
    "OptimConfig",
    "RewardConfig",
    "RolloutConfig",
    "complete_settings",
    "flat_settings",
    "given_in_python",
    "help_text",
    "is_url",
    "load_config",
    "only_with",
    "probable_setting",
    "refuse_changes",
    "require",
    "settings_text",
    "url_without_secrets",
]
