"""What the benches of the host half measure with."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import re
import statistics
import time
from collections.abc import AsyncIterator


@contextlib.asynccontextmanager
async def lag_ms() -> AsyncIterator[list[float]]:
    """How late the event loop was, sampled every 5 ms."""
    lags: list[float] = []

    async def sample() -> None:
        while True:
            start_s = time.monotonic()
            await asyncio.sleep(0.005)
            lags.append(1e3 * (time.monotonic() - start_s - 0.005))

    task = asyncio.create_task(sample())
    try:
        yield lags
    finally:
        task.cancel()


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def memory_mb(kind: str) -> float:
    """`VmRSS`, now; `VmHWM`, the most so far."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{kind}:\s*(\d+) kB", status)[1]) / 1024
