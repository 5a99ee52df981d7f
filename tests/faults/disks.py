"""A disk that is full, or files that may be only so long, while a run writes checkpoints and rows."""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from stable_rlhf.checkpoints.store import newest, steps_of
from stable_rlhf.errors import Exit
from tests.faults import injections
from tests.faults.checkpoints import MEMORY, small_disk
from tests.faults.counts import Counts
from tests.faults.training import LOSSES, Tiny, assert_finite, assert_same, result

STEPS = 8
LONG = ("--max_steps", str(STEPS), "--save_steps", "4")
"""Four rows between two checkpoints: more than a page, so that on a full disk they have no room."""
FULL_AT = 4
"""The step, after the first checkpoint, from which on there is no room."""
DISK = 8 << 20
"""Bytes of the small disk: twice what the run needs."""


def full_disks(count: int, seed: int) -> Counts:
    """A small disk with `count` amounts of room left. Raises PermissionError where none may be mounted."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as made, small_disk(DISK) as disk:
        tiny = Tiny.make(Path(made))

        def make_room() -> None:
            (disk / "ballast").unlink(missing_ok=True)

        whole = tiny.train("whole", *LONG)
        length = sum(file.stat().st_size for file in newest(whole / "checkpoints")[0].iterdir())
        chance = random.Random(seed)
        rooms = [0, *(chance.randrange(length) for _ in range(count - 1))]
        faults = {f"room for {room} bytes": partial(injections.full_disk, FULL_AT, disk, room) for room in rooms}
        return _without_room(tiny, disk, whole, faults, make_room)


def short_files(count: int, seed: int) -> Counts:
    """RLIMIT_FSIZE: no row more in metrics.jsonl, then lengths up to that of the longest file of a checkpoint."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        tiny = Tiny.make(Path(made))
        whole, chance = tiny.train("whole", *LONG), random.Random(seed)
        longest = max(file.stat().st_size for file in newest(whole / "checkpoints")[0].iterdir())
        rows = (whole / "metrics.jsonl").stat().st_size
        faults = {}
        for number in range(count):
            limit = chance.randrange(rows, longest) if number else tiny.folder / "run-0" / "metrics.jsonl"
            faults[f"files of {limit} bytes"] = partial(injections.short_files, FULL_AT, limit)
        return _without_room(tiny, tiny.folder, whole, faults, lambda: None)


def _without_room(
    tiny: Tiny, disk: Path, whole: Path, faults: dict[str, Callable[[], None]], make_room: Callable[[], None]
) -> Counts:
    survived, lost, rows, expected = 0, [], 0, result(whole)
    for number, (what, fault) in enumerate(faults.items()):
        run = disk / f"run-{number}"
        try:
            code, said = tiny.run([*tiny.arguments(run.name, *LONG), "--output_dir", str(run)], fault)
            assert code == Exit.DISK, said
            assert "Traceback" not in said, said
            (sentence,) = [
                line for line in said.splitlines() if "could not be written" in line and "report" not in line
            ]
            assert " bytes" in sentence, sentence
            assert "need" in sentence, sentence
            assert " free" in sentence, sentence
            rows += f"{run} could not be written to" in sentence
            saved, damaged = newest(run / "checkpoints")
            assert (steps_of(saved), damaged) == (FULL_AT, [])
            make_room()
            code, said = tiny.run(["resume", str(run)])
            assert code == Exit.DONE, said
            assert_same(run, expected)
            assert_finite(run)
            survived += 1
        except LOSSES as error:
            lost.append(f"{what}: {error!r}")
            make_room()
        shutil.rmtree(run, ignore_errors=True)  # the disk is small
    return Counts(len(faults), survived, tuple(lost), f"{rows} while rows were written, the others checkpoints")


FAULTS: dict[str, Callable[[int, int], Counts]] = {
    "a run on a full disk": full_disks,
    "a run whose files may not be so long": short_files,
}
