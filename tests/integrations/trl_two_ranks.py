"""Run by torchrun: two ranks of a guarded GRPO trainer; each writes what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from stable_rlhf.integrations.trl import guarded
from tests.integrations.trl_tiny import trainer, vowels


def main(out: Path) -> None:
    betas: list[float] = []

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        betas.append(made.beta)
        return vowels(prompts, completions)

    made = trainer(out, steps=4, reward=reward, learning_rate=1e-2, ddp_backend="gloo")
    guarded(made, 0.02)
    made.train()
    total = sum(float(weight.double().sum()) for weight in made.model.parameters())
    (out / f"rank-{made.accelerator.process_index}.json").write_text(json.dumps({"betas": betas, "weights": total}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
