"""The command `export`."""

from __future__ import annotations

import os
from pathlib import Path

from stable_rlhf.cli.parser import Parser
from stable_rlhf.errors import ConfigError, Exit
from stable_rlhf.text import visible


def export(arguments: list[str]) -> int:
    made = Parser(prog="stable-rlhf export", allow_abbrev=False)
    made.add_argument("checkpoint", type=Path, help="a folder in a run's checkpoints/, or the run's folder: its newest")
    made.add_argument("out", type=Path, help="the new folder")
    made.add_argument("--merge", action="store_true", help="fold the adapter into the model, which becomes a plain one")
    given = made.parse_args(arguments)
    if not os.path.isdir(given.checkpoint):  # unlike Path.is_dir, a name that is too long is not an error
        raise ConfigError(f"{given.checkpoint} is not a folder; give a checkpoint, such as RUN/checkpoints/step-000020")
    if not os.path.isdir(given.checkpoint / "checkpoints") and (given.checkpoint / "value_heads.safetensors").is_file():
        raise ConfigError(
            f"{given.checkpoint} is no checkpoint but a finished policy, which from_pretrained loads as it is; to fold "
            "an adapter into the model, export the newest checkpoint, by the run's folder: RUN OUT --merge"
        )
    from transformers.utils import logging  # torch and transformers load only when the arguments are good

    from stable_rlhf.checkpoints import store
    from stable_rlhf.training import export as write

    logging.disable_progress_bar()
    checkpoint = given.checkpoint
    if os.path.isdir(checkpoint / "checkpoints"):
        checkpoint, _ = store.newest(checkpoint / "checkpoints")
    write(checkpoint, given.out, given.merge)
    print(visible(str(given.out)))
    return Exit.DONE
