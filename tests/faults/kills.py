"""kill -9 at any moment of a run, and what `resume` makes of what is left."""

from __future__ import annotations

import random
import signal
import tempfile
import time
from functools import partial
from pathlib import Path

from stable_rlhf.errors import Exit
from tests.faults import children, injections
from tests.faults.checkpoints import MEMORY
from tests.faults.counts import Counts
from tests.faults.training import LOSSES, Tiny, assert_finite, assert_same, result

VARIANTS = {
    "full, rolled back": ((), (partial(injections.nan, "log-prob", (3,)),)),
    "adapter": (("--model.lora_r", "2"), ()),
    "adapter, rolled back": (("--model.lora_r", "2"), (partial(injections.nan, "value head", (3,)),)),
    "full": ((), ()),
}
"""Settings, and what is made to go wrong in the run itself: name -> (arguments, injections)."""
EARLY = 30
"""Operations on files by which a resume has done more than it does before its first step."""


def kill_runs(count: int, seed: int) -> Counts:
    """Runs of each variant in turn, killed and resumed, against one that was left alone.

    Of three kills one is at a random time, one at a random operation on the run's files, and one at an operation on a
    checkpoint or a snapshot that is being written. Every third resume is killed as well, soon, and made again.
    """
    chance, survived, lost, inside = random.Random(seed), 0, [], 0
    with tempfile.TemporaryDirectory(dir=MEMORY) as made:
        tiny = Tiny.make(Path(made))
        tiny.run(["--help"])  # the server of children is there: how long a run takes is measured below
        variants = [_Variant(tiny, i, *given) for i, given in enumerate(list(VARIANTS.values())[: max(1, count // 3)])]
        for number in range(count):
            variant = variants[number % len(variants)]
            run, how = tiny.folder / f"killed-{number}", "not killed"
            try:
                how = variant.kill(run, chance, kind=number // len(variants) % 3)
                inside += any(run.glob("*/.writing-*"))
                if chance.random() < 1 / 3:
                    operation = chance.randrange(1, EARLY)
                    how += f", and at operation {operation} of its resume"
                    tiny.run(["resume", str(run)], *variant.wrong, partial(injections.kill_at, operation, run))
                resumed = variant.resumed(run)
                assert_same(resumed, variant.expected)
                assert_finite(resumed)
                survived += 1
            except LOSSES as error:
                lost.append(f"{list(VARIANTS)[number % len(variants)]}: {how}: {error!r}")
    return Counts(count, survived, tuple(lost), f"{inside} while a checkpoint or a snapshot was being written")


class _Variant:
    def __init__(self, tiny: Tiny, number: int, arguments: tuple[str, ...], wrong: tuple) -> None:
        self.tiny, self.arguments, self.wrong = tiny, arguments, wrong
        log, whole = tiny.folder / f"operations-{number}", f"whole-{number}"
        record = partial(injections.record_operations, tiny.folder / whole, log)
        began = time.monotonic()
        self.expected = result(tiny.train(whole, *arguments, prepare=(*wrong, record)))
        took = time.monotonic() - began
        if wrong:
            assert b'"roll back"' in self.expected["incidents.jsonl"]
        lines = [line.split(maxsplit=1) for line in log.read_text().splitlines()]
        self.first, self.last = float(lines[0][0]), took  # from the first trace of the run to the process's end
        self.operations = range(1, len(lines) + 1)
        self.writing = [i for i, (_, path) in enumerate(lines, start=1) if ".writing-" in path]

    def kill(self, run: Path, chance: random.Random, kind: int) -> str:
        """Until one is hit: a run may end before the moment that was chosen. Says how it was killed."""
        for attempt in range(10):
            began, output, name = time.monotonic(), self.tiny.folder / "said.txt", run.name
            if attempt:
                run.rename(run.with_name(f"{name}-missed-{attempt}"))
            if kind == 0:
                after = chance.uniform(self.first, self.last)
                how = f"killed after {after:.3f} s"
                child = children.start(self.tiny.arguments(name, *self.arguments), output, *self.wrong)
                time.sleep(after)
                child.process.kill()
            else:
                operation = chance.choice(self.operations if kind == 1 else self.writing)
                how = f"killed at operation {operation} of {len(self.operations)}"
                fault = partial(injections.kill_at, operation, run)
                child = children.start(self.tiny.arguments(name, *self.arguments), output, *self.wrong, fault)
            code = child.end()
            run.mkdir(exist_ok=True)  # it may not have come as far
            if code == -signal.SIGKILL:
                return how
            assert code == Exit.DONE, child.said
            self.last = min(self.last, time.monotonic() - began)  # the machine was busier when it was measured
        raise AssertionError("the run ended before each of ten kills")

    def resumed(self, run: Path) -> Path:
        """The folder of the run after `resume`; where that says that there is no checkpoint yet, of one begun anew."""
        code, said = self.tiny.run(["resume", str(run)], *self.wrong)
        if code == Exit.BAD_INPUT and ("no checkpoint to resume from" in said or "it has no config.yaml" in said):
            assert not any(run.glob("checkpoints/step-*")), said
            return self.tiny.train(f"{run.name}-anew", *self.arguments, prepare=self.wrong)
        assert code == Exit.DONE, said
        return run


FAULTS = {"runs killed at random": kill_runs}
