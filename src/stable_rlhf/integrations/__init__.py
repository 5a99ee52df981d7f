"""The controllers and the guard for trainers that are not ours.

`monitor.RunMonitor` judges a run by three figures a step, and needs no torch. `trl` puts it into TRL's trainers.
"""

from stable_rlhf.integrations.monitor import RunMonitor, Seen

__all__ = ["RunMonitor", "Seen"]
