"""Search engines behind one interface. A dead key, an empty wallet and an outage are each named: none of them may look
like "nothing found"."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.interfaces import Searcher
from dr_jax.records import Failure, FailureKind, Hit
from dr_jax.web.http import failure_of, read_body, retry, retry_after_s
from dr_jax.web.text import MAX_URL_CHARS, clean_line

MAX_RESULTS = 10  # Serper charges double for more
_MAX_QUERY_CHARS = 2048
_MAX_ANSWER_BYTES = 1 << 20
_RETRYABLE = frozenset({
    FailureKind.RATE_LIMITED, FailureKind.PROVIDER_DOWN, FailureKind.CONNECTION, FailureKind.TIMEOUT, FailureKind.DNS,
})  # fmt: skip


class SerperSearch:
    """Google's results through serper.dev. Never raises for a query or an answer; cancellation passes.

    `session` comes from `http.open_session` and serves this provider alone. An answer that redirects is refused: the
    key goes to `endpoint` and nowhere else.

    Source: https://serper.dev (POST JSON q, num, gl, hl with X-API-KEY; `organic[]` of title, link, snippet)."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        api_key: str,
        endpoint: str = "https://google.serper.dev/search",
        region: str = "us",
        language: str = "en",
        timeout_s: float = 10.0,
        max_concurrent: int = 32,
        retries: int = 2,
        backoff_s: float = 0.5,
    ):
        url = URL(endpoint)
        # .test can never be a public name (RFC 6761): it is where a world of one's own is mapped to.
        if url.scheme != "https" and not (url.raw_host or "").endswith(".test"):
            raise ConfigError(f"search.endpoint: {endpoint!r} would send the key in the clear; use https")
        if not api_key or not api_key.isascii() or not api_key.isprintable():
            raise ConfigError("search.api_key: Serper needs a key (https://serper.dev); set SERPER_API_KEY")
        self._session, self._url, self._region, self._language = session, url, region, language
        self._headers = {"X-API-KEY": api_key, "Accept": "application/json"}
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._slots = asyncio.Semaphore(max_concurrent)

    @property
    def identity(self) -> dict[str, str]:
        """What, besides the query, decides the results: part of a cache key."""
        return {"provider": "serper", "endpoint": str(self._url), "gl": self._region, "hl": self._language}

    async def search(self, query: str, *, top_k: int) -> tuple[Hit, ...] | Failure:
        """At most `top_k` (1 to 10) results in rank order."""
        query = clean_line(query)
        if not query or len(query) > _MAX_QUERY_CHARS:
            return Failure(FailureKind.BAD_REQUEST, f"a query has 1 to {_MAX_QUERY_CHARS} characters")
        top_k = min(max(top_k, 1), MAX_RESULTS)
        request = {"q": query, "num": top_k, "gl": self._region, "hl": self._language}
        answer = await retry(
            lambda: self._ask(request),
            retryable=lambda failure: failure.kind in _RETRYABLE,
            retries=self._retries,
            backoff_s=self._backoff_s,
        )
        return answer if isinstance(answer, Failure) else answer[:top_k]

    async def _ask(self, request: dict[str, Any]) -> tuple[Hit, ...] | Failure:
        try:
            async with self._slots, asyncio.timeout(self._timeout_s):
                async with self._session.post(
                    self._url, json=request, headers=self._headers, allow_redirects=False
                ) as response:
                    body = await read_body(response, _MAX_ANSWER_BYTES)
                    return _broken(body) if isinstance(body, Failure) else _answer(response, body)
        # The border: what aiohttp raises for a broken provider is not a closed list.
        except Exception as error:  # noqa: BLE001
            return _broken(failure_of(error))


def _broken(failure: Failure) -> Failure:
    """`failure` of a provider: where a page would be at fault, a provider is down."""
    return (
        failure if failure.infrastructure else Failure(FailureKind.PROVIDER_DOWN, f"{failure.kind}: {failure.detail}")
    )


def _answer(response: aiohttp.ClientResponse, body: bytes) -> tuple[Hit, ...] | Failure:
    status = response.status
    if status == 200:
        return _hits(body)
    if status == 429:
        return Failure(FailureKind.RATE_LIMITED, "HTTP 429", status, retry_after_s(response.headers))
    if status == 402 or (status in (400, 403) and b"credit" in body.lower()):
        return Failure(FailureKind.QUOTA_EXHAUSTED, "no credits left", status)
    if status in (401, 403):
        return Failure(FailureKind.AUTH, "the key was refused", status)
    if 400 <= status < 500:
        return Failure(FailureKind.BAD_REQUEST, f"HTTP {status}", status)
    return Failure(FailureKind.PROVIDER_DOWN, f"HTTP {status}", status, retry_after_s(response.headers))


def _hits(body: bytes) -> tuple[Hit, ...] | Failure:
    """The organic results that are whole; an answer of another shape is a provider that does not work."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return Failure(FailureKind.PROVIDER_DOWN, "the answer is not JSON")
    # Serper leaves `organic` out where nothing was found, but always echoes the parameters.
    empty = [] if isinstance(answer, dict) and "searchParameters" in answer else None
    organic = answer.get("organic", empty) if isinstance(answer, dict) else None
    if not isinstance(organic, list):
        return Failure(FailureKind.PROVIDER_DOWN, "the answer has no list `organic`")
    return tuple(hit for hit in map(_hit, organic) if hit)


def _hit(item: Any) -> Hit | None:
    if not isinstance(item, dict) or not isinstance(item.get("link"), str):
        return None
    url = clean_line(item["link"])
    if not url.lower().startswith(("http://", "https://")) or len(url) > MAX_URL_CHARS:
        return None
    title, snippet = (value if isinstance(value, str) else "" for value in (item.get("title"), item.get("snippet")))
    return Hit(title=clean_line(title, 300), url=url, snippet=clean_line(snippet, 2000))


PROVIDERS: dict[str, Callable[..., Searcher]] = {"serper": SerperSearch}

_RETIRED = {
    "bing": "Microsoft ended the Bing Search API on 2025-08-11",
    "google_cse": "Google's Custom Search JSON API is closed to new users and ends on 2027-01-01",
}


def find_provider(provider: str) -> Callable[..., Searcher]:
    """The client of this name; `ConfigError` names the others where there is none."""
    if provider in PROVIDERS:
        return PROVIDERS[provider]
    why = _RETIRED.get(provider, "unknown provider")
    raise ConfigError(f"search.provider: {provider!r}: {why}. Use one of: {', '.join(PROVIDERS)}")


def open_search(provider: str, session: aiohttp.ClientSession, **settings: Any) -> Searcher:
    """The client of `provider`, a name in `PROVIDERS`, with its own settings."""
    return find_provider(provider)(session, **settings)
