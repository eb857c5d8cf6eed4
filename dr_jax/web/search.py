"""Search engines behind one interface. A dead key, an empty wallet and an outage are each named: none of them may look
like "nothing found"."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.interfaces import Searcher
from dr_jax.records import Failure, FailureKind, Hit
from dr_jax.web.breaker import Breaker
from dr_jax.web.budget import Budget
from dr_jax.web.guard import AddressPolicy, admit
from dr_jax.web.http import failure_of, read_body, retry
from dr_jax.web.search_wire import PROVIDERS, Locale, Provider, Refusal, json_provider
from dr_jax.web.text import clean_line

_MAX_QUERY_CHARS = 2048
_MAX_ANSWER_BYTES = 1 << 20
_RETRYABLE = frozenset({
    FailureKind.RATE_LIMITED, FailureKind.PROVIDER_DOWN, FailureKind.CONNECTION, FailureKind.TIMEOUT, FailureKind.DNS,
})  # fmt: skip


class SearchClient:
    """Asks one provider. Never raises for a query or an answer; cancellation passes.

    `session` comes from `http.open_session` and serves this provider alone. An answer that redirects is refused: the
    key goes to `endpoint` and nowhere else. A search holds its slot while it waits to try again, so that a provider
    that asks for less gets less; attempts start at least 1 / `max_per_s` seconds apart. `budget` pays for each;
    `breaker` stops asking a provider that is down."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        provider: Provider,
        *,
        api_key: str = "",
        endpoint: str = "",
        region: str = "us",
        language: str = "en",
        timeout_s: float = 10.0,
        max_concurrent: int = 32,
        max_per_s: float = math.inf,
        retries: int = 2,
        backoff_s: float = 0.5,
        breaker: Breaker | None = None,
        budget: Budget | None = None,
    ):
        self._url = _check_endpoint(endpoint or provider.endpoint, provider)
        self._headers = {"Accept": "application/json"}
        if provider.key_header:
            self._headers[provider.key_header] = provider.key_prefix + _check_key(api_key, provider)
        self._session, self._provider, self._locale = session, provider, Locale(region, language)
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        if max_concurrent < 1 or not max_per_s > 0:
            raise ConfigError(
                f"search: {max_concurrent} at once and {max_per_s:g} a second let none start; raise "
                "config.web.max_concurrent_searches, which all hosts share"
            )
        self._slots = asyncio.Semaphore(max_concurrent)
        self._door, self._delay_s, self._next_s = asyncio.Lock(), 1.0 / max_per_s, -math.inf
        # More in a row than one moment's searches, so that a single hiccup of the network does not open it.
        self._breaker = breaker or Breaker(threshold=2 * max_concurrent, cool_s=15.0)
        self._budget = budget
        if budget:
            budget.price_usd(provider.name)  # ConfigError now, not in the middle of a run

    @property
    def identity(self) -> dict[str, str]:
        """What, besides the query, decides the results: part of a cache key."""
        identity = {
            "provider": self._provider.name, "endpoint": str(self._url),
            "gl": self._locale.region, "hl": self._locale.language,
        }  # fmt: skip
        return identity | ({"variant": self._provider.variant} if self._provider.variant else {})

    async def search(self, query: str, *, top_k: int) -> tuple[Hit, ...] | Failure:
        """At most `top_k` results in rank order, and at most what the provider returns for one call."""
        query = clean_line(query)
        if not query or len(query) > _MAX_QUERY_CHARS:
            return Failure(FailureKind.BAD_REQUEST, f"a query has 1 to {_MAX_QUERY_CHARS} characters")
        top_k = min(max(top_k, 1), self._provider.max_results)
        request = self._provider.request(query, top_k, self._locale)
        async with self._slots:
            refused = self._breaker.admit(self._provider.name)
            if refused:
                return refused
            answer = await retry(
                lambda: self._attempt(request),
                retryable=lambda failure: failure.kind in _RETRYABLE,
                retries=self._retries,
                backoff_s=self._backoff_s,
            )
            failed = isinstance(answer, Failure) and answer.kind in _RETRYABLE
            self._breaker.record(self._provider.name, failed)
        return answer if isinstance(answer, Failure) else answer[:top_k]

    async def _attempt(self, request: dict[str, Any]) -> tuple[Hit, ...] | Failure:
        """One request, paid for before it is made; a provider that answers with an error status charges nothing."""
        await self._start()
        refused = self._budget.take(self._provider.name) if self._budget else None
        if refused:
            return refused
        answer = await self._ask(request)
        if self._budget and isinstance(answer, Failure) and answer.status:
            self._budget.give_back(self._provider.name)
        return answer

    async def _start(self) -> None:
        """Waits for the next start that the rate allows; first come, first served."""
        async with self._door:
            await asyncio.sleep(self._next_s - time.monotonic())
            self._next_s = time.monotonic() + self._delay_s

    async def _ask(self, request: dict[str, Any]) -> tuple[Hit, ...] | Failure:
        sent: dict[str, Any] = {"params" if self._provider.method == "GET" else "json": request}
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.request(
                    self._provider.method, self._url, headers=self._headers, allow_redirects=False, **sent
                ) as response,
            ):
                body = await read_body(response, _MAX_ANSWER_BYTES)
                return _broken(body) if isinstance(body, Failure) else self._answer(response, body)
        # The border: what aiohttp raises for a broken provider is not a closed list.
        except Exception as error:  # noqa: BLE001
            return _broken(failure_of(error))

    def _answer(self, response: aiohttp.ClientResponse, body: bytes) -> tuple[Hit, ...] | Failure:
        if self._budget:
            self._budget.add_bytes(len(body))
        if response.status != 200:
            return self._provider.refused(Refusal(response.status, response.headers, body))
        try:
            return self._provider.hits(json.loads(body))
        except (ValueError, RecursionError):
            return Failure(FailureKind.PROVIDER_DOWN, "the answer is not JSON")


