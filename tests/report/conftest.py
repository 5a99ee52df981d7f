"""The browser that opens reports."""

from __future__ import annotations

import os
import shutil

import pytest

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
REQUIRED = "STABLE_RLHF_REQUIRE_CHROMIUM"
"""Set by .ci/run: without Chromium the browser's tests then fail, instead of being passed over."""


@pytest.fixture(scope="module")
def chromium() -> str:
    if CHROMIUM is None:
        message = "Chromium is not installed, so no browser has opened the report: `apt-get install chromium`"
        pytest.fail(message) if os.environ.get(REQUIRED) else pytest.skip(message)
    return CHROMIUM
