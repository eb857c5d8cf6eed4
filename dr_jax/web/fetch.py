"""URL -> bytes, for URLs that a model chose: every limit is ours, and whatever happens is a value."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
import weakref
from collections.abc import AsyncIterator
from typing import Self

import aiohttp
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.guard import AddressPolicy, Hosts, Lookup, admit, check_hosts, system_lookup
from dr_jax.web.http import Timeouts, failure_of, open_session, read_body, retry, retry_after_s
from dr_jax.web.page import Response
from dr_jax.web.text import MAX_URL_CHARS, clean_line

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TYPES = frozenset({"", "text/html", "application/xhtml+xml", "text/plain"})  # "": extraction looks at the bytes
_ACCEPT = "text/html, application/xhtml+xml, text/plain;q=0.8"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one fetch may cost, and how many run at once."""

    max_bytes: int = 2 << 20  # of a body, decoded
    max_redirects: int = 5
    max_concurrent: int = 512
    max_per_site: int = 4
    retries: int = 2  # of refused or broken connections and 5xx answers
    backoff_s: float = 0.5  # before the first retry; doubles
    timeouts: Timeouts = Timeouts()

    def __post_init__(self) -> None:
        for name in ("max_bytes", "max_concurrent", "max_per_site"):
            if getattr(self, name) < 1:
                raise ConfigError(f"limits.{name}: {getattr(self, name)} is less than 1")


class _Clock:
    """Network seconds left to one fetch, all hops and retries together."""

    def __init__(self, total_s: float):
        self._left_s = total_s

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self._left_s):
                yield
        finally:
            self._left_s -= time.monotonic() - started_s


class Fetcher:
    """Fetches pages. `fetch` never raises, whatever the URL, the server or the network does; cancellation passes.

    `hosts` maps a name to the (ip, port) that is dialled for it, whatever port its URL says; those endpoints, reached
    by those names, are exempt from the address policy."""

    def __init__(
        self,
        policy: AddressPolicy | None = None,
        hosts: Hosts | None = None,
        *,
        limits: Limits | None = None,
        contact: str = "",
        lookup: Lookup = system_lookup,
    ):
        self._policy, self._hosts = policy or AddressPolicy(), check_hosts(hosts or {})
        self._limits, self._contact, self._lookup = limits or Limits(), contact, lookup
        self._slots = asyncio.Semaphore(self._limits.max_concurrent)
        self._sites: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        self._session = open_session(
            self._policy, self._hosts, timeouts=self._limits.timeouts, contact=self._contact, lookup=self._lookup
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> Response | Failure:
        """The answer at `url` after redirects, if it is text."""
        clock = _Clock(self._limits.timeouts.total_s)
        return await retry(
            lambda: self._follow(url, clock),
            retryable=lambda failure: failure.kind is FailureKind.CONNECTION or (failure.status or 0) >= 500,
            retries=self._limits.retries,
            backoff_s=self._limits.backoff_s,
            max_wait_s=self._limits.timeouts.total_s,
        )

    async def _follow(self, url: str, clock: _Clock) -> Response | Failure:
        step: str | URL | Response | Failure = url
        for _ in range(self._limits.max_redirects + 1):
            target = admit(step, self._policy, self._hosts)
            if isinstance(target, Failure):
                return target
            step = await self._ask(target, clock)
            if not isinstance(step, URL):
                return step
        return Failure(FailureKind.REDIRECTS, f"more than {self._limits.max_redirects}")

    async def _ask(self, url: URL, clock: _Clock) -> Response | URL | Failure:
        """The answer of one server; a URL where it redirects."""
        site = url.raw_host or ""
        turns = self._sites.setdefault(site, asyncio.Semaphore(self._limits.max_per_site))
        try:
            async with turns, self._slots, clock.running():
                async with asyncio.timeout(self._limits.timeouts.response_s):
                    response = await self._session.get(url, allow_redirects=False, headers={"Accept": _ACCEPT})
                async with response:
                    return await self._read(url, response)
        # The border: hostile input made aiohttp and yarl raise IndexError, AssertionError, LookupError and more, and
        # one page must never end a rollout.
        except Exception as error:  # noqa: BLE001
            return failure_of(error)

    async def _read(self, url: URL, response: aiohttp.ClientResponse) -> Response | URL | Failure:
        status = response.status
        if status in _REDIRECTS:
            return _redirect(url, response.headers.get("Location", ""))
        if status == 429:
            return Failure(FailureKind.RATE_LIMITED, url.raw_host or "", status, retry_after_s(response.headers))
        if not 200 <= status < 300:
            return Failure(FailureKind.STATUS, f"HTTP {status}", status, retry_after_s(response.headers))
        # Header bytes above 0x7f arrive as lone surrogates.
        content_type = response.headers.get("Content-Type", "").encode("ascii", "replace").decode()
        if content_type.partition(";")[0].strip().lower() not in _TYPES:
            return Failure(FailureKind.UNSUPPORTED_TYPE, clean_line(content_type, 80), status)
        body = await read_body(response, self._limits.max_bytes)
        if isinstance(body, Failure):
            return body
        return Response(str(url.with_fragment(None)), content_type, body)


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
