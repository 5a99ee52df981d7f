"""Reward servers: a reward function that requests its scores over HTTP, as OpenRLHF's trainer does (docs/rewards.md).

A batch gets all its scores or raises an error: no score is made up, and none is used before all have arrived.
"""

from __future__ import annotations

import asyncio
import os
import random
import ssl
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx2
import tenacity

from stable_rlhf.config import RewardConfig, url_without_secrets
from stable_rlhf.console import tell
from stable_rlhf.data import Text
from stable_rlhf.errors import RewardError, RewardInputError, RewardUnavailable
from stable_rlhf.rewards.checks import shown
from stable_rlhf.rewards.functions import RewardFunction
from stable_rlhf.rewards.protocol import RequestFailure, answer_content, request_body, rewards_in
from stable_rlhf.rewards.run_async import waited_for

CONNECT_SECONDS = 10.0
"""Seconds to open a connection: it takes a few round trips, however busy the server is."""

FIRST_PAUSE = 0.5
"""Seconds before the first retry: a process that a deployment killed takes about that long to be replaced."""

LONGEST_PAUSE = 60.0
"""Longest pause in seconds: once somebody starts a server, the run finds it within that time."""


NOT_THE_PLACE = frozenset({401, 403, 404, 405})
"""Statuses that mean a wrong address or token. Any other error in the trial, which has no values for the data set's
columns, may come from their absence."""

SILENT = 5.0
"""Seconds without scores before the console is told; a server that is being replaced is back sooner."""

GLANCE = 0.2
"""Seconds between two checks, during a pause, whether the run is asked to stop."""

PROBE_RETRIES = 2
"""Retries of the trial at the start. They take a second or two, so a server that is not there is reported soon."""

PROBE_PROMPT, PROBE_COMPLETION = "The soup was", " good."


