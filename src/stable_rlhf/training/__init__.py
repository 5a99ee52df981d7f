"""The training loop: one step, the trainer around it, recovery, callbacks, stopping."""

from stable_rlhf.training.given import as_given, check_named
from stable_rlhf.training.trainer import SAFETrainer

__all__ = [
    "SAFETrainer",
    "as_given",
    "check_named",
]
