"""A run that is small enough to be ruined many times, and whether two of them are the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from stable_rlhf.checkpoints import store
from stable_rlhf.errors import CheckpointError, Exit
from stable_rlhf.runs import incidents
from stable_rlhf.runs.metrics import read_rows
from tests.conftest import byte_tokenizer
from tests.faults import children
from tests.tiny_runs import PROMPTS, policy

STEPS = 6
COMPARED = ("metrics.jsonl", "incidents.jsonl", "evaluation.json")

LOSSES = (AssertionError, OSError, ValueError, CheckpointError)
"""What says that something is lost: anything else is an error of the suite itself."""


@dataclass(frozen=True)
class Tiny:
    """The parts of a tiny run, in a folder."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> Tiny:
        disable_progress_bar()
        tokenizer = byte_tokenizer()
        policy(tokenizer).save_pretrained(folder / "policy")
        tokenizer.save_pretrained(folder / "policy")
        for name, prompts in (("prompts", PROMPTS * 2), ("held-out", PROMPTS[:4])):
            lines = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
            (folder / f"{name}.jsonl").write_text("".join(lines))
        return cls(folder)

    def arguments(self, run: str, *more: str) -> list[str]:
        """Of `train`, with checkpoints after steps 2, 4 and 6, the guard's snapshots after 3 and 6, and an evaluation
        before and after."""
        return [
            *("train", "--output_dir", str(self.folder / run), "--model.name", str(self.folder / "policy")),
            *("--data.train", str(self.folder / "prompts.jsonl"), "--data.eval", str(self.folder / "held-out.jsonl")),
            *("--data.eval_size", "4", "--model.device", "cpu"),
            *("--reward.functions", '["tests.faults.injections:reward"]', "--log.progress", "false"),
            *("--rollout.batch_size", "8", "--rollout.max_completion_length", "6", "--optim.learning_rate", "1e-2"),
            *("--max_steps", str(STEPS), "--save_steps", "2", "--guard.snapshot_steps", "3"),
            *("--log.completions_steps", "2", *more),
        ]

    def run(self, arguments: list[str], *prepare: Callable[[], None]) -> tuple[int, str]:
        return children.run(arguments, self.folder / "said.txt", *prepare)

    def train(self, run: str, *more: str, prepare: tuple[Callable[[], None], ...] = ()) -> Path:
        """A run that ends well; its folder."""
        code, said = self.run(self.arguments(run, *more), *prepare)
        assert code == Exit.DONE, said
        return self.folder / run


def result(run: Path) -> dict[str, bytes]:
    """All that has to be the same: rows, incidents, evaluation and final weights, by file."""
    files = [run / name for name in COMPARED if (run / name).exists()]
    final = sorted((run / "final").glob("*.safetensors"))
    assert len(final) == 2, f"{run / 'final'} has {[path.name for path in final]}"
    return {path.name: path.read_bytes() for path in [*files, *final]}


def assert_same(run: Path, expected: dict[str, bytes]) -> None:
    there = result(run)
    assert there.keys() == expected.keys(), sorted(there)
    differ = [name for name, content in expected.items() if there[name] != content]
    assert not differ, f"{', '.join(differ)} of {run.name} are others than those of the uninterrupted run"


def assert_finite(run: Path) -> None:
    """No row, incident or weight that is on the disk has a number that is not finite."""
    assert not read_rows(run / "metrics.jsonl")[1]
    incidents.read(run)
    saved = store.found(run / "checkpoints")
    assert saved
    for file in [*(path / "model.safetensors" for path in saved), *run.glob("final/*.safetensors")]:
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all(), f"{file}: {name}"
    for path in run.glob("timings.jsonl"):
        for row in read_rows(path)[0]:
            assert all(math.isfinite(value) for value in row.values())


def sentence(said: str) -> str:
    """The last line of what a command said, which must not be the end of a traceback."""
    assert "Traceback" not in said, said
    last = said.splitlines()[-1]
    assert last.startswith("stable-rlhf: "), said
    return last.removeprefix("stable-rlhf: ")
