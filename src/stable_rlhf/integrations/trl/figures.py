"""What a TRL trainer has measured since a generation began, read from where its log will come from."""

from __future__ import annotations

import importlib.metadata
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from stable_rlhf.errors import ConfigError

OLDEST, NEWEST = (1, 12), (1, 16)
"""Versions of TRL that the tests ran with; those between were not run."""

METRICS = ("reward", "reward_std", "kl", "entropy", "completions/mean_length", "completions/clipped_ratio")
"""TRL's names. `kl` is an estimate: of GRPO k3, mean over tokens, once a micro-batch, of the policy as it then is; of
RLOO k1, mean over the rollout's tokens, of the policy that sampled. `reward_std` divides by n - 1."""

MAY_LACK = ("reward", "reward_std")
"""Metrics that are NaN where no completion could be scored, or only one; of the others NaN is a failure."""


def check_version() -> str:
    """TRL's version. Raises ConfigError, naming what to install, for one that was not tested."""
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError("TRL is not installed: pip install 'stable-rlhf[trl]'") from error
    if not OLDEST <= _numbers(version) <= NEWEST:
        low, high = (".".join(map(str, each)) for each in (OLDEST, NEWEST))
        raise ConfigError(
            f"TRL {version} is not supported: pip install 'trl>={low},<{NEWEST[0]}.{NEWEST[1] + 1}', "
            f"since {low} and {high} are tested"
        )
    return version


def _numbers(version: str) -> tuple[int, ...]:
    first = version.split(".")[:2]
    return tuple(int(part) for part in first if part.isdigit())


def kind_of(trainer: Any) -> str:
    """`grpo` or `rloo`. Raises ConfigError for another trainer, and for one that measures no KL."""
    names = [cls.__name__ for cls in type(trainer).__mro__]
    kind = next((kind for kind, name in (("grpo", "GRPOTrainer"), ("rloo", "RLOOTrainer")) if name in names), None)
    if kind is None:
        raise ConfigError(f"{names[0]} is not supported: give a GRPOTrainer or an RLOOTrainer of TRL")
    lacking = [name for name in ("beta", "_metrics", "_logs", "_step", "num_iterations") if not hasattr(trainer, name)]
    if lacking:
        raise ConfigError(f"{names[0]} has no {lacking[0]}: this version of TRL, {check_version()}, is not supported")
    if trainer.beta == 0.0:
        raise ConfigError(
            "beta=0.0: TRL then loads no reference and measures no KL; give the trainer any other, such as beta=0.04, "
            "which the controller replaces"
        )
    _check_arguments(trainer)
    return kind


def _check_arguments(trainer: Any) -> None:
    args = trainer.args
    if hasattr(trainer, "liger_loss"):
        raise ConfigError("use_liger_kernel=True: its loss keeps the beta that it was made with; set it to False")
    if getattr(args, "sync_ref_model", False):
        raise ConfigError("sync_ref_model=True: a budget needs a reference that stays what it is; set it to False")
    each, whole = args.gradient_accumulation_steps, args.steps_per_generation * args.num_iterations
    if whole % each:
        raise ConfigError(
            f"gradient_accumulation_steps={each}: a generation has {whole} micro-batches (steps_per_generation x "
            "num_iterations), which is no multiple; set steps_per_generation to a multiple of it"
        )


def is_unit(trainer: Any) -> bool:
    """Whether the trainer divides rewards by their deviation before the KL's term is set against them."""
    if kind_of(trainer) == "rloo":
        return False  # it subtracts beta x KL from the rewards as they are
    each_alone = getattr(trainer, "multi_objective_aggregation", "") == "normalize_then_sum"
    return each_alone or trainer.scale_rewards in ("group", "batch", True)


class Figures:
    """Collects a generation's figures. TRL clears its lists whenever it logs, so that they are read at each step."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._lists: dict[str, tuple[list[float], int]] = {}
        self._found: dict[str, list[float]] = {}
        self._distinct: float | None = None

    def collect(self) -> None:
        """Takes what was appended since the last call. A list that is another object has been cleared."""
        metrics = self._trainer._metrics["train"]
        for name in METRICS:
            if name not in metrics:
                continue
            values = metrics[name]
            known, seen = self._lists.get(name, (values, 0))
            start = seen if known is values else 0
            self._found.setdefault(name, []).extend(values[start:])
            self._lists[name] = (values, len(values))
        if self._distinct is None:
            self._distinct = distinct_words([text_of(each) for each in self._trainer._logs["completion"]])

    def take(self) -> dict[str, float | None]:
        """The means of what was collected, by TRL's names, and `distinct_2`; begins anew. None where there was
        nothing."""
        found = {name: _mean(self._found.get(name, []), name in MAY_LACK) for name in METRICS}
        found["distinct_2"] = self._distinct
        self._found, self._distinct = {}, None
        return found


def _mean(values: Sequence[float], may_lack: bool) -> float | None:
    """NaN and infinity stay, for the guard to see. ``may_lack``: NaN is left out unless there is nothing else."""
    known = [value for value in values if not math.isnan(value)] if may_lack else values
    if not known:
        return math.nan if values else None
    return sum(known) / len(known)


def text_of(completion: Any) -> str:
    """A completion's text: of a chat, the contents of its messages."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") for message in completion if isinstance(message, dict)]
    return " ".join(content for content in contents if isinstance(content, str))


def distinct_words(texts: Iterable[str]) -> float | None:
    """distinct-2 over words: different pairs of neighbours / all such pairs, within texts; None without a pair."""
    words = [text.split() for text in texts]
    pairs = [pair for each in words for pair in itertools.pairwise(each)]
    return len(set(pairs)) / len(pairs) if pairs else None
