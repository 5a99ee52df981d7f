"""Requests to a reward server and its answers: JSON over HTTP, as OpenRLHF's trainer has it (docs/rewards.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from stable_rlhf.data import Message, Text, plain_text
from stable_rlhf.errors import RewardError
from stable_rlhf.rewards.checks import shown

MAX_ANSWER_BYTES = 8 * 2**20
"""Longest answer: a score takes 25 bytes, or three times that where `scores` and `extra_logs` repeat it, so this
holds a thousand times the usual batch."""

MAX_ERROR_BYTES = 4096
"""Bytes of a refusal that are read, more than are shown."""

AGAIN = frozenset({408, 425, 429})
"""Statuses below 500 that say "not now": time-out, too early, too many requests."""


class RequestFailure(Exception):
    """A request that gave no scores. again: whether a retry may help. after: seconds that the server asked to wait."""

    def __init__(self, what: str, *, again: bool, after: float = 0.0, status: int | None = None) -> None:
        super().__init__(what)
        self.again, self.after, self.status = again, after, status


def request_body(prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, list[Any]]) -> bytes:
    """The request: `query` and `prompts` as texts, `messages` where prompts are chats, and the chosen columns."""
    chats = [_messages(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
    heads = [p if isinstance(p, str) else f"{plain_text(p)}\n\nAssistant:" for p in prompts]
    query = [
        head + str(completion) if chat is None else plain_text(chat)
        for head, completion, chat in zip(heads, completions, chats, strict=True)
    ]
    fields: dict[str, Any] = {"query": query, "prompts": heads}
    if any(chats):
        fields["messages"] = chats
    for name, values in columns.items():
        try:
            json.dumps(values, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise RewardError(
                f"reward.columns names {name!r}, which JSON cannot hold ({error}); leave it out, or make it text."
            ) from error
        fields[name] = values
    return json.dumps(fields).encode("ascii")  # ASCII: lone surrogates go as escapes, which are always valid


def _messages(prompt: Text, completion: Text) -> list[Message] | None:
    """The whole chat of a sample, None for a text prompt."""
    if isinstance(prompt, str):
        return None
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return [*prompt, *answer]


async def answer_content(response: httpx2.Response) -> bytes:
    """The answer's bytes. Raises RequestFailure for a status that is not a success and for an answer too long."""
    status, limit = response.status_code, MAX_ANSWER_BYTES if response.is_success else MAX_ERROR_BYTES
    if encoding := response.headers.get("Content-Encoding", "").replace("identity", ""):
        raise RequestFailure(f"it answered in the encoding {shown(encoding)}, though none was asked for", again=False)
    content = bytearray()
    async for piece in response.aiter_raw():
        content += piece
        if len(content) > limit:
            break
    if response.is_success:
        if len(content) > limit:
            raise RequestFailure(f"its answer has more than {limit} bytes", again=False, status=status)
        return bytes(content)
    if response.is_redirect:
        where = shown(response.headers.get("Location", ""))
        raise RequestFailure(f"HTTP {status}: it redirects to {where}; give that URL", again=False, status=status)
    what = f"HTTP {status}: {shown(content[:limit].decode('utf-8', 'replace').strip())}"
    after = _seconds_to_wait(response.headers.get("Retry-After"))
    raise RequestFailure(what, again=status in AGAIN or status >= 500, after=after, status=status)


def _seconds_to_wait(header: str | None) -> float:
    """Retry-After: seconds, or a date; 0 without one or for one that is neither."""
    if header is None:
        return 0.0
    if header.strip().isascii() and header.strip().isdigit():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, OverflowError):
        return 0.0
    now = datetime.now(UTC) if date.tzinfo else datetime.now(UTC).replace(tzinfo=None)
    return max(0.0, (date - now).total_seconds())


def rewards_in(content: bytes, first: int, count: int) -> list[float | None]:
    """The answer's `rewards`. An answer without them may be that of a proxy, and the request is retried."""
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        begins = shown(content[:200].decode("utf-8", "replace"))
        raise RequestFailure(f"its answer is not JSON and begins with {begins}", again=True, status=200) from error
    rewards = answer.get("rewards") if isinstance(answer, dict) else None
    if not isinstance(rewards, list):
        raise RequestFailure(f"its answer has no list 'rewards', but is {shown(answer)}", again=True, status=200)
    if len(rewards) != count:
        raise RequestFailure(f"it gave {len(rewards)} rewards for {count} samples", again=True, status=200)
    return [_reward(value, first + row) for row, value in enumerate(rewards, start=1)]


def _reward(value: Any, sample: int) -> float | None:
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    what = f"its reward of sample {sample} is {shown(value)}, not a finite number, or null for no score"
    raise RequestFailure(what, again=False, status=200)
