"""Async work from code that is not async: it gives its result, and lets itself be interrupted."""

from __future__ import annotations

import asyncio
import signal
import threading
import time

import pytest

from stable_rlhf.rewards.run_async import waited_for


def test_the_result_or_the_error_comes_out_even_inside_a_running_loop() -> None:
    async def double(number: int) -> int:
        await asyncio.sleep(0)
        return 2 * number

    async def broken() -> int:
        raise KeyError("gold")

    async def notebook() -> int:
        return waited_for(lambda: double(3))

    assert asyncio.run(notebook()) == 6
    with pytest.raises(KeyError, match="gold"):
        waited_for(broken)


def test_what_interrupts_the_wait_cancels_the_work() -> None:
    ended: list[str] = []

    async def forever() -> None:
        threading.Timer(0.05, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)).start()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        waited_for(forever)
    assert ended == ["cancelled"]
    assert time.monotonic() - started < 10