class RemoteReward:
    """An async reward function whose scores come from a server. Texts go to it without special tokens.

    url: where batches are POSTed, without a password in it. batch_size: samples per request; one request follows
    another. timeout: seconds per request. retries: further tries of a request whose failure may pass: connection,
    time-out, statuses 408, 425, 429 (Retry-After is waited for) and 5xx, an answer that is not a JSON object with one
    reward per sample. max_wait: seconds for one call, all requests and pauses together. token_env: see RewardConfig.
    columns: those of the data set that are sent, as fields of their names. first_pause: seconds before the first retry.
    stopping: whether the run is asked to stop; a failed request is then not retried.

    Calling it raises RewardUnavailable where it gets no scores; the message has the URL, tries, seconds, cause and
    remedy.
    """

    skip_special_tokens = True

    def __init__(
        self,
        url: str,
        *,
        batch_size: int = 64,
        timeout: float = 60.0,
        retries: int = 15,
        max_wait: float = 600.0,
        token_env: str | None = None,
        columns: Sequence[str] = (),
        first_pause: float = FIRST_PAUSE,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.url, self.columns = url, tuple(columns)
        self._batch_size, self._timeout, self._retries, self._max_wait = batch_size, timeout, retries, max_wait
        self._token_env, self._stopping = token_env, stopping
        self._bounds = f"reward.timeout={timeout:g}, reward.retries={retries}, reward.max_wait={max_wait:g}"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._headers["Accept-Encoding"] = "identity"  # so that the limit on an answer is one on what it unfolds to
        if token_env is not None:
            self._headers["Authorization"] = f"Bearer {_token(token_env)}"
        self._doubling = tenacity.wait_exponential(multiplier=first_pause, max=LONGEST_PAUSE)
        self._random = random.Random()  # not the run's own: a retry must not change what it draws
        self._tls = httpx2.create_ssl_context(trust_env=False)  # the system's certificates, always verified

    async def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        """One score per sample, in order; None where the server has none for it."""
        if missing := [name for name in self.columns if name not in columns]:
            has = ", ".join(columns) or "no column except prompt"
            raise RewardError(
                f"reward.columns={list(self.columns)!r}: the data set has no column {missing[0]!r}; it has {has}."
            )
        scores: list[float | None] = []
        started, tries, say = time.monotonic(), 0, self._said()
        settings: dict[str, Any] = {"headers": self._headers, "verify": self._tls, "trust_env": False}
        timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)  # the rest is bounded as a whole, in _request
        async with httpx2.AsyncClient(timeout=timeout, follow_redirects=False, **settings) as client:
            for first in range(0, len(prompts), self._batch_size):
                part = slice(first, first + self._batch_size)
                sent = {name: columns[name][part] for name in self.columns}
                body = request_body(prompts[part], completions[part], sent)
                left = self._max_wait - (time.monotonic() - started)
                retrying = tenacity.AsyncRetrying(
                    retry=tenacity.retry_if_exception(lambda error: isinstance(error, RequestFailure) and error.again),
                    wait=self._pause,
                    stop=tenacity.stop_after_attempt(self._retries + 1) | tenacity.stop_before_delay(left),
                    before_sleep=say,
                    sleep=self._sleep,
                    reraise=True,
                )
                try:
                    count = len(prompts[part])
                    scores += await retrying(self._request, client, body, first, count, started, retrying.statistics)
                except RequestFailure as failure:
                    tries += retrying.statistics["attempt_number"]
                    raise self._unavailable(failure, tries, time.monotonic() - started) from failure
                tries += retrying.statistics["attempt_number"]
        return scores

    def probe(self) -> None:
        """Has the server score one short text; raises RewardUnavailable within seconds where it is not there.

        The values of `columns` are not known yet and are sent as null; the server need not be able to score that.
        """
        trial = RemoteReward(
            self.url,
            timeout=self._timeout,
            retries=min(self._retries, PROBE_RETRIES),
            max_wait=self._max_wait,
            token_env=self._token_env,
            columns=self.columns,
        )
        trial._bounds = f"a trial before the run begins, of at most {PROBE_RETRIES} retries"
        nothing = {name: [None] for name in self.columns}
        try:
            waited_for(lambda: trial([PROBE_PROMPT], [PROBE_COMPLETION], **nothing))
        except RewardUnavailable as error:
            status = error.__cause__.status if isinstance(error.__cause__, RequestFailure) else None
            there = status is not None and not 300 <= status < 400 and status not in NOT_THE_PLACE
            if not (self.columns and there):
                raise

    def _pause(self, state: tenacity.RetryCallState) -> float:
        """Seconds before the next try: doubled each time, times 0.5 to 1 at random, lest all runs retry together."""
        failure = state.outcome.exception() if state.outcome else None
        asked = failure.after if isinstance(failure, RequestFailure) else 0.0
        return max(self._doubling(state) * self._random.uniform(0.5, 1.0), asked)

    def _said(self) -> Callable[[tenacity.RetryCallState], None]:
        """A callback that tells the console, once, why there have been no scores for SILENT seconds."""
        done: list[bool] = []

        def say(state: tenacity.RetryCallState) -> None:
            if not done and (state.seconds_since_start or 0.0) + state.upcoming_sleep > SILENT:
                done.append(True)
                failure = state.outcome.exception() if state.outcome else None
                bound = f"at most reward.max_wait={self._max_wait:g} s"
                tell(f"the reward server {url_without_secrets(self.url)} gives no scores ({failure}); waiting, {bound}")

        return say

    async def _request(
        self,
        client: httpx2.AsyncClient,
        body: bytes,
        first: int,
        count: int,
        started: float,
        known: dict[str, Any],
    ) -> list[float | None]:
        """Sends one request and reads its whole answer within the time allowed.

        A retry (``known``: the statistics of the tries) also ends once the run is asked to stop.
        """
        allowed = max(0.0, min(self._timeout, self._max_wait - (time.monotonic() - started)))
        try:
            async with asyncio.timeout(allowed) as bound:
                watch = asyncio.create_task(self._cut(bound)) if known["attempt_number"] > 1 else None
                try:
                    async with client.stream("POST", self.url, content=body) as response:
                        content = await answer_content(response)
                finally:
                    if watch is not None:
                        watch.cancel()
        except TimeoutError as error:
            raise RequestFailure(f"no whole answer within {allowed:.3g} s", again=True) from error
        except httpx2.HTTPError as error:
            what = f"{type(error).__name__}: {shown(str(error))}"
            raise RequestFailure(what, again=not _untrusted(error)) from error
        return rewards_in(content, first, count)

    def _unavailable(self, failure: RequestFailure, tries: int, seconds: float) -> RewardUnavailable:
        how = f"{tries} {'try' if tries == 1 else 'tries'} in {seconds:.1f} s"
        asked = f" (it asked to wait {failure.after:g} s)" if failure.after > 0 else ""
        lacks = ""
        if (failure.status or 0) >= 400 and failure.status not in NOT_THE_PLACE:
            sent = ", ".join(self.columns) or "none"
            lacks = f" If it needs columns of the data set, name them in reward.columns (now {sent})."
        return RewardUnavailable(
            f"the reward server {url_without_secrets(self.url)} gave no scores, {how} ({self._bounds}): "
            f"{failure}{asked}. Start or repair the server, or correct its URL.{lacks}"
        )

    async def _sleep(self, seconds: float) -> None:
        """Pauses before a further try. Raises RequestFailure once the run is asked to stop."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self._stopping():
                raise RequestFailure("the run is asked to stop and does not retry", again=False)
            await asyncio.sleep(min(left, GLANCE))

    async def _cut(self, request: asyncio.Timeout) -> None:
        """Ends a request once the run is asked to stop."""
        while not self._stopping():
            await asyncio.sleep(GLANCE)
        request.reschedule(asyncio.get_running_loop().time())


def remote_reward(url: str, config: RewardConfig, stopping: Callable[[], bool] = lambda: False) -> RewardFunction:
    """The server at a URL as a reward function named by its host and port.

    Raises RewardInputError where the environment variable of its token is not set, or is not a token.
    """
    function = RemoteReward(
        url,
        batch_size=config.batch_size,
        timeout=config.timeout,
        retries=config.retries,
        max_wait=config.max_wait,
        token_env=config.token_env,
        columns=config.columns,
        stopping=stopping,
    )
    return RewardFunction(name=urlsplit(url).netloc, function=function)


def _token(variable: str) -> str:
    token = os.environ.get(variable, "")
    if not token:
        raise RewardInputError(f"reward.token_env={variable!r}: no such environment variable is set; export it.")
    if not (token.isascii() and token.isprintable()) or " " in token:  # what a header cannot hold
        raise RewardInputError(
            f"reward.token_env={variable!r}: its value has spaces or other characters that no token has."
        )
    return token


def _untrusted(error: BaseException | None) -> bool:
    """Whether a certificate was refused, which trying again does not change."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False
