"""The report of one run: crashes, plots, a verdict, tables, an HTML page. Needs no torch."""

from stable_rlhf.report.crashes import moving_average
from stable_rlhf.report.facts import Facts, facts_of
from stable_rlhf.report.html import write_report
from stable_rlhf.report.plots import series
from stable_rlhf.report.run import Headline, Run, headline, read_run
from stable_rlhf.report.summary import print_summary
from stable_rlhf.report.verdict import Tone, verdict
from stable_rlhf.report.watch import watch

__all__ = [
    "Facts",
    "Headline",
    "Run",
    "Tone",
    "facts_of",
    "headline",
    "moving_average",
    "print_summary",
    "read_run",
    "series",
    "verdict",
    "watch",
    "write_report",
]
