"""Scoring: reward functions and reward models, and what becomes of their answers.

A reward function is ``f(prompts, completions, **columns) -> list[float | None]``, plain or async, called with keyword
arguments. `columns` are the other columns of the data set, one value a sample. None means "I cannot score this sample".
For a text prompt the completion is a text; for a chat prompt it is ``[{"role": "assistant", "content": ...}]``, as in
TRL. Nothing here replaces a score that is missing or wrong: it is reported, or it is an error.
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import inspect
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from stable_rlhf.answers import (
    RewardError,
    RewardUnavailable,
    Text,
    checked,
    failures_named,
    plain_text,
    shown,
)
from stable_rlhf.attention import kernel
from stable_rlhf.processor import exact_products
from stable_rlhf.waiting import waited_for

__all__ = ["RewardError", "RewardFunction", "RewardModel", "RewardUnavailable", "Scorer", "Scores", "resolve_reward"]

_BUILTIN_MODEL = Path(__file__).parent / "assets" / "reward_model"
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
# Tokenizers without a limit say 10^30; no model here reads a million tokens.
_NO_LENGTH_LIMIT = 1_000_000


@dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A reward function with the name under which errors and metrics (rewards/<name>/mean) speak of it."""

    name: str
    function: Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The scores of a batch, in its order and in the reward functions' own units.

    total: sum_i weight_i * score_i, minus missing_eos_penalty where the completion did not end; 0.0 where not valid.
    valid: False where at least one reward function answered None: the sample has no score and must not be learnt from.
    per_function: the answers of each reward function by its name, unweighted, None where it gave none.
    """

    total: list[float]
    valid: list[bool]
    per_function: dict[str, list[float | None]]


class Scorer:
    """Calls every reward function on a batch and adds the answers up.

    weights: one finite factor a function, all 1.0 by default.
    missing_eos_penalty: subtracted from the total of every completion without its end token, in reward units, >= 0;
        None for none. It keeps a policy from learning never to stop.
    """

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        missing_eos_penalty: float | None = None,
    ) -> None:
        if not functions:
            raise RewardError("there is no reward function. Name at least one.")
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions) or not all(math.isfinite(weight) for weight in weights):
            raise RewardError(f"reward.weights must be {len(functions)} finite numbers, one a reward; got {weights}.")
        if missing_eos_penalty is not None and not 0 <= missing_eos_penalty < math.inf:
            raise RewardError(f"reward.missing_eos_penalty must be finite and at least 0, got {missing_eos_penalty}.")
        self.functions = _with_unique_names(functions)
        self._weights = weights
        self._penalty = missing_eos_penalty or 0.0

    @property
    def names(self) -> list[str]:
        """The names of the reward functions, unique, in the order of the weights."""
        return [function.name for function in self.functions]

    def score(
        self, prompts: Sequence[Text], completions: Sequence[str], columns: dict[str, list[Any]], ended: Sequence[bool]
    ) -> Scores:
        """Score `completions[i]` as the answer to `prompts[i]`.

        columns: the data set's other columns, one value a sample. ended[i]: True where completion i has its end token.

        Raises RewardError if a function raises, answers with the wrong count or with something that is neither None nor
        a finite number, or if no sample at all is left with a score; ValueError if the arguments differ in length.
        """
        lengths = {"completions": len(completions), "ended": len(ended)} | {k: len(v) for k, v in columns.items()}
        wrong = {name: length for name, length in lengths.items() if length != len(prompts)}
        if not prompts or wrong:
            raise ValueError(f"{len(prompts)} prompts to score, but {wrong or 'at least 1 is needed'}")
        if taken := {"prompts", "completions"} & set(columns):
            raise RewardError(f"the data set's column {taken.pop()!r} has the name of a reward argument. Rename it.")
        per_function = self.answers(prompts, completions, columns)
        samples = list(zip(*per_function.values(), strict=True))
        valid = [None not in sample for sample in samples]
        if not any(valid):
            unscored = f"none of {len(samples)} samples was scored by every reward ({', '.join(self.names)})"
            raise RewardError(f"{unscored}: nothing to learn from. The first prompt was {shown(prompts[0])}.")
        total = [self._total(sample, end) for sample, end in zip(samples, ended, strict=True)]
        return Scores(total=total, valid=valid, per_function=per_function)

    def answers(
        self, prompts: Sequence[Text], completions: Sequence[str], columns: dict[str, list[Any]]
    ) -> dict[str, list[float | None]]:
        """What each reward function answers, by its name, checked; see `score`, which adds them up."""
        texts = [
            completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        outputs = self._call(prompts, texts, columns)
        named = zip(self.functions, outputs, strict=True)
        return {function.name: checked(function.name, output, prompts) for function, output in named}

    def _total(self, sample: tuple[float | None, ...], ended: bool) -> float:
        known = [score for score in sample if score is not None]
        if len(known) < len(sample):
            return 0.0
        return math.fsum(w * x for w, x in zip(self._weights, known, strict=True)) - (0.0 if ended else self._penalty)

    def _call(self, prompts: Sequence[Text], answers: Sequence[Text], columns: dict[str, list[Any]]) -> list[Any]:
        """The raw answers, in order: plain functions one after the other, then all async ones at the same time."""

        def arguments() -> dict[str, Any]:  # new lists each time: a function may change its own
            return {"prompts": list(prompts), "completions": list(answers)} | {k: list(v) for k, v in columns.items()}

        async def one(function: RewardFunction) -> Any:
            with failures_named(function.name, prompts):
                return await function.function(**arguments())

        async def gather() -> list[Any]:
            # return_exceptions: let the others finish instead of leaving their requests open behind an error
            return await asyncio.gather(*map(one, waiting), return_exceptions=True)

        outputs: dict[str, Any] = {}
        waiting = [function for function in self.functions if _is_async(function.function)]
        for function in self.functions:
            if function not in waiting:
                with failures_named(function.name, prompts):
                    outputs[function.name] = function.function(**arguments())
        if waiting:
            results = waited_for(gather)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            outputs |= zip((function.name for function in waiting), results, strict=True)
        return [outputs[name] for name in self.names]


class RewardModel:
    """A sequence-classification model with one output as a reward function.

    The score of a sample is the model's own output for its text alone: batching and padding change nothing. The text is
    - for a text prompt: prompt + completion, with the special tokens that the tokenizer itself adds;
    - for a chat prompt: the messages and the answer through the tokenizer's chat template, no special token added;
    - for a chat prompt and a tokenizer without template: "\\n\\nHuman: ...\\n\\nAssistant: ..." as in HH-RLHF.
    A text of more than `max_length` tokens is cut on the left, so that the end of the answer is always read.

    Decoder classifiers read the last token that is not `config.pad_token_id`, so batches are padded on the right with
    that id, whatever the tokenizer's is. Where there is none, the tokenizer's pad or end token is written into the
    configuration. If pad is also the end token, end tokens at the end of a text are passed over, alone as in a batch.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "reward model",
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise RewardError(f"{name}: batch_size ({batch_size}) and max_length ({max_length}) must be at least 1.")
        _require_one_label(model.config, name)
        self.name, self.model = name, model.eval()
        self.tokenizer = copy.deepcopy(tokenizer)  # the caller's may be the policy's, whose side must not change
        self.tokenizer.truncation_side = "left"
        self._batch_size = batch_size
        self.max_length = max_length or _length_limit(model.config, tokenizer)
        self._pad = _pad_token_id(model.config, tokenizer, name)

    def encode(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[list[int]]:
        """Token ids of each sample as the model reads it; training on anything else would train another function."""
        encoded = []
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True), start=1):
            text, specials = _sample_text(self.tokenizer, prompt, completion)
            cut = {"truncation": self.max_length is not None, "max_length": self.max_length}
            ids: Any = self.tokenizer(text, add_special_tokens=specials, **cut)["input_ids"]
            if not ids:
                raise RewardError(f"{self.name}: sample {number} has no tokens, so there is nothing to score.")
            encoded.append(list(ids))
        return encoded

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float]:
        """Score every sample; other columns do not matter to a model. Results are in the order of the samples."""
        encoded, device = self.encode(prompts, completions), next(self.model.parameters()).device
        order = sorted(range(len(encoded)), key=lambda index: -len(encoded[index]))  # like lengths share a batch
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), self._batch_size):
            indexes = order[start : start + self._batch_size]
            rows = [encoded[index] for index in indexes]
            longest = len(rows[0])
            input_ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows], device=device)
            mask = torch.tensor([[i < len(row) for i in range(longest)] for row in rows], device=device)  # real tokens
            with exact_products(device), kernel(device, self.model.dtype, longest, longest):
                logits = self.model(input_ids=input_ids, attention_mask=mask.long()).logits
            for index, value in zip(indexes, logits.float().flatten().tolist(), strict=True):
                scores[index] = value
        return scores


