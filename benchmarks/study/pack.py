"""Packs the figures of a study's runs: small enough to keep, and still runs that `stable-rlhf compare` reads.

    python benchmarks/study/pack.py runs/study/S S.tar.xz

Of metrics.jsonl and timings.jsonl the named figures are kept, to four significant digits: what is beyond that does not
compress and nobody reads it. Checkpoints, models, completions and logs are left out.
"""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path
from typing import Any

from stable_rlhf.runs import sweeps

FIGURES = (
    *("step", "episode", "objective/scores", "objective/scores_std", "objective/kl", "objective/kl_exact"),
    "objective/kl_error",
    *("objective/kl_per_sequence", "objective/entropy", "objective/ref_nll", "completions/mean_length"),
    *("completions/distinct_2", "completions/skipped", "val/explained_variance", "policy/skipped_steps"),
    *("safe/kl_coef", "safe/threshold", "safe/gate", "safe/moved_kl", "safe/update_kl", "safe/step_scale"),
    *("safe/rollbacks", "reward/disagreement", "total_s"),
)
WHOLE = ("config.yaml", "incidents.jsonl", "starts.jsonl")
SAMPLES = ("samples", "completions")
DIGITS = 4


def pack(sweep: Path, file: Path) -> int:
    """Writes the archive, whose folder has the sweep's name; returns the number of runs in it. A run that was stopped
    is left out: it goes on with the sweep."""
    runs = 0
    ended = {end["cell"]: end["exit_code"] for end in sweeps.read_outcomes(sweep)}
    with tarfile.open(file, "w:xz", preset=6) as archive:
        for name in (sweeps.ASKED, sweeps.OUTCOMES):
            if (sweep / name).is_file():
                _add(archive, f"{sweep.name}/{name}", (sweep / name).read_bytes())
        for run in sorted((sweep / sweeps.CELLS).glob("*")):
            if ended.get(run.name) in (None, *sweeps.STOPPED) or not (run / "metrics.jsonl").is_file():
                continue
            runs += 1
            place = f"{sweep.name}/{sweeps.CELLS}/{run.name}"
            for name in ("metrics.jsonl", "timings.jsonl"):
                if (run / name).is_file():
                    _add(archive, f"{place}/{name}", small_rows((run / name).read_text(encoding="utf-8")).encode())
            if (run / "evaluation.json").is_file():
                found = without_samples(json.loads((run / "evaluation.json").read_text(encoding="utf-8")))
                _add(archive, f"{place}/evaluation.json", json.dumps(rounded(found)).encode())
            for name in WHOLE:
                if (run / name).is_file():
                    _add(archive, f"{place}/{name}", (run / name).read_bytes())
    return runs


def small_rows(text: str) -> str:
    """JSON lines with the figures FIGURES only. A last line that was cut off is left out."""
    rows = [json.loads(line) for line in text.split("\n")[:-1] if line]
    return "".join(
        json.dumps({name: rounded(row[name]) for name in FIGURES if name in row}, separators=(",", ":")) + "\n"
        for row in rows
    )


def rounded(value: Any) -> Any:
    """Floats to DIGITS significant digits, inside lists and objects too."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def without_samples(value: Any) -> Any:
    """An evaluation with empty lists in place of its completions."""
    if isinstance(value, dict):
        return {name: [] if name in SAMPLES else without_samples(inner) for name, inner in value.items()}
    return [without_samples(inner) for inner in value] if isinstance(value, list) else value


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    print(f"{pack(Path(sys.argv[1]), Path(sys.argv[2]))} runs")
