"""Checks that find a run's problems before hours are spent on it."""

from stable_rlhf.doctor.checks import examine

__all__ = [
    "examine",
]
