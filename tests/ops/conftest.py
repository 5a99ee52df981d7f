"""Property tests here are the same on every run and are not timed: the first call pays for torch's start."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("reproducible", deadline=None, derandomize=True, database=None)
settings.load_profile("reproducible")
