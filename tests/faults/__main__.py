"""`make faults`: every fault in its long form, counted. Exits with 1 if anything is lost."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults import checkpoints, disks, kills, survivals, sweeps

FAULTS = {**kills.FAULTS, **sweeps.FAULTS, **survivals.FAULTS, **disks.FAULTS, **checkpoints.FAULTS}
COUNTS = {
    "runs killed at random": 50,
    "sweeps killed at random": 20,
    "figures that are NaN": len(survivals.WHERE) * len(survivals.WHEN),
    "reward servers that fail": 2 * len(survivals.FAILURES) + 1,
    "clocks that jump": 3,
    "a run on a full disk": 8,
    "a run whose files may not be so long": 8,
    "checkpoint bytes flipped": 200,
    "checkpoint files cut or lengthened": 200,
    "saves killed at random": 50,
    "saves killed at each operation": 0,  # as many as there are
    "saves of files that may not be so long": 20,
    "saves on a full disk": 20,
}
"""How often each is tried."""


def main(arguments: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    made.add_argument("--seed", type=int, default=4, help="of all that is random in it (default 4)")
    made.add_argument("--only", choices=FAULTS, action="append", help="this fault alone; may be given again")
    given = made.parse_args(arguments)
    print(f"seed {given.seed}\n{'fault':<40} {'tried':>6} {'survived':>9} {'lost':>5} {'seconds':>8}")
    lost: list[str] = []
    for name in given.only or FAULTS:
        began = time.monotonic()
        try:
            counts = FAULTS[name](COUNTS[name], given.seed)
        except PermissionError as error:
            print(f"{name:<40} not tried: {error}", flush=True)
            continue
        seconds = time.monotonic() - began
        how = f"  {counts.how}" if counts.how else ""
        line = f"{name:<40} {counts.tried:>6} {counts.survived:>9} {len(counts.lost):>5} {seconds:>8.1f}{how}"
        print(line, flush=True)
        for sentence in counts.lost:
            print(f"  lost: {sentence}", flush=True)
        lost += counts.lost
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
