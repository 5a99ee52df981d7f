"""Many runs: sweeps over settings and seeds, and what they show together. Needs no torch."""

from stable_rlhf.evidence.cluster import Cluster, parse_resources
from stable_rlhf.evidence.devices import Place, places, visible_gpus
from stable_rlhf.evidence.grid import Cell, Sweep, make_sweep
from stable_rlhf.evidence.processes import COMMAND, Launcher, Processes
from stable_rlhf.evidence.progress import Clock, clock, share_left
from stable_rlhf.evidence.sweep import Standing, State, run_sweep, standing

__all__ = [
    "COMMAND",
    "Cell",
    "Clock",
    "Cluster",
    "Launcher",
    "Place",
    "Processes",
    "Standing",
    "State",
    "Sweep",
    "clock",
    "make_sweep",
    "parse_resources",
    "places",
    "run_sweep",
    "share_left",
    "standing",
    "visible_gpus",
]
