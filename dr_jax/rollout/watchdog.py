"""Whether the event loop turns: where it stands still, the log says at which line."""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from typing import Self

from dr_jax.errors import ConfigError

_log = logging.getLogger(__name__)


class Watchdog:
    """Watches the running event loop from a thread while inside `async with`. Whenever the loop stands still for more
    than `limit_s`, its stack is logged, once, and the time is counted; a stop of less than 3/4 of that is not seen.

    C code that keeps the interpreter's lock stops the watching thread too: its stack is the one after it."""

    def __init__(self, limit_s: float = 1.0):
        if not limit_s > 0:
            raise ConfigError(f"watchdog: {limit_s} s is no limit; 1 is usual")
        self._limit_s = limit_s
        self._closing = threading.Event()
        self._stops, self._longest_s = 0, 0.0

    async def __aenter__(self) -> Self:
        watched = asyncio.get_running_loop(), threading.get_ident()
        self._thread = threading.Thread(target=self._watch, args=watched, name="watchdog", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._closing.set()
        await asyncio.to_thread(self._thread.join)

    def metrics(self) -> dict[str, float]:
        """Stops of the loop so far, and the longest, by the names under which they are logged."""
        return {"loop/stops": float(self._stops), "loop/longest_stop_s": self._longest_s}

    def _watch(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        while not self._closing.wait(self._limit_s / 4):
            turned, asked_s = threading.Event(), time.monotonic()
            try:
                loop.call_soon_threadsafe(turned.set)
            except RuntimeError:  # the loop was closed without us
                return
            if turned.wait(0.75 * self._limit_s):
                continue
            frame = sys._current_frames().get(thread)
            stack = "".join(traceback.format_stack(frame)) if frame else "(its thread has ended)\n"
            _log.error("the event loop stands still, here:\n%s", stack)
            while not turned.wait(self._limit_s) and not self._closing.is_set():
                pass
            self._stops += 1
            self._longest_s = max(self._longest_s, time.monotonic() - asked_s)
