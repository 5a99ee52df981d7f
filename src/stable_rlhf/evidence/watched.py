"""Watches the log of any run: the guard judges its rows, afterwards or while they are written.

A log cannot be rolled back, so the guard stops where it would roll back; what comes after a stop is not judged.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stable_rlhf.control import Action, Guard, GuardConfig, observed_kl, standard_error
from stable_rlhf.errors import NoRunError, RunError
from stable_rlhf.evidence import trl
from stable_rlhf.evidence.mapping import MetricMapping
from stable_rlhf.evidence.outcome import flat
from stable_rlhf.evidence.peers import Log, is_foreign, is_table, read_log
from stable_rlhf.evidence.watch_folder import WatchFolder
from stable_rlhf.report import read_run
from stable_rlhf.runs import incidents, is_metric
from stable_rlhf.text import counted

PATIENCE = 30.0
"""Seconds that a log may be unreadable while it is followed, since it may be being written; and after which a last line
without its newline counts as complete."""

TO_DO = "the run should be stopped"

Incident = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which log is watched, and by what it is judged."""

    log: Path
    guard: GuardConfig
    mapping: MetricMapping | None = None
    """Of a CSV or JSON-lines file."""
    completions: int | None = None
    """Completions of each step. None: as the log says, if it does."""
    budget: float | None = None
    """KL budget, nats per token, of which the KL's ceiling is a multiple. None: as the log says, if it does."""
    planned: int | None = None
    """Steps of the run. None: as the log says, if it does."""


