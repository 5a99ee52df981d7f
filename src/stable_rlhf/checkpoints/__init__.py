"""Checkpoints: everything a run's future depends on, saved whole, verified, and restored."""

from stable_rlhf.checkpoints import store
from stable_rlhf.checkpoints.snapshots import Snapshots, Tensors
from stable_rlhf.checkpoints.state import OptimizerState, Part, RandomState, capture, restore
from stable_rlhf.checkpoints.store import found, inspect, steps_of

__all__ = [
    "OptimizerState",
    "Part",
    "RandomState",
    "Snapshots",
    "Tensors",
    "capture",
    "found",
    "inspect",
    "restore",
    "steps_of",
    "store",
]
