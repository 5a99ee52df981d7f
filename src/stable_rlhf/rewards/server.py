"""`stable-rlhf serve-reward`: a reward model or function behind HTTP, for this package's trainer and for OpenRLHF's.

Protocol, limits and refusals: docs/rewards.md. Loopback needs no token; any other address does.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from stable_rlhf.data import Text
from stable_rlhf.errors import ConfigError
from stable_rlhf.rewards.checks import shown
from stable_rlhf.rewards.functions import RewardFunction
from stable_rlhf.rewards.model import RewardModel
from stable_rlhf.rewards.scorer import Scorer

QUEUE = 8
"""Most batches that wait for the one being scored. More would wait longer than their clients do, who retry anyway."""

RETRY_SECONDS = 1
"""Retry-After for a batch that is refused because too many wait: about the time that a batch takes."""

BODY_SECONDS = 30.0
"""Seconds in which the body of a request must arrive: enough for 16 MiB on a slow line, and a bound on slow clients."""

STOP_SECONDS = 10
"""Seconds that batches in progress have to end once the server is told to stop."""

SHOWN = 1000
"""Most characters of a line of the log, which may repeat what a client sent."""

CONNECTIONS = 128
"""Most connections and requests at once, each with a body of up to max_body_bytes in memory."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on a request, and the token that it must have."""

    max_body_bytes: int
    max_batch: int
    token: str | None


class _Refusal(HTTPException):
    """A request that is answered with a status and one sentence."""