def resolve_reward(
    spec: Any,
    *,
    name: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> RewardFunction:
    """Turn what a user names as a reward into a reward function.

    spec: a callable; "package.module:function" (the current directory can be imported from); "builtin", this package's
        reward model; a folder or hub name of a sequence-classification model in safetensors with one output; or such a
        model itself, then with its `tokenizer`.
    tokenizer: for a folder or hub name, instead of its own. device, dtype: where a model from a folder or hub name is
        put, and its weights (its head stays float32). batch_size, max_length (tokens): see RewardModel.
    trust_remote_code: run code that comes with this one model. Off: such a model is refused.

    Raises RewardError if it cannot be had exactly so. A head that is not in the checkpoint is an error.
    """
    settings = {"batch_size": batch_size, "max_length": max_length}
    if isinstance(spec, torch.nn.Module):
        if tokenizer is None:
            raise RewardError(f"the reward model {type(spec).__name__} needs its tokenizer: reward_processing_classes.")
        name = name or Path(getattr(spec.config, "_name_or_path", "")).name or type(spec).__name__
        return RewardFunction(name=name, function=RewardModel(spec, tokenizer, name=name, **settings))
    if callable(spec):
        return RewardFunction(name=name or getattr(spec, "__name__", type(spec).__name__), function=spec)
    if not isinstance(spec, str | os.PathLike) or not os.fspath(spec):
        raise RewardError(f"the reward {spec!r} is neither a callable, a model, a name nor a path.")
    text = os.fspath(spec)
    if _IMPORT_PATH.fullmatch(text) and not Path(text).exists():
        return RewardFunction(name=name or text.rpartition(":")[2], function=_import(text))
    path = str(_BUILTIN_MODEL if text == "builtin" else Path(text).expanduser() if text.startswith("~") else text)
    model, own_tokenizer = _load(path, text, torch.device(device), dtype, trust_remote_code)
    name = name or Path(text).resolve().name
    return RewardFunction(name=name, function=RewardModel(model, tokenizer or own_tokenizer, name=name, **settings))


def _load(path: str, spec: str, device: torch.device, dtype: torch.dtype, trust_remote_code: bool) -> tuple[Any, Any]:
    trust = {"trust_remote_code": trust_remote_code}
    # safetensors only: the older format can run code when it is read
    settings = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True} | trust
    try:
        config = AutoConfig.from_pretrained(path, **trust)
        _require_one_label(config, spec)
        model, info = AutoModelForSequenceClassification.from_pretrained(path, config=config, **settings)
        tokenizer = AutoTokenizer.from_pretrained(path, **trust)
    except (OSError, ValueError) as error:
        kinds = "a sequence-classification model in safetensors (folder or hub name), 'builtin', or 'module:function'"
        raise RewardError(f"the reward model {spec!r} could not be loaded: {error} A reward is {kinds}.") from error
    if missing := sorted(info["missing_keys"]):
        remedy = "Give a trained reward model (scripts/train_reward_model.py makes one)."
        lacks = f"lacks {len(missing)} weights ({', '.join(missing[:3])})"
        raise RewardError(f"the reward model {spec!r} {lacks}: they would be random, and so the reward. {remedy}")
    if isinstance(head := getattr(model, "score", None), torch.nn.Linear) and dtype != torch.float32:
        # bfloat16 has 8 bits: a reward of 3 would be rounded to steps of 1/64, and near answers would tie.
        head.float().register_forward_pre_hook(lambda _module, inputs: (inputs[0].float(),))
    return model.requires_grad_(False).to(device), tokenizer