class Watched:
    """A log that is judged, and the verdicts so far. ``folder``: where rows and incidents are written, if anywhere."""

    def __init__(self, asked: Asked, folder: WatchFolder | None = None) -> None:
        self.asked, self._folder = replace(asked, guard=replace(asked.guard, max_rollbacks=0)), folder
        self.log: Log | None = None
        """As it was read last."""
        self.rows: list[dict[str, Any]] = []
        """The rows that were judged, up to the one at which the run should be stopped."""
        self.incidents: list[Incident] = []
        self._guard = Guard(self.asked.guard)

    @property
    def stopped(self) -> Incident | None:
        """The incident at which the run should be stopped."""
        last = self.incidents[-1] if self.incidents else None
        return last if last is not None and last["action"] == Action.STOP else None

    @property
    def planned(self) -> int | None:
        """Steps that the run is to have, where they are known."""
        return self.asked.planned or (None if self.log is None else self.log.planned)

    @property
    def finished(self) -> bool:
        """Whether the run has done all its steps."""
        return self.log is not None and self.planned is not None and self.log.done >= self.planned

    def look(self, *, live: bool = False, growing: bool = False) -> bool:
        """Reads the log and judges its new rows. Returns whether it was begun anew, since rows that had been judged are
        no longer there.

        live: whether more rows may come, so that only those are judged that these cannot change.
        growing: as in `read_log`.
        Raises as `read_any` does.
        """
        self.log = log = read_any(self.asked, growing=growing)
        rows = [self._made(row) for row in (log.rows[: log.settled] if live and not self.finished else log.rows)]
        anew = rows[: len(self.rows)] != self.rows
        if anew:
            self.rows, self.incidents, self._guard = [], [], Guard(self.asked.guard)
        if self._folder is not None and not self.rows:
            self._folder.begin(self._config(log))
        times = {row["step"]: row for row in log.timings} if self._folder is not None else {}
        for row in rows[len(self.rows) :]:
            if self.stopped is not None:
                break
            self._judge(row, times.get(row["step"], {}))
        return anew

    def _made(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with what was asked in it, and without what is no metric (of a newer version, or of a stranger)."""
        made = {name: value for name, value in row.items() if is_metric(name)}
        if self.asked.completions is not None:
            made["episode"] = self.asked.completions * (row["step"] + 1)
        if self.asked.budget is not None:
            made["safe/threshold"] = self.asked.budget
        return made

    def _judge(self, row: dict[str, Any], timing: dict[str, Any]) -> None:
        numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
        verdict = self._guard.judge({**numbers, "rows": completions(row)})
        self.rows.append(row)
        if self._folder is not None:
            self._folder.add(row, timing)
        if verdict.action is Action.GO_ON:
            return
        done = TO_DO if verdict.action is Action.STOP else "the run goes on"
        self.incidents.append(incidents.of_verdict(row["step"], verdict, verdict.action, done, numbers))
        if self._folder is not None:
            self._folder.add_incident(self.incidents[-1])

    def _config(self, log: Log) -> dict[str, Any]:
        asked = self.asked
        known = {"budget": asked.budget, "completions": asked.completions}
        own = {
            name: value for name, value in log.settings.items() if name.partition(".")[0] not in ("guard", "watched")
        }
        return {
            **own,
            **({} if self.planned is None else {"max_steps": self.planned}),
            "guard": asdict(asked.guard),
            "watched": {"log": str(asked.log), **{name: value for name, value in known.items() if value is not None}},
        }


def completions(row: dict[str, Any]) -> float | None:
    """Completions of the row's step that have a reward, where their number is known."""
    episode, skipped = row.get("episode"), row.get("completions/skipped") or 0
    return None if episode is None else episode / (row["step"] + 1) - skipped


# -- reading --------------------------------------------------------------------------------------------------------


def read_any(asked: Asked, *, growing: bool = False) -> Log:
    """The log of any run: another trainer's, or the folder of one of ours. Figures that are not finite are in it.

    Raises NoRunError where there is no row yet, RunError with file and line for what cannot be read.
    """
    path = asked.log
    if is_foreign(path):
        return read_log(path, asked.mapping, finite=False, growing=growing)
    if os.path.isdir(path):
        if os.path.lexists(path / "metrics.jsonl"):
            return _own(path)
        kinds = f"neither metrics.jsonl nor {trl.STATE}, itself or in checkpoint-N"
        raise NoRunError(f"{path}: the folder has {kinds}; give the folder of a run, or the log itself")
    if os.path.lexists(path):
        raise RunError(f"{path}: is no log that can be read; give a {trl.STATE}, a .csv, .tsv, .jsonl or .ndjson file")
    raise NoRunError(f"{path} does not exist; check the path, or wait for it with --follow")


def takes_mapping(path: Path) -> bool:
    """Whether a mapping has an effect on the log of this name."""
    return is_table(path)


def _own(path: Path) -> Log:
    run = read_run(path, completions=False)
    planned = run.config.get("max_steps")
    return Log(
        rows=list(run.rows),
        timings=list(run.timings),
        settings=flat(run.config),
        planned=planned if isinstance(planned, int) and not isinstance(planned, bool) else None,
        done=run.steps,
        settled=len(run.rows),
    )


def _version(path: Path) -> tuple[Any, ...] | None:
    """Changes with the file that is read. None where there is none."""
    own = path / "metrics.jsonl"
    file = own if os.path.lexists(own) else trl.state_file(path) or path
    try:
        found = os.stat(file)
    except OSError:
        return None
    return str(file), found.st_ino, found.st_size, found.st_mtime_ns


# -- following ------------------------------------------------------------------------------------------------------


def follow(
    watched: Watched,
    say: Callable[[str], None],
    *,
    every: float,
    stopped: threading.Event,
    patience: float = PATIENCE,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Judges a log while it is written, until the run should be stopped, has done its steps, or ``stopped`` is set.

    Looks every ``every`` seconds and says what it finds. A log that is not there yet is waited for. Raises RunError for
    one that cannot be read for ``patience`` seconds.
    """
    path, version, changed, rested = watched.asked.log, None, clock(), False
    failing: float | None = None
    waits = begun = False
    while not stopped.is_set():
        now = clock()
        if (newest := _version(path)) != version:
            version, changed, rested, fresh = newest, now, False, True
        else:
            fresh = failing is not None or version is None
        if not rested and now - changed >= patience:
            rested = fresh = True
        if fresh:
            found = len(watched.incidents)
            try:
                if watched.look(live=True, growing=not rested):
                    say("the log was replaced or cut, so it is judged again from its beginning")
                    found = 0
                failing = None
            except NoRunError as error:
                if not waits:
                    say(f"waiting for the first row ({error})")
                waits, failing = True, None
            except RunError as error:
                if failing is None:
                    failing = now
                    say(f"cannot be read, which is tried again for {patience:g} s: {error}")
                if now - failing >= patience:
                    raise
            if watched.rows and not begun:
                begun = True
                for sentence in about(watched, live=True):
                    say(sentence)
            for incident in watched.incidents[found:]:
                say(incidents.sentence(incident))
            if watched.stopped is not None or (watched.finished and failing is None):
                return
        stopped.wait(every)


# -- what is said ---------------------------------------------------------------------------------------------------

_FIGURES = {
    "min_entropy": ("entropy", "objective/entropy"),
    "max_entropy": ("entropy", "objective/entropy"),
    "min_distinct": ("variety", "completions/distinct_2"),
    "min_length": ("length", "completions/mean_length"),
    "max_drawdown": ("reward", "objective/scores"),
    "min_explained_variance": ("critic", "val/explained_variance"),
}
"""Rules that need a figure: its word and its metric. The KL's has two."""


def about(watched: Watched, *, live: bool = False) -> list[str]:
    """Sentences on how the log is read, and on what the guard cannot judge in it."""
    guard, rows, log = watched.asked.guard, watched.rows, watched.log
    said = [] if log is None else list(log.notes)
    if len(rows) > 1 and (gap := rows[1]["step"] - rows[0]["step"]) > 1:
        said.append(f"There is a row every {gap} steps; a rule's steps in a row are rows.")
    threshold = _has(rows, "safe/threshold")
    ceiling = guard.max_kl_ratio if threshold else guard.max_kl
    if not threshold and guard.max_kl_ratio != GuardConfig.max_kl_ratio:
        said.append("guard.max_kl_ratio has no effect, since the log has no threshold: give --budget B.")
    lacking = {} if ceiling is None or any(observed_kl(row) is not None for row in rows) else {"KL": "objective/kl"}
    for rule, (word, metric) in _FIGURES.items():
        if getattr(guard, rule) is not None and not _has(rows, metric):
            lacking[word] = metric
    if lacking:
        said.append(
            f"Not judged, since the log does not have it: {', '.join(f'{k} ({v})' for k, v in lacking.items())}."
        )
    if guard.max_drawdown is not None and "reward" not in lacking and (why := _no_error(watched)) is not None:
        said.append(f"A fall of the reward is not judged: {why}.")
    if live and watched.planned is None:
        said.append(
            "How many steps are planned is not known, so watching has no end of its own (--max_steps gives one)."
        )
    return said


def closing(watched: Watched) -> str:
    """The verdict on the log so far, in a sentence."""
    name, planned = watched.asked.log, watched.planned
    stop = watched.stopped
    if stop is not None:
        rest = 0 if watched.log is None else sum(row["step"] > stop["step"] for row in watched.log.rows)
        after = f"; {counted(rest, 'later row')} not judged" if rest else ""
        return f"{name}: the guard stops the run at step {stop['step']} (rule {stop['rule']}){after}"
    steps = watched.rows[-1]["step"] + 1 if watched.rows else 0
    done = counted(steps, "step") if planned is None else f"{steps} of {counted(planned, 'step')}"
    if watched.incidents:
        return f"{name}: {counted(len(watched.incidents), 'incident')}, but no reason to stop the run, in {done}"
    return f"{name}: nothing found in {done}"


def _no_error(watched: Watched) -> str | None:
    """Why the error of the mean reward is not known; None where it is."""
    if not _has(watched.rows, "objective/scores_std"):
        return "the log has no objective/scores_std, from which its error comes"
    counts = [count for row in watched.rows if (count := completions(row)) is not None]
    if not counts:
        beside = "" if takes_mapping(watched.asked.log) else f", or rollout.batch_size in {trl.SETTINGS}"
        return f"the number of completions of a step is not known (give --completions N{beside})"
    if all(standard_error(1.0, count) is None for count in counts):
        return f"{max(counts):g} completions a step do not show its error"
    return None


def _has(rows: Sequence[dict[str, Any]], metric: str) -> bool:
    return any(row.get(metric) is not None for row in rows)