class RewardServer:
    """The ASGI application: one batch is scored at a time, in the order of their arrival."""

    def __init__(self, reward: RewardFunction, limits: Limits, log: Callable[[str], None]) -> None:
        self._reward, self._scorer, self._limits, self._log = reward, Scorer([reward]), limits, log
        self._busy = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scoring")
        self._waiting = 0
        self.scoring = False
        """Whether a batch is being scored; only the end of the process can stop that."""
        routes = [
            Route("/", self._score, methods=["POST"]),
            Route("/get_reward", self._score, methods=["POST"]),  # where OpenRLHF's server has it
            Route("/health", self._health, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {HTTPException: self._refused}
        self.app = Starlette(routes=routes, exception_handlers=handlers)

    async def _health(self, request: Request) -> JSONResponse:
        self._admit(request)
        return JSONResponse({"status": "ok", "model": self._reward.name})

    async def _score(self, request: Request) -> JSONResponse:
        try:
            return await self._scored(request)
        except asyncio.CancelledError:  # which only uvicorn does, once STOP_SECONDS are over
            raise _Refusal(503, "the server is stopping, and the batch was not scored; try again later") from None

    async def _scored(self, request: Request) -> JSONResponse:
        started = time.monotonic()
        self._admit(request)
        if request.headers.get("Content-Type", "").split(";")[0].strip().lower() != "application/json":
            # A page in a browser on this machine can send other types without being asked whether it may.
            raise _Refusal(415, "the body must be JSON, with Content-Type: application/json")
        batch = _batch(await self._body(request), self._limits.max_batch, self._reward)
        if self._waiting > QUEUE:
            headers = {"Retry-After": str(RETRY_SECONDS)}
            raise _Refusal(503, f"{self._waiting} batches are already waiting; try again later", headers)
        self._waiting += 1
        try:
            rewards = await asyncio.get_running_loop().run_in_executor(self._busy, self._rewards, batch)
        finally:
            self._waiting -= 1
        self._log(f"{len(rewards)} samples scored in {time.monotonic() - started:.2f} s")
        return JSONResponse({"rewards": rewards})

    def _admit(self, request: Request) -> None:
        if self._limits.token is None:
            # A page in a browser may have its own name resolve to this machine, and then read the answers.
            if not is_loopback(_host_of(request.headers.get("Host", ""))):
                raise _Refusal(403, "without --token-env the host of the URL must be localhost or a loopback address")
            return
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if not hmac.compare_digest(given, f"Bearer {self._limits.token}".encode()):
            raise _Refusal(
                401, "the token is missing or wrong: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"}
            )

    async def _body(self, request: Request) -> bytes:
        limit, body = self._limits.max_body_bytes, bytearray()
        too_long = _Refusal(413, f"the body has more than {limit} bytes; send smaller batches")
        declared = request.headers.get("Content-Length", "0")
        if declared.isdecimal() and int(declared) > limit:
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for piece in request.stream():
                    body += piece
                    if len(body) > limit:
                        raise too_long
        except TimeoutError:
            raise _Refusal(408, f"the body did not arrive within {BODY_SECONDS:g} s", {"Connection": "close"}) from None
        except ClientDisconnect:
            raise _Refusal(400, "the connection was closed before the body had arrived") from None
        return bytes(body)

    def _rewards(self, batch: _Batch) -> list[float | None]:
        self.scoring = True
        try:
            return self._scorer.answers(batch.prompts, batch.completions, batch.columns)[self._reward.name]
        except Exception as error:  # the next batch may be scored; this one's client learns that it was not
            self._log(f"failed on {len(batch.prompts)} samples: {type(error).__name__}: {error}")
            if isinstance(self._reward.function, RewardModel):
                _require_readable(self._reward.function, batch)
            cause = type(error.__cause__ or error).__name__
            raise _Refusal(500, f"{self._reward.name} failed ({cause}); the server's log says why") from error
        finally:
            self.scoring = False

    async def _refused(self, request: Request, error: HTTPException) -> JSONResponse:
        what = _OF_ROUTING.get(error.status_code, error.detail)
        self._log(f"{request.method} {request.url.path}: refused with {error.status_code}: {what}")
        return JSONResponse({"error": what}, error.status_code, error.headers)


_OF_ROUTING = {
    404: "there is nothing at this path; batches go to / or /get_reward",
    405: "batches are POSTed to / or /get_reward; /health answers to GET",
}
"""Sentences for the requests that Starlette refuses by itself."""


@dataclass(frozen=True, kw_only=True)
class _Batch:
    prompts: list[Text]
    completions: list[str]
    columns: dict[str, list[Any]]


def _batch(body: bytes, max_batch: int, reward: RewardFunction) -> _Batch:
    """The samples of a request. Raises a _Refusal that says which of its fields is wrong."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _Refusal(400, "the body is not JSON, or is nested too deeply") from error
    if not isinstance(fields, dict):
        raise _Refusal(422, "the body must be a JSON object with a list 'query'")
    queries = _texts(fields, "query")
    if not 0 < len(queries) <= max_batch:
        status, rest = (413, f"; send at most {max_batch}") if queries else (422, "")
        raise _Refusal(status, f"'query' has {len(queries)} texts{rest}")
    if "" in queries:
        raise _Refusal(422, f"'query' is empty in row {queries.index('') + 1}")
    chats = _chats(fields, len(queries))
    if isinstance(reward.function, RewardModel):  # reads the whole text, wherever the prompt ends
        samples = [(query, "") if chat is None else chat for query, chat in zip(queries, chats, strict=True)]
        columns: dict[str, list[Any]] = {}
    else:
        samples = [
            _split(row, query, prompt) if chat is None else chat
            for row, (query, prompt, chat) in enumerate(
                zip(queries, _prompts(fields, len(queries)), chats, strict=True), start=1
            )
        ]
        columns = _columns(fields, len(queries))
    prompts, completions = zip(*samples, strict=True)
    return _Batch(prompts=list(prompts), completions=list(completions), columns=columns)


def _require_readable(model: RewardModel, batch: _Batch) -> None:
    """Raises a _Refusal for a sample that the model can never read: its chat template refuses a role or leaves no text.

    Templates raise errors of any kind, so each sample is tried again by itself.
    """
    for row, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True), start=1):
        try:
            model.encode([prompt], [completion])
        except Exception as error:
            cause = error.__cause__ or error
            field, what = "query" if isinstance(prompt, str) else "messages", f"{type(cause).__name__}: {cause}"
            raise _Refusal(422, f"{field!r}, row {row}, cannot be written for the model: {shown(what)}") from error


def _texts(fields: dict[str, Any], name: str) -> list[str]:
    values = fields.get(name)
    if not isinstance(values, list):
        raise _Refusal(422, f"{name!r} must be a list of texts")
    for row, value in enumerate(values, start=1):
        _require_text(value, f"{name!r}, row {row}")
    return values


def _require_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise _Refusal(422, f"{where} is {shown(value)}, not a text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _Refusal(422, f"{where} holds half of a surrogate pair, which is not text") from None


def _prompts(fields: dict[str, Any], count: int) -> list[str]:
    prompts = _texts(fields, "prompts")
    if len(prompts) != count:
        raise _Refusal(422, f"there are {len(prompts)} 'prompts' for {count} texts in 'query'")
    return prompts


def _split(row: int, query: str, prompt: str) -> tuple[Text, str]:
    if not query.startswith(prompt):
        raise _Refusal(422, f"'query', row {row}, does not begin with its prompt, {shown(prompt)}")
    return prompt, query[len(prompt) :]


def _chats(fields: dict[str, Any], count: int) -> list[tuple[Text, str] | None]:
    """(messages before the answer, the answer) of each sample that comes as a chat; None for the others."""
    chats = fields.get("messages")
    if chats is None:
        return [None] * count
    if not isinstance(chats, list) or len(chats) != count:
        raise _Refusal(422, f"'messages' must be a list of {count} chats, one for each text in 'query', or null")
    return [None if chat is None else _chat(chat, f"'messages', row {row}") for row, chat in enumerate(chats, start=1)]


def _chat(chat: Any, where: str) -> tuple[Text, str]:
    if not isinstance(chat, list) or len(chat) < 2:  # a prompt and its answer
        raise _Refusal(422, f"{where}, must be a list of at least two messages, the last of them the answer")
    for message in chat:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise _Refusal(422, f"{where}, has {shown(message)}, not an object with 'role' and 'content'")
        for value in message.values():
            _require_text(value, where)
    if chat[-1]["role"] != "assistant":
        raise _Refusal(422, f"{where}, must end with the assistant's answer")
    return chat[:-1], chat[-1]["content"]


def _columns(fields: dict[str, Any], count: int) -> dict[str, list[Any]]:
    """The columns for a reward function: every field except prompts and completions, one value per sample."""
    columns = {name: values for name, values in fields.items() if name not in ("query", "prompts", "messages")}
    for name, values in columns.items():
        if not isinstance(values, list) or len(values) != count:
            raise _Refusal(422, f"{shown(name)} must be a list of {count} values, one for each text in 'query'")
    if "completions" in columns:
        raise _Refusal(422, "'completions' is not a field: a completion is what follows the prompt in 'query'")
    return columns


def _host_of(header: str) -> str:
    """The host that a Host header names, without its port; empty where it names none."""
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens at the address; port 0 takes a free one. Raises ConfigError where it cannot."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=CONNECTIONS)
    except OSError as error:
        what = os.strerror(error.errno) if isinstance(error.errno, int) and error.errno > 0 else error.strerror
        raise ConfigError(f"--host={host!r} --port={port}: {what}; choose another address or port") from error


def is_loopback(host: str) -> bool:
    """Whether the host is localhost or a loopback address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
