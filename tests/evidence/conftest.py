"""The browser that opens comparisons is that of the reports."""

from __future__ import annotations

from tests.report.conftest import chromium

__all__ = ["chromium"]
