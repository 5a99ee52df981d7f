"""The settings of a run: sections, presets, and reading them from YAML files and the command line."""

from stable_rlhf.config.algorithm import CriticConfig, KLConfig, OptimConfig
from stable_rlhf.config.checks import is_url, only_with, require, url_without_secrets
from stable_rlhf.config.config import Config, complete_settings, flat_settings
from stable_rlhf.config.files import over, read_settings, read_value, settings_text
from stable_rlhf.config.loading import (
    HELP,
    HELP_ALL,
    files_and_flags,
    given_settings,
    help_text,
    known_type,
    load_config,
    probable_setting,
    setting_value,
)
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
    "files_and_flags",
    "flat_settings",
    "given_in_python",
    "given_settings",
    "help_text",
    "is_url",
    "known_type",
    "load_config",
    "only_with",
    "over",
    "probable_setting",
    "read_settings",
    "read_value",
    "refuse_changes",
    "require",
    "setting_value",
    "settings_text",
    "url_without_secrets",
]
