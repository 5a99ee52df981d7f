"""The command line: `stable-rlhf train`, `resume`, `report`, `doctor`, `serve-reward`."""

from stable_rlhf.cli.main import main

__all__ = [
    "main",
]