class UnblockedSearcher:
    """A Searcher in front of another one: drops the hits that lie on a domain the policy blocks, because their titles
    and snippets can give away as much as the pages. Goes in front of the cache: what was kept before a domain was
    blocked is dropped too."""

    def __init__(self, searcher: Searcher, policy: AddressPolicy):
        self._searcher, self._policy = searcher, policy

    async def search(self, query: str, *, top_k: int) -> tuple[Hit, ...] | Failure:
        """At most `top_k` results; fewer where some were dropped."""
        found = await self._searcher.search(query, top_k=top_k)
        return found if isinstance(found, Failure) else tuple(hit for hit in found if not self._blocked(hit.url))

    def _blocked(self, url: str) -> bool:
        refusal = admit(url, self._policy, {})
        return isinstance(refusal, Failure) and refusal.kind is FailureKind.BLOCKLISTED


def _broken(failure: Failure) -> Failure:
    """`failure` of a provider: where a page would be at fault, a provider is down."""
    return (
        failure if failure.infrastructure else Failure(FailureKind.PROVIDER_DOWN, f"{failure.kind}: {failure.detail}")
    )


def _check_key(api_key: str, provider: Provider) -> str:
    if not api_key or not api_key.isascii() or not api_key.isprintable():
        raise ConfigError(f"search.api_key: {provider.name} needs a key; set {provider.key_variable}")
    return api_key


def _check_endpoint(endpoint: str, provider: Provider) -> URL:
    """`endpoint`, if what is sent there is safe: https, or plain http to this machine (a key never leaves it), or,
    where there is no key, to a name or address of the own network."""
    url = URL(endpoint)
    if not url.raw_host or url.scheme not in ("http", "https") or url.raw_user is not None:
        raise ConfigError(f"search.endpoint: provider {provider.name!r} needs an http(s) URL without user or password")
    if url.scheme == "https" or _is_this_machine(url.raw_host):
        return url
    if provider.key_header:
        raise ConfigError(f"search.endpoint: {endpoint!r} would send the key in the clear; use https")
    if not _is_own_network(url.raw_host):
        raise ConfigError(f"search.endpoint: {endpoint!r}: anybody on the way could change the results; use https")
    return url


def _is_this_machine(host: str) -> bool:
    # .test can never be a public name (RFC 6761): it is where a world of one's own is mapped to.
    address = _address(host)
    return address.is_loopback if address else host == "localhost" or host.endswith((".localhost", ".test"))


def _is_own_network(host: str) -> bool:
    address = _address(host)
    own_name = "." not in host or host.endswith((".internal", ".local", ".home.arpa"))
    return address.is_private if address else own_name


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


_RETIRED = {
    "bing": "Microsoft ended the Bing Search API on 2025-08-11",
    "google_cse": "Google's Custom Search JSON API is closed to new users and ends on 2027-01-01",
}


def find_provider(provider: str, wire: Mapping[str, Any] | None = None) -> Provider:
    """The provider of this name; `ConfigError` names the others where there is none. `json` is any other API: `wire`
    holds the arguments of `search_wire.json_provider`."""
    if provider in PROVIDERS:
        return PROVIDERS[provider]
    if provider != "json":
        why = _RETIRED.get(provider, "unknown provider")
        raise ConfigError(f"search.provider: {provider!r}: {why}. Use one of: {', '.join([*PROVIDERS, 'json'])}")
    try:
        return json_provider(**(wire or {}))
    except TypeError as error:  # a name that is missing or unknown
        raise ConfigError(f"search.wire: {error}") from error


def open_search(
    provider: str, session: aiohttp.ClientSession, *, wire: Mapping[str, Any] | None = None, **settings: Any
) -> Searcher:
    """The client of `find_provider(provider, wire)`, with its own settings."""
    return SearchClient(session, find_provider(provider, wire), **settings)
