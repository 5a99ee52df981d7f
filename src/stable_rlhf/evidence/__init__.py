"""Many runs: sweeps over settings and seeds, and comparisons that tell them apart honestly. Needs no torch."""

from stable_rlhf.evidence.cluster import Cluster, parse_resources
from stable_rlhf.evidence.compare import Comparison, compare, to_json
from stable_rlhf.evidence.devices import Place, places, visible_gpus
from stable_rlhf.evidence.finding import find_outcomes
from stable_rlhf.evidence.grid import Cell, Sweep, make_sweep
from stable_rlhf.evidence.mapping import read_mapping
from stable_rlhf.evidence.page import write_page
from stable_rlhf.evidence.processes import COMMAND, Launcher, Processes
from stable_rlhf.evidence.progress import Clock, clock, share_left
from stable_rlhf.evidence.sweep import Standing, State, run_sweep, standing
from stable_rlhf.evidence.table import console_tables, notes
from stable_rlhf.evidence.watch_folder import WatchFolder
from stable_rlhf.evidence.watched import Asked, Watched, about, closing, follow, takes_mapping

__all__ = [
    "COMMAND",
    "Asked",
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
    "WatchFolder",
    "Watched",
    "about",
    "clock",
    "closing",
    "compare",
    "console_tables",
    "find_outcomes",
    "follow",
    "make_sweep",
    "notes",
    "parse_resources",
    "places",
    "read_mapping",
    "run_sweep",
    "share_left",
    "standing",
    "takes_mapping",
    "to_json",
    "visible_gpus",
    "write_page",
]
