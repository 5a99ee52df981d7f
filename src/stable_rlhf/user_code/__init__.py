"""Rewards and callbacks of the user's run next to the run, not in it: each leaves the other's state as it was."""

from stable_rlhf.user_code.children import ours_only
from stable_rlhf.user_code.shield import RunRandom, Shield
from stable_rlhf.user_code.stream import RandomStream

__all__ = ["RandomStream", "RunRandom", "Shield", "ours_only"]