def _import(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:  # at the end, so that no file beside the user's shadows an installed package
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        value: Any = importlib.import_module(module_name)
    except Exception as error:
        what = f"importing {module_name!r} (from {os.getcwd()} or installed packages) failed"
        raise RewardError(f"reward {path!r}: {what}: {type(error).__name__}: {error}.") from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise RewardError(f"reward {path!r}: {module_name!r} has no {attribute!r}. Check the name after the colon.")
        value = getattr(value, part)
    if not callable(value):
        raise RewardError(f"reward {path!r} is a {type(value).__name__}, which cannot be called. Name a function.")
    return value


def _sample_text(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> tuple[str, bool]:
    """The text of a sample, and whether the tokenizer has still to add its special tokens."""
    if isinstance(prompt, str):
        if not isinstance(completion, str):
            raise RewardError("a text prompt came with a chat completion. Give both as text or both as messages.")
        return prompt + completion, True
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    messages = [*prompt, *answer]
    if tokenizer.chat_template is not None:
        return str(tokenizer.apply_chat_template(messages, tokenize=False)), False
    return plain_text(messages), True


def _require_one_label(config: Any, name: str) -> None:
    if config.num_labels != 1:
        kind = ", ".join(getattr(config, "architectures", None) or [config.model_type])
        remedy = "A language model must first be trained as one (scripts/train_reward_model.py)."
        raise RewardError(f"reward model {name!r} ({kind}) has {config.num_labels} outputs, not num_labels=1. {remedy}")


def _length_limit(config: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or _NO_LENGTH_LIMIT
    limit = min(positions, tokenizer.model_max_length)
    return int(limit) if limit < _NO_LENGTH_LIMIT else None


def _pad_token_id(config: Any, tokenizer: Any, name: str) -> int:
    text_config = config.get_text_config()
    candidates = (text_config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((candidate for candidate in candidates if candidate is not None), None)
    if pad is None:
        raise RewardError(f"{name}: neither model nor tokenizer has a pad or end-of-sequence token. Set pad_token.")
    text_config.pad_token_id = pad
    return pad


def _with_unique_names(functions: Sequence[RewardFunction]) -> list[RewardFunction]:
    unique: dict[str, RewardFunction] = {}
    for function in functions:
        names = (f"{function.name}-{copy}" if copy > 1 else function.name for copy in itertools.count(1))
        name = next(name for name in names if name not in unique)
        unique[name] = RewardFunction(name=name, function=function.function)
    return list(unique.values())


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
