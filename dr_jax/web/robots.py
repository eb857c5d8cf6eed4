"""robots.txt: whether we are welcome at a page, and how long a site wants us to wait between two.

Source: RFC 9309; parsed by protego, which Scrapy uses. `Crawl-delay` is no part of the RFC, but sites that have it mean
it. *Differs from the RFC*: a 429 counts as unreachable, not as "there are no rules".
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
import weakref
from collections.abc import Awaitable, Callable

from protego import Protego
from yarl import URL

from dr_jax.records import Failure, FailureKind

AGENT = "dr_jax"  # our product token
MAX_BYTES = 500 << 10  # RFC 9309, 2.5: the least that must be read; the rest is cut off
TTL_S = 86_400.0  # RFC 9309, 2.4: no longer than a day
FAILURE_TTL_S = 300.0
OURS_TTL_S = 15.0
# What may come of the one fetch that asked (its last seconds, its place in the queue), or is remembered elsewhere.
_OURS = frozenset({FailureKind.TIMEOUT, FailureKind.RATE_LIMITED, FailureKind.PROVIDER_DOWN})

_MAX_CACHED_CHARS = 8 << 20  # of rules; parsed, hostile ones take seventy times that
_ENTRY_CHARS = 1000  # what an entry without rules counts as
_USER_AGENT = re.compile(r"\s*user[\s-]*agent\b[\s:]*([^#]*)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class _Entry:
    rules: Protego | Failure
    chars: int
    expires_s: float


class Robots:
    """The rules of each origin, fetched when first needed and kept for a day (a failure: for five minutes)."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._entries: dict[str, _Entry] = {}  # oldest use first
        self._chars = 0
        self._asking: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def check(self, url: URL, ask: Callable[[URL], Awaitable[bytes | Failure]]) -> float | Failure:
        """The site's Crawl-delay in seconds (0: none) where `url` may be fetched; ROBOTS where it may not, or why the
        rules could not be had: who cannot read them stays away. `ask` fetches a robots.txt, redirects included."""
        origin = str(url.origin())
        async with self._asking.setdefault(origin, asyncio.Lock()):  # the first asks, the others wait for its answer
            rules = self._kept(origin)
            if rules is None:
                rules = await self._ask(origin, ask)
        if isinstance(rules, Failure):
            return rules
        if not rules.can_fetch(str(url), AGENT):
            return Failure(FailureKind.ROBOTS, "robots.txt says no")
        return max(rules.crawl_delay(AGENT) or 0.0, 0.0)

    def _kept(self, origin: str) -> Protego | Failure | None:
        entry = self._entries.pop(origin, None)
        if entry is None or entry.expires_s <= self._clock():
            self._chars -= entry.chars if entry else 0
            return None
        self._entries[origin] = entry
        return entry.rules

    async def _ask(self, origin: str, ask: Callable[[URL], Awaitable[bytes | Failure]]) -> Protego | Failure:
        answer = await ask(URL(origin) / "robots.txt")
        if isinstance(answer, Failure) and _no_rules(answer):
            answer = b""
        if isinstance(answer, Failure):
            failure = dataclasses.replace(answer, detail=f"robots.txt: {answer.detail}")
            ttl_s = OURS_TTL_S if answer.kind in _OURS else FAILURE_TTL_S
            self._keep(origin, _Entry(failure, _ENTRY_CHARS, self._clock() + ttl_s))
            return failure
        text = ours(answer)
        rules = await asyncio.to_thread(Protego.parse, text)  # up to a second for 500 KiB
        self._keep(origin, _Entry(rules, _ENTRY_CHARS + len(text), self._clock() + TTL_S))
        return rules

    def _keep(self, origin: str, entry: _Entry) -> None:
        self._entries[origin] = entry
        self._chars += entry.chars
        while self._chars > _MAX_CACHED_CHARS:
            self._chars -= self._entries.pop(next(iter(self._entries))).chars


def _no_rules(failure: Failure) -> bool:
    """RFC 9309, 2.3.1.2 and 2.3.1.3: a 4xx, or redirects without end, mean that there are no rules."""
    if failure.kind is FailureKind.STATUS and failure.status is not None:
        return failure.status < 500
    return failure.kind is FailureKind.REDIRECTS


def ours(body: bytes) -> str:
    """The text of a robots.txt, whole lines, with the names of all other robots made one: the parser's cost is agents
    times rules (minutes for 500 KiB), and it would take `User-agent: dr` for us."""
    if len(body) >= MAX_BYTES:
        body = body[:MAX_BYTES].rpartition(b"\n")[0]
    return "\n".join(map(_anonymous, body.decode("utf-8-sig", "replace").splitlines()))


def _anonymous(line: str) -> str:
    match = _USER_AGENT.match(line)
    if match is None:
        return line
    agent = match[1].strip().lower()
    # Some write our whole User-Agent, version and all.
    mine = re.split(r"[/\s]", agent, maxsplit=1)[0] == AGENT
    return f"User-agent: {AGENT if mine else '*' if agent == '*' else 'somebody-else'}"
