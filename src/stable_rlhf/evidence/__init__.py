"""Many runs: sweeps over settings and seeds, and comparisons that tell them apart honestly. Needs no torch."""

from stable_rlhf.evidence.cluster import Cluster, parse_resources
from stable_rlhf.evidence.compare import Comparison, compare, to_json
from stable_rlhf.evidence.devices import Place, places, visible_gpus
from stable_rlhf.evidence.finding import find_outcomes
from stable_rlhf.evidence.grid import Cell, Sweep, make_sweep
from stable_rlhf.evidence.page import write_page
from stable_rlhf.evidence.processes import COMMAND, Launcher, Processes
from stable_rlhf.evidence.progress import Clock, clock, share_left
from stable_rlhf.evidence.sweep import Standing, State, run_sweep, standing
from stable_rlhf.evidence.table import console_tables, notes

__all__ = [
    "COMMAND",
    "Cell",
    "Clock",
    "Cluster",
    "Comparison",
    "Launcher",
    "Place",
    "Processes",
    "Standing",
    "State",
    "Sweep",
    "clock",
    "compare",
    "console_tables",
    "find_outcomes",
    "make_sweep",
    "notes",
    "parse_resources",
    "places",
    "run_sweep",
    "share_left",
    "standing",
    "to_json",
    "visible_gpus",
    "write_page",
]
