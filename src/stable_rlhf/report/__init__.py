"""The report of one run: crashes, plots, a verdict, tables, an HTML page. Needs no torch."""

from stable_rlhf.report.html import write_report
from stable_rlhf.report.run import read_run
from stable_rlhf.report.summary import closing_line, print_summary
from stable_rlhf.report.watch import watch

__all__ = [
    "closing_line",
    "print_summary",
    "read_run",
    "watch",
    "write_report",
]
