"""What would go wrong in a run, found before hours are spent on it."""

from stable_rlhf.doctor.checks import examine

__all__ = [
    "examine",
]
