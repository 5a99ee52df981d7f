"""`python -m stable_rlhf`: the command line, as launchers start it."""

from __future__ import annotations

import sys

from stable_rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
