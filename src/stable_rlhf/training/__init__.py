"""The training loop: one step, the trainer around it, recovery, callbacks, stopping."""

from stable_rlhf.training.export import export
from stable_rlhf.training.given import as_given, check_held_out, check_named, probe_servers
from stable_rlhf.training.result import TrainResult
from stable_rlhf.training.stopping import GracefulStop
from stable_rlhf.training.trainer import SAFETrainer

__all__ = [
    "GracefulStop",
    "SAFETrainer",
    "TrainResult",
    "as_given",
    "check_held_out",
    "check_named",
    "export",
    "probe_servers",
]
