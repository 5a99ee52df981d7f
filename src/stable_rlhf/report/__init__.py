"""The report of one run: crashes, plots, a verdict, tables, an HTML page. Needs no torch.

The parts of a page that a comparison of runs shares are here too.
"""

from stable_rlhf.report.chart import SIZE, Axis, Series, band, dots, path, step_axis, value_axis
from stable_rlhf.report.crashes import moving_average
from stable_rlhf.report.facts import Facts, facts_of
from stable_rlhf.report.figures import COLOURS
from stable_rlhf.report.html import write_report
from stable_rlhf.report.page import page_of, shown, write_page
from stable_rlhf.report.plots import figure, series, ticks_across, ticks_up
from stable_rlhf.report.run import Headline, Run, headline, read_run
from stable_rlhf.report.summary import closing_line, print_summary
from stable_rlhf.report.verdict import Tone, verdict
from stable_rlhf.report.watch import watch

__all__ = [
    "COLOURS",
    "SIZE",
    "Axis",
    "Facts",
    "Headline",
    "Run",
    "Series",
    "Tone",
    "band",
    "closing_line",
    "dots",
    "facts_of",
    "figure",
    "headline",
    "moving_average",
    "page_of",
    "path",
    "print_summary",
    "read_run",
    "series",
    "shown",
    "step_axis",
    "ticks_across",
    "ticks_up",
    "value_axis",
    "verdict",
    "watch",
    "write_page",
    "write_report",
]
