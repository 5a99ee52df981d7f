"""Runs async code from code that is not async."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def waited_for(start: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Runs the coroutine that `start` makes, in a thread and event loop of its own, and returns its result.

    asyncio.run refuses a thread with a running loop, and a notebook has one. An interrupt (Ctrl-C) cancels the
    coroutine, so that none of its requests is waited for.
    """
    running: Future[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = Future()

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        running.set_result((asyncio.get_running_loop(), task))
        return await start()

    with ThreadPoolExecutor(max_workers=1) as pool:
        result = pool.submit(lambda: asyncio.run(main()))
        try:
            return result.result()
        except BaseException:
            if not result.done():
                loop, task = running.result()
                loop.call_soon_threadsafe(task.cancel)
            raise
