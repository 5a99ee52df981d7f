"""Checkpoints: everything a run's future depends on, saved whole, verified, and put back."""

from stable_rlhf.checkpoints import store
from stable_rlhf.checkpoints.snapshots import Snapshots, Tensors
from stable_rlhf.checkpoints.state import (
    callbacks_of,
    capture,
    check_callbacks,
    load_random_state,
    put_callbacks,
    random_state,
    restore,
)
from stable_rlhf.checkpoints.store import found, inspect, steps_of

__all__ = [
    "Snapshots",
    "Tensors",
    "callbacks_of",
    "capture",
    "check_callbacks",
    "found",
    "inspect",
    "load_random_state",
    "put_callbacks",
    "random_state",
    "restore",
    "steps_of",
    "store",
]
