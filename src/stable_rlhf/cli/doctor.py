"""The command `doctor`."""

from __future__ import annotations

from pathlib import Path

from stable_rlhf.cli.parser import Parser
from stable_rlhf.cli.settings import asks_for_help, show_settings
from stable_rlhf.config import load_config
from stable_rlhf.errors import Exit
from stable_rlhf.runs import check_output


def doctor(arguments: list[str]) -> int:
    """Checks a run of this package or, with `--trl`, one of TRL's own script."""
    if any(name.split("=")[0] == "--trl" for name in arguments):
        return _doctor_trl(arguments)
    if asks_for_help(arguments):
        return show_settings("doctor", arguments)
    config = load_config(arguments)
    check_output(Path(config.output_dir or "runs"))
    from transformers.utils import logging  # torch and transformers load only when the settings are good

    from stable_rlhf.doctor import examine

    logging.disable_progress_bar()
    return Exit.DONE if examine(config) else Exit.FAILED


def _doctor_trl(arguments: list[str]) -> int:
    made = Parser(prog="stable-rlhf doctor", allow_abbrev=False)
    made.add_argument("--trl", metavar="FILE", required=True, help="YAML file of the arguments of TRL's own script")
    made.add_argument("--script", choices=("grpo", "rloo"), default="grpo", help="TRL's script that reads the file")
    made.add_argument("--num_processes", type=int, help="processes that train; by default what the file says, or 1")
    given = made.parse_args(arguments)
    from transformers.utils import logging

    from stable_rlhf.doctor.trl import examine_trl, read_arguments

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return Exit.DONE if examine_trl(read_arguments(given.trl, given.script, given.num_processes)) else Exit.FAILED
