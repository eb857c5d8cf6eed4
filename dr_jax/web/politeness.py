"""Turns: how many requests run at once, how many of them at one site, and how long after one another they start."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind

T = TypeVar("T")

_MAX_HOLD_S = 86_400.0  # whatever Retry-After says
_TURN_S = 0.007  # of starts in one turn of the event loop; together they are cheaper than apart
_SWEEP_SITES = 4096  # idle sites are forgotten from here on


@dataclasses.dataclass(frozen=True)
class Manners:
    """What other people's sites are spared. A site is a host name: grouping hosts by owner would need a public-suffix
    list, which ages."""

    robots: bool = True  # obey robots.txt (RFC 9309)
    min_delay_s: float = 1.0  # between the starts of two requests to one site
    max_crawl_delay_s: float = 30.0  # a robots.txt that asks for a longer delay gets this one
    pipelines: int = 1  # fetchers on other hosts that share these limits, this one included: each waits so much longer
    toward_hosts: bool = False  # also toward the names in the fetcher's `hosts`, which are one's own

    def __post_init__(self) -> None:
        for name in ("min_delay_s", "max_crawl_delay_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"manners.{name}: {getattr(self, name)} is not a number of seconds, 0 or more")
        if self.pipelines < 1:
            raise ConfigError(f"manners.pipelines: {self.pipelines} is less than 1, this fetcher itself")


class _Site:
    def __init__(self, max_at_once: int):
        self.turns = asyncio.Semaphore(max_at_once)
        self.door = asyncio.Lock()  # starts go one by one, in order of arrival
        self.visitors = 0  # inside or waiting
        self.next_s = 0.0  # no start before: the delay since the last one
        self.held_s = 0.0  # no start before: the site said so


class Gate:
    """Gives out turns. Nobody waits longer than `max_wait_s`: who would have to gets RATE_LIMITED."""

    def __init__(
        self,
        *,
        max_concurrent: int,
        max_per_site: int,
        max_wait_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._slots = asyncio.Semaphore(max_concurrent)
        self._turn_ends_s: float | None = None  # of the event loop's turn; None before its first start
        self._max_per_site, self._max_wait_s = max_per_site, max_wait_s
        self._clock, self._sleep = clock, sleep
        self._sites: dict[str, _Site] = {}
        self._sweep_at = _SWEEP_SITES

    async def turn(
        self, name: str, ask: Callable[..., Awaitable[T | Failure]], *args: Any, delay_s: float = 0.0
    ) -> T | Failure:
        """What `ask(*args)` says, once it is its turn at site `name`; no other starts there within `delay_s` of its
        start."""
        site = self._site(name)
        site.visitors += 1
        try:
            while (free := self._is_free(site, now_s := self._clock())) and self._turn_is_over(now_s):  # noqa: ASYNC110
                await asyncio.sleep(0)  # a turn of the loop is all there is to wait for
            if free:  # no timer, which is most of the cost
                await site.turns.acquire()
                await self._slots.acquire()
                site.next_s = now_s + delay_s
            elif refusal := await self._enter(site, delay_s):
                return refusal
            try:
                return await ask(*args)
            finally:
                self._slots.release()
                site.turns.release()
        finally:
            site.visitors -= 1

    def hold(self, name: str, seconds: float) -> None:
        """Starts nothing at site `name` for `seconds` (at most a day): its `Retry-After`."""
        site = self._site(name)
        site.held_s = max(site.held_s, self._clock() + min(seconds, _MAX_HOLD_S))

    async def _enter(self, site: _Site, delay_s: float) -> Failure | None:
        """Takes a turn at `site` and a slot, which the caller gives back; or neither, and says why."""
        try:
            async with asyncio.timeout(self._max_wait_s), contextlib.AsyncExitStack() as undo:
                await undo.enter_async_context(site.turns)
                while self._turn_is_over(self._clock()):  # noqa: ASYNC110
                    await asyncio.sleep(0)
                async with site.door:
                    if refusal := await self._until_open(site):
                        return refusal
                    await self._slots.acquire()
                    site.next_s = self._clock() + delay_s
                undo.pop_all()
        except TimeoutError:
            return Failure(FailureKind.RATE_LIMITED, f"no turn in {self._max_wait_s:g} s of waiting")
        return None

    def _turn_is_over(self, now_s: float) -> bool:
        """Whether requests that begin at once should give the event loop its turn before the next one."""
        if self._turn_ends_s is None:
            self._turn_ends_s = now_s + _TURN_S
            asyncio.get_running_loop().call_soon(self._end_turn)
            return False
        return now_s >= self._turn_ends_s

    def _end_turn(self) -> None:
        self._turn_ends_s = None

    def _is_free(self, site: _Site, now_s: float) -> bool:
        crowded = site.turns.locked() or site.door.locked() or self._slots.locked()
        return not crowded and site.next_s <= now_s and site.held_s <= now_s

    async def _until_open(self, site: _Site) -> Failure | None:
        while (wait_s := max(site.next_s, site.held_s) - self._clock()) > 0:
            if wait_s > self._max_wait_s:
                return Failure(FailureKind.RATE_LIMITED, "the site asked for more patience", retry_after_s=wait_s)
            await self._sleep(wait_s)
        return None

    def _site(self, name: str) -> _Site:
        if name not in self._sites:
            self._sweep()
            self._sites[name] = _Site(self._max_per_site)
        return self._sites[name]

    def _sweep(self) -> None:
        """Forgets sites without visitors and without a time to remember, so that memory does not grow with the web."""
        if len(self._sites) < self._sweep_at:
            return
        now_s = self._clock()
        self._sites = {
            name: site for name, site in self._sites.items() if site.visitors or max(site.next_s, site.held_s) > now_s
        }
        self._sweep_at = max(_SWEEP_SITES, 2 * len(self._sites))
