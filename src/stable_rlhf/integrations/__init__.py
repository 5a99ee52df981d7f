"""The controllers and the guard for trainers that are not ours.

`monitor.RunMonitor` judges a run by three figures a step, and needs no torch. `trl` puts it into TRL's trainers, `verl`
the controller into verl's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_rlhf.integrations.monitor import RunMonitor as RunMonitor
    from stable_rlhf.integrations.monitor import Seen as Seen

__all__ = ["RunMonitor", "Seen"]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: verl imports its plugin in every process, and the monitor reads and writes runs.
    if name not in __all__:
        raise AttributeError(f"module 'stable_rlhf.integrations' has no attribute {name!r}")
    from stable_rlhf.integrations import monitor

    return getattr(monitor, name)
