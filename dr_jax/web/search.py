"""Search engines behind one interface. A dead key, an empty wallet and an outage are each named: none of them may look
like "nothing found"."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from dr_jax.errors import ConfigError
from dr_jax.interfaces import Searcher
from dr_jax.records import Failure, FailureKind, Hit
from dr_jax.web.api import Api, check_endpoint, check_key
from dr_jax.web.breaker import Breaker
from dr_jax.web.budget import Budget
from dr_jax.web.guard import AddressPolicy, admit
from dr_jax.web.search_wire import PROVIDERS, Locale, Provider, json_provider
from dr_jax.web.text import clean_line

_MAX_QUERY_CHARS = 2048


class SearchClient:
    """Asks one provider. Never raises for a query or an answer; cancellation passes.

    `session` comes from `http.open_session` and serves this provider alone (`api.Api`). Attempts start at least
    1 / `max_per_s` seconds apart. `budget` pays for each; `breaker` stops asking a provider that is down."""

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
        headers = {}
        if provider.key_header:
            complaint = f"search.api_key: {provider.name} needs a key; set {provider.key_variable}"
            headers[provider.key_header] = provider.key_prefix + check_key(api_key, complaint)
        if max_concurrent < 1 or not max_per_s > 0:
            raise ConfigError(
                f"search: {max_concurrent} at once and {max_per_s:g} a second let none start; raise "
                "config.web.max_concurrent_searches, which all hosts share"
            )
        url = check_endpoint(
            "search.endpoint", endpoint or provider.endpoint, f"provider {provider.name!r}", keyed=bool(headers)
        )
        self._api = Api(
            session, provider.name, url, headers=headers, timeout_s=timeout_s, max_concurrent=max_concurrent,
            retries=retries, backoff_s=backoff_s, breaker=breaker,
        )  # fmt: skip
        self._provider, self._locale, self._budget = provider, Locale(region, language), budget
        self._door, self._delay_s, self._next_s = asyncio.Lock(), 1.0 / max_per_s, -math.inf
        if budget:
            budget.price_usd(provider.name)  # ConfigError now, not in the middle of a run

    @property
    def identity(self) -> dict[str, str]:
        """What, besides the query, decides the results: part of a cache key."""
        identity = {
            "provider": self._provider.name, "endpoint": str(self._api.url),
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
        answer = await self._api.ask(lambda: self._attempt(request))
        return answer if isinstance(answer, Failure) else answer[:top_k]

    async def _attempt(self, request: dict[str, Any]) -> tuple[Hit, ...] | Failure:
        """One request, paid for before it is made; a provider that answers with an error status charges nothing."""
        await self._start()
        refused = self._budget.take(self._provider.name) if self._budget else None
        if refused:
            return refused
        answer = await self._hits(request)
        if self._budget and isinstance(answer, Failure) and answer.status:
            self._budget.give_back(self._provider.name)
        return answer

    async def _start(self) -> None:
        """Waits for the next start that the rate allows; first come, first served."""
        async with self._door:
            await asyncio.sleep(self._next_s - time.monotonic())
            self._next_s = time.monotonic() + self._delay_s

    async def _hits(self, request: dict[str, Any]) -> tuple[Hit, ...] | Failure:
        reply = await self._api.send(self._provider.method, request)
        if isinstance(reply, Failure):
            return reply
        if self._budget:
            self._budget.add_bytes(len(reply.body))
        if reply.status != 200:
            return self._provider.refused(reply)
        try:
            return self._provider.hits(json.loads(reply.body))
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
