"""SIGTERM, which a machine gets some 30 s before it is taken away: all hosts of the run leave soon, at one point."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, TypeVar

from jax.experimental import multihost_utils

from dr_jax import hosts

T = TypeVar("T")


class Preempted(Exception):
    """A host was told to go. All of them raise it together."""


class Preemption:
    """What `listening` gives."""

    def __init__(self, told: asyncio.Event):
        self._told = told

    async def unless(self, work: Coroutine[Any, Any, T]) -> T:
        """What `work` gives. All hosts must call together; what `work` raises is this host's alone.

        Raises:
          Preempted: one of the hosts was told to go before all of them were done; `work` is cancelled.
        """
        doing, told = asyncio.create_task(work), asyncio.create_task(self._told.wait())
        try:
            await asyncio.wait((doing, told), return_when=asyncio.FIRST_COMPLETED)
            if doing.done():
                doing.result()
            if any(await asyncio.to_thread(hosts.gather, self._told.is_set())):
                raise Preempted
            return await doing
        finally:
            doing.cancel()
            told.cancel()
            await asyncio.gather(doing, told, return_exceptions=True)


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[Preemption]:
    """Hears a SIGTERM to any of the hosts from here on. All hosts must call together.

    With one host a second SIGTERM ends the process, as ever."""
    told = asyncio.Event()
    if hosts.count() == 1:
        with _on_sigterm(told):
            yield Preemption(told)
        return
    await asyncio.to_thread(hosts.gather, "listening")  # the seconds are counted from here
    looking = asyncio.create_task(_look(told))
    try:
        yield Preemption(told)
    finally:
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


async def _look(told: asyncio.Event) -> None:
    """Asks each second what JAX, which takes SIGTERM for itself where hosts have joined, has heard from all of them.

    It lets everybody know at the same number, a little after the highest that any host has asked about: no number may
    be left out, and hosts that count seconds are at the same one, however busy they are."""
    loop = asyncio.get_running_loop()
    started_s, second = loop.time(), 0
    while True:
        while second <= loop.time() - started_s:
            if multihost_utils.reached_preemption_sync_point(second):
                told.set()
                return
            second += 1
        await asyncio.sleep(1.0)


@contextlib.contextmanager
def _on_sigterm(told: asyncio.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # the only one that gets signals
        yield
        return
    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)

    def hear() -> None:
        loop.remove_signal_handler(signal.SIGTERM)
        told.set()

    loop.add_signal_handler(signal.SIGTERM, hear)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        if before is not None:  # None: it was not set from Python
            signal.signal(signal.SIGTERM, before)
