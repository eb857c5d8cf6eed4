"""URL -> bytes, for URLs that a model chose: every limit is ours, and whatever happens is a value."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Mapping
from typing import Self

import aiohttp
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.breaker import Breaker
from dr_jax.web.guard import AddressPolicy, Hosts, Lookup, admit, check_hosts, domain, site_name, system_lookup
from dr_jax.web.http import Timeouts, failure_of, open_session, pause_s, read_body, retry_after_s
from dr_jax.web.page import Response
from dr_jax.web.politeness import Gate, Manners
from dr_jax.web.robots import MAX_BYTES, Robots
from dr_jax.web.text import MAX_URL_CHARS, clean_line

_REDIRECTS = frozenset({301, 302, 303, 307, 308})


@dataclasses.dataclass(frozen=True)
class _Want:
    """What is asked for, and what is taken for it."""

    types: frozenset[str] | None = None  # None: any
    headers: Mapping[str, str] | None = None  # over those of the session
    max_bytes: int | None = None  # None: that of the limits
    cut: bool = False  # a longer body is cut, not refused


_ACCEPT = "text/html, application/xhtml+xml, application/pdf;q=0.9, text/plain;q=0.8"
# "": extraction looks at the bytes
_PAGE = _Want(frozenset({"", "text/html", "application/xhtml+xml", "text/plain", "application/pdf"}))
_ROBOTS = _Want(headers={"Accept": "text/plain, */*;q=0.1"}, max_bytes=MAX_BYTES, cut=True)


@dataclasses.dataclass(frozen=True)
class Moved:
    """A page that is to be asked for at `url`, after `hops` redirects."""

    url: str
    hops: int


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one fetch may cost, and how many run at once."""

    max_bytes: int = 2 << 20  # of a body, decoded
    max_redirects: int = 5
    max_concurrent: int = 512
    max_per_site: int = 4
    max_wait_s: float = 60.0  # for a turn, or because a site says `Retry-After`
    retries: int = 2  # of broken connections, half bodies, 5xx answers, and 429 with `Retry-After`
    backoff_s: float = 0.5  # before the first retry; doubles
    break_after: int = 5  # failures of one host in a row: it is left alone ...
    break_s: float = 300.0  # ... for so long
    timeouts: Timeouts = Timeouts()

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_concurrent", "max_per_site"):
            if getattr(self, name) < 1:
                raise ConfigError(f"limits.{name}: {getattr(self, name)} is less than 1")
        if not self.max_wait_s > 0:
            raise ConfigError(f"limits.max_wait_s: {self.max_wait_s} is not a positive number of seconds")


@dataclasses.dataclass(slots=True)
class _Clock:
    """Network seconds left to one fetch, all hops and retries together."""

    left_s: float


