"""Whether another episode may start: not while this process holds more memory than it should."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pathlib
import time
from collections.abc import Callable

from dr_jax.errors import ConfigError

_RESUME = 0.95  # of the watermark: below it episodes start again
_LOOK_S = 0.5  # between two looks at the memory while nothing starts
_log = logging.getLogger(__name__)


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not say (no /proc)."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def memory_bytes() -> int:
    """Memory that this process may hold: the machine's, or its container's (cgroup v2) where that is less."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = pathlib.Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine


class Admission:
    """Lets episodes start, and none while `held()` is at `max_bytes` or more, until it is 5% below it.

    Nobody waits longer than `patience_s`: a run whose memory does not come down goes on, slowly, instead of hanging."""

    def __init__(
        self,
        max_bytes: float,
        *,
        patience_s: float = 60.0,
        held: Callable[[], int] = resident_bytes,
        look_s: float = _LOOK_S,
    ):
        if not max_bytes > 0:
            raise ConfigError(f"admission: {max_bytes} bytes leave no room; give more than 0")
        self._max_bytes, self._patience_s, self._held, self._look_s = max_bytes, patience_s, held, look_s
        self._door = asyncio.Lock()  # one by one: each looks at the memory that those before it left
        self._stopped, self._held_back_s = False, 0.0

    async def wait(self) -> None:
        """Returns when one more episode may start."""
        async with self._door:
            if not self._full():
                return
            since_s = time.monotonic()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._patience_s):
                        while self._full():  # noqa: ASYNC110  (memory tells nobody)
                            await asyncio.sleep(self._look_s)
            finally:
                self._held_back_s += time.monotonic() - since_s

    def metrics(self) -> dict[str, float]:
        """Memory now, and the seconds in which an episode was held back, by the names under which they are logged."""
        return {"memory/resident_bytes": float(self._held()), "memory/held_back_s": self._held_back_s}

    def _full(self) -> bool:
        held = self._held()
        if self._stopped:
            self._stopped = held >= _RESUME * self._max_bytes
        elif held >= self._max_bytes:
            self._stopped = True
            _log.warning(
                "memory: %.1f of %.1f GB are held; no episode starts until less is", held / 1e9, self._max_bytes / 1e9
            )
        return self._stopped
