"""The command `doctor`."""

from __future__ import annotations

from pathlib import Path

from stable_rlhf.cli.settings import asks_for_help, show_settings
from stable_rlhf.config import load_config
from stable_rlhf.errors import Exit
from stable_rlhf.runs import check_output


def doctor(arguments: list[str]) -> int:
    if asks_for_help(arguments):
        return show_settings("doctor", arguments)
    config = load_config(arguments)
    check_output(Path(config.output_dir or "runs"))
    from transformers.utils import logging  # torch and transformers load only when the settings are good

    from stable_rlhf.doctor import examine

    logging.disable_progress_bar()
    return Exit.DONE if examine(config) else Exit.FAILED