class Fetcher:
    """Fetches pages. `fetch` never raises, whatever the URL, the server or the network does; cancellation passes.

    `hosts` maps a name to the (ip, port) that is dialled for it, whatever port its URL says; those endpoints, reached
    by those names, are exempt from the address policy and, as one's own, from `manners`."""

    def __init__(
        self,
        policy: AddressPolicy | None = None,
        hosts: Hosts | None = None,
        *,
        limits: Limits | None = None,
        manners: Manners | None = None,
        contact: str = "",
        lookup: Lookup = system_lookup,
    ):
        self._policy, self._hosts = policy or AddressPolicy(), check_hosts(hosts or {})
        self._limits, self._manners = limits or Limits(), manners or Manners()
        self._contact, self._lookup = contact, lookup
        self._gate = Gate(
            max_concurrent=self._limits.max_concurrent,
            max_per_site=self._limits.max_per_site,
            max_wait_s=self._limits.max_wait_s,
        )
        self._breaker = Breaker(self._limits.break_after, self._limits.break_s)
        self._robots = Robots()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = open_session(
            self._policy, self._hosts, timeouts=self._limits.timeouts, contact=self._contact, accept=_ACCEPT,
            lookup=self._lookup,
        )  # fmt: skip
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Response | Failure:
        """The answer at `url` after redirects, if it is text or PDF."""
        answer = await self._follow(url, _PAGE, _Clock(self._limits.timeouts.total_s))
        assert not isinstance(answer, Moved)
        return answer

    async def leg(self, start: Moved) -> Response | Moved | Failure:
        """As `fetch`, but a redirect to another domain is not followed: it comes back."""
        clock = _Clock(self._limits.timeouts.total_s)
        return await self._follow(start.url, _PAGE, clock, hops=start.hops, leaves=False)

    async def _follow(
        self, url: str | URL, want: _Want, clock: _Clock, *, hops: int = 0, leaves: bool = True
    ) -> Response | Moved | Failure:
        step: str | URL | Response | Failure = url
        home, limits = "", self._limits
        for hop in range(hops, limits.max_redirects + 1):
            target = admit(step, self._policy, self._hosts)
            if isinstance(target, Failure):
                return target
            if not leaves:
                home = home or domain(target.raw_host)
                if domain(target.raw_host) != home:
                    return Moved(str(target), hop)
            site = site_name(target.raw_host)
            own = not self._manners.toward_hosts and site in self._hosts
            delay_s = 0.0 if own else await self._delay_s(target, want, clock)
            if isinstance(delay_s, Failure):
                return delay_s
            turn = 0  # as `http.retry`, which would be one more coroutine to every page
            while True:
                step = await self._gate.turn(site, self._ask, site, target, want, clock, delay_s=delay_s)
                if not isinstance(step, Failure) or not _retryable(step):
                    break
                wait_s = pause_s(
                    step, turn, retries=limits.retries, backoff_s=limits.backoff_s, max_wait_s=limits.max_wait_s
                )
                if wait_s is None:
                    break
                await asyncio.sleep(wait_s)
                turn += 1
            if not isinstance(step, URL):
                return step
        return Failure(FailureKind.REDIRECTS, f"more than {limits.max_redirects}")

    async def _delay_s(self, url: URL, want: _Want, clock: _Clock) -> float | Failure:
        """Seconds between two starts at this site, or why `url` must not be asked for at all."""
        manners = self._manners
        delay_s: float | Failure = 0.0
        if want is not _ROBOTS and manners.robots:
            delay_s = await self._robots.check(url, functools.partial(self._robots_txt, clock))
        if isinstance(delay_s, Failure):
            return delay_s
        return manners.pipelines * max(manners.min_delay_s, min(delay_s, manners.max_crawl_delay_s))

    async def _robots_txt(self, clock: _Clock, url: URL) -> bytes | Failure:
        answer = await self._follow(url, _ROBOTS, clock)
        assert not isinstance(answer, Moved)
        return answer if isinstance(answer, Failure) else answer.body

    async def _ask(self, site: str, url: URL, want: _Want, clock: _Clock) -> Response | URL | Failure:
        """The answer of one server, now that it is our turn there; a URL where it redirects."""
        if refusal := self._breaker.admit(site):
            return refusal
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        ends_s = started_s + clock.left_s
        try:
            async with (
                asyncio.timeout_at(min(ends_s, started_s + self._limits.timeouts.response_s)) as deadline,
                self._session.get(url, allow_redirects=False, headers=want.headers) as response,
            ):
                if not response.content.is_eof():  # there is something to wait for
                    deadline.reschedule(ends_s)
                answer = await self._read(url, want, response)
        # The border: hostile input made aiohttp and yarl raise IndexError, AssertionError, LookupError and more, and
        # one page must never end a rollout.
        except Exception as error:  # noqa: BLE001
            answer = failure_of(error)
        finally:
            clock.left_s = ends_s - loop.time()
        if isinstance(answer, Failure) and answer.retry_after_s is not None:
            self._gate.hold(site, answer.retry_after_s)
        # A site that limits our rate is alive.
        broken = isinstance(answer, Failure) and answer.infrastructure and answer.kind is not FailureKind.RATE_LIMITED
        self._breaker.record(site, failed=broken)
        return answer

    async def _read(self, url: URL, want: _Want, response: aiohttp.ClientResponse) -> Response | URL | Failure:
        status = response.status
        if status in _REDIRECTS:
            return _redirect(url, response.headers.get("Location", ""))
        if status == 429:
            return Failure(FailureKind.RATE_LIMITED, url.raw_host or "", status, retry_after_s(response.headers))
        if not 200 <= status < 300:
            return Failure(FailureKind.STATUS, f"HTTP {status}", status, retry_after_s(response.headers))
        # Header bytes above 0x7f arrive as lone surrogates.
        content_type = response.headers.get("Content-Type", "").encode("ascii", "replace").decode()
        if want.types is not None and content_type.partition(";")[0].strip().lower() not in want.types:
            return Failure(FailureKind.UNSUPPORTED_TYPE, clean_line(content_type, 80), status)
        body = await read_body(response, want.max_bytes or self._limits.max_bytes, cut=want.cut)
        if isinstance(body, Failure):
            return body
        return Response(str(url.with_fragment(None) if url.raw_fragment else url), content_type, body)


def _retryable(failure: Failure) -> bool:
    if failure.status == 429:
        return failure.retry_after_s is not None
    # A connection that breaks in the body ends it too early: aiohttp does not tell the two apart.
    broken = failure.kind in (FailureKind.CONNECTION, FailureKind.TRUNCATED)
    return broken or (failure.status or 0) >= 500


def _redirect(url: URL, location: str) -> URL | Failure:
    location = location.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
    if not location or len(location) > MAX_URL_CHARS:
        return Failure(FailureKind.REDIRECTS, "without a usable target")
    try:
        target = url.join(URL(location))
    except ValueError:
        return Failure(FailureKind.REDIRECTS, "to something that is no URL")
    if (url.scheme, target.scheme) == ("https", "http"):
        return Failure(FailureKind.REDIRECTS, "from https to http")
    return target
