"""Tests wheel and sdist as a user gets them: each is installed into an empty environment and trains one step there.

    python scripts/test_distributions.py dist     # the files of a folder
    python scripts/test_distributions.py          # builds them first (make dist-test)

Takes the pinned versions of constraints.txt; minutes, most of them for torch. Standard library only.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEP = "train --max_steps 1 --data.eval_size 0 --rollout.batch_size 4 --rollout.max_completion_length 4"
TRIES = [
    ["--version"],
    ["train", "--help"],
    [*STEP.split(), "--log.progress", "false", "--model.device", "cpu", "--output_dir", "run"],
    ["report", "run"],
    ["train", "recipe:no-such"],
]
"""The commands that are tried, in an empty folder. The last has to fail with the sentence that lists the recipes."""


def run(command: list[str | Path], folder: Path, code: int = 0) -> str:
    """Output and errors of a command that has to end with this exit code."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != code:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout + done.stderr


def environment(folder: Path) -> Path:
    """An empty environment; returns its bin folder."""
    venv.create(folder, with_pip=True)
    return folder / "bin"


def built(folder: Path) -> list[Path]:
    """Wheel and sdist of this checkout."""
    bin_folder = environment(folder / "build-env")
    run([bin_folder / "pip", "install", "--quiet", "build"], folder)
    run([bin_folder / "python", "-m", "build", "--outdir", folder / "dist", ROOT], folder)
    return sorted((folder / "dist").iterdir())


def tried(file: Path, folder: Path) -> None:
    """Installs a file and runs the commands."""
    kind = "sdist" if file.name.endswith(".tar.gz") else "wheel"
    bin_folder, work = environment(folder / kind), folder / f"{kind}-work"
    work.mkdir()
    constraints = ["--constraint", ROOT / "constraints.txt"]
    run([bin_folder / "pip", "install", "--quiet", *constraints, file.resolve()], work)
    said = ""
    for arguments in TRIES:
        said = run([bin_folder / "stable-rlhf", *arguments], work, code=2 if arguments == TRIES[-1] else 0)
    missing = [
        name
        for name in ("metrics.jsonl", "final/model.safetensors", "report.html")
        if not (work / "run" / name).is_file()
    ]
    if missing or "ppo-adaptive" not in said:
        sys.exit(f"{file.name}: the run lacks {missing}, or the recipes are not there: {said}")
    print(f"{file.name}: installed, trained a step and wrote its report")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = sorted(Path(sys.argv[1]).iterdir()) if len(sys.argv) > 1 else built(folder)
        for file in files:
            tried(file, folder)


if __name__ == "__main__":
    main()
