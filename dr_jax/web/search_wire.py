"""What each search provider's wire looks like, as data and pure functions. Nothing here opens a connection."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind, Hit
from dr_jax.web.api import Reply, by_status, dig
from dr_jax.web.text import MAX_URL_CHARS, clean_line

_DAY_S = 86_400.0


@dataclasses.dataclass(frozen=True)
class Locale:
    """Whose results are wanted, in ISO codes; a provider without such a parameter leaves it out."""

    region: str
    language: str


@dataclasses.dataclass(frozen=True)
class Provider:
    """One search API. `request(query, top_k, locale)` is sent as JSON (POST) or as the query string (GET); `hits` reads
    a decoded answer of status 200; `refused` names any other."""

    name: str
    endpoint: str  # "" where the user must give it
    method: str
    key_variable: str  # environment variable; "" = asks for no key
    key_header: str
    max_results: int  # the most that one call at the base price returns
    request: Callable[[str, int, Locale], dict[str, Any]]
    hits: Callable[[Any], tuple[Hit, ...] | Failure]
    refused: Callable[[Reply], Failure] = by_status
    key_prefix: str = ""
    variant: str = ""  # what, besides name and endpoint, decides the results: part of a cache key


def read_hits(answer: Any, *, results: str, title: str, url: str, snippet: str) -> tuple[Hit, ...] | Failure:
    """The results that have a usable URL; an answer without the list is a provider that does not work."""
    found = dig(answer, results)
    if not isinstance(found, list):
        return Failure(FailureKind.PROVIDER_DOWN, f"the answer has no list `{results}`")
    hits = (_hit(dig(item, title), dig(item, url), dig(item, snippet)) for item in found)
    return tuple(hit for hit in hits if hit)


def _hit(title: Any, url: Any, snippet: Any) -> Hit | None:
    url = clean_line(url) if isinstance(url, str) else ""
    if not url.lower().startswith(("http://", "https://")) or len(url) > MAX_URL_CHARS:
        return None
    if isinstance(snippet, list):  # excerpts of one page
        snippet = " … ".join(part for part in snippet if isinstance(part, str))
    title, snippet = (value if isinstance(value, str) else "" for value in (title, snippet))
    return Hit(title=clean_line(title, 300), url=url, snippet=clean_line(snippet, 2000))


def _serper_hits(answer: Any) -> tuple[Hit, ...] | Failure:
    # Serper leaves `organic` out where nothing was found, but always echoes the parameters.
    if isinstance(answer, dict) and "searchParameters" in answer:
        answer = {"organic": []} | answer
    return read_hits(answer, results="organic", title="title", url="link", snippet="snippet")


def _serper_refused(reply: Reply) -> Failure:
    if reply.status in (400, 403) and b"credit" in reply.body.lower():
        return reply.failure(FailureKind.QUOTA_EXHAUSTED, "no credits left")
    return by_status(reply)


def _brave_request(query: str, top_k: int, locale: Locale) -> dict[str, Any]:
    return {
        "q": query, "count": top_k, "country": locale.region.upper(), "search_lang": locale.language,
        "result_filter": "web", "text_decorations": "false",
    }  # fmt: skip


def _brave_hits(answer: Any) -> tuple[Hit, ...] | Failure:
    # `web` is left out where nothing was found; `type` is always there.
    if isinstance(answer, dict) and answer.get("type") == "search":
        answer = {"web": {"results": []}} | answer
    return read_hits(answer, results="web.results", title="title", url="url", snippet="description")


def _brave_refused(reply: Reply) -> Failure:
    """Brave says 429 for a full second and for a used-up month alike, and 422 for a key it does not know."""
    code = reply.json("error.code")
    if code == "SUBSCRIPTION_TOKEN_INVALID":
        return reply.failure(FailureKind.AUTH, "the key was refused")
    if reply.status != 429:
        return by_status(reply)
    wait_s = _brave_wait_s(reply.headers)
    if code == "QUOTA_LIMITED" or (wait_s or 0.0) >= _DAY_S:
        return reply.failure(FailureKind.QUOTA_EXHAUSTED, "the plan's quota is used up")
    failure = by_status(reply)
    return failure if failure.retry_after_s is not None else dataclasses.replace(failure, retry_after_s=wait_s)


def _brave_wait_s(headers: Mapping[str, str]) -> float | None:
    """Seconds until every window that is full opens again. X-RateLimit-* list one figure per window, such as
    `Limit: 1, 2000`; a limit of 0 is none."""
    try:
        limits, left, resets = (
            [int(number) for number in headers.get(f"X-RateLimit-{name}", "").split(",")]
            for name in ("Limit", "Remaining", "Reset")
        )
        windows = zip(limits, left, resets, strict=True)
        return max((float(reset) for limit, rest, reset in windows if limit > 0 and rest <= 0), default=None)
    except ValueError:
        return None


def _tavily_refused(reply: Reply) -> Failure:
    if reply.status in (432, 433):  # the plan's limit, the pay-as-you-go limit
        return reply.failure(FailureKind.QUOTA_EXHAUSTED, "the plan's limit is reached")
    return by_status(reply)


def _searxng_hits(answer: Any) -> tuple[Hit, ...] | Failure:
    hits = read_hits(answer, results="results", title="title", url="url", snippet="content")
    # Nothing found while engines behind it were out is no honest "nothing".
    if hits == () and answer.get("unresponsive_engines"):
        return Failure(FailureKind.PROVIDER_DOWN, "no results, and engines of the instance do not respond")
    return hits


def _searxng_refused(reply: Reply) -> Failure:
    if reply.status == 403:
        return reply.failure(FailureKind.AUTH, "the instance serves no JSON: add json to search.formats, settings.yml")
    return by_status(reply)


# Sources: https://serper.dev; https://api-dashboard.search.brave.com/app/documentation; https://docs.tavily.com;
# https://exa.ai/docs; https://docs.searxng.org/dev/search_api.html (read 2026-11).
SERPER = Provider(
    "serper", "https://google.serper.dev/search", "POST", "SERPER_API_KEY", "X-API-KEY",
    max_results=10,  # it charges double for more
    request=lambda query, top_k, locale: {"q": query, "num": top_k, "gl": locale.region, "hl": locale.language},
    hits=_serper_hits, refused=_serper_refused,
)  # fmt: skip
BRAVE = Provider(
    "brave", "https://api.search.brave.com/res/v1/web/search", "GET", "BRAVE_API_KEY", "X-Subscription-Token",
    max_results=20, request=_brave_request, hits=_brave_hits, refused=_brave_refused,
)  # fmt: skip
TAVILY = Provider(
    "tavily", "https://api.tavily.com/search", "POST", "TAVILY_API_KEY", "Authorization", key_prefix="Bearer ",
    max_results=20, refused=_tavily_refused,
    # basic = 1 credit, advanced = 2
    request=lambda query, top_k, _: {"query": query, "max_results": top_k, "search_depth": "basic"},
    hits=functools.partial(read_hits, results="results", title="title", url="url", snippet="content"),
)  # fmt: skip
EXA = Provider(
    "exa", "https://api.exa.ai/search", "POST", "EXA_API_KEY", "x-api-key",
    max_results=10,  # more are billed on top
    request=lambda query, top_k, _: {"query": query, "numResults": top_k, "contents": {"highlights": True}},
    hits=functools.partial(read_hits, results="results", title="title", url="url", snippet="highlights"),
)  # fmt: skip
SEARXNG = Provider(
    "searxng", "", "GET", "", "",
    max_results=20,  # it has no parameter for it: a page is what its engines gave
    request=lambda query, _, locale: {"q": query, "format": "json", "language": locale.language},
    hits=_searxng_hits, refused=_searxng_refused,
)  # fmt: skip

PROVIDERS: dict[str, Provider] = {one.name: one for one in (SERPER, BRAVE, TAVILY, EXA, SEARXNG)}


def json_provider(
    *,
    endpoint: str,
    query: str,
    results: str,
    method: str = "POST",
    top_k: str = "",
    extra: Mapping[str, Any] | None = None,
    key_header: str = "",
    key_prefix: str = "",
    title: str = "title",
    url: str = "url",
    snippet: str = "snippet",
    max_results: int = 10,
) -> Provider:
    """Any API that takes a query and answers with a list in JSON, by settings: `query` and `top_k` name the parameters
    ("" = it has none), `extra` is sent as it is, `results` and then `title`, `url`, `snippet` are dotted paths.
    Without `key_header` no key is sent. Statuses mean what they mean in `by_status`."""
    if method not in ("GET", "POST"):
        raise ConfigError(f"search.method: {method!r}; allowed: GET, POST")
    for name, value in {"endpoint": endpoint, "query": query, "results": results, "url": url}.items():
        if not value:
            raise ConfigError(f"search.{name}: is empty; provider 'json' needs it to ask and to read the answer")
    if max_results < 1:
        raise ConfigError(f"search.max_results: {max_results} is less than 1")
    fixed = dict(extra or {})
    if method == "GET" and not all(type(value) in (str, int, float) for value in fixed.values()):
        raise ConfigError(f"search.extra: {fixed}: with GET each value is text or a number")
    paths = {"results": results, "title": title, "url": url, "snippet": snippet}

    def request(text: str, count: int, _: Locale) -> dict[str, Any]:
        return fixed | {query: text} | ({top_k: count} if top_k else {})

    return Provider(
        "json", endpoint, method, "SEARCH_API_KEY" if key_header else "", key_header,
        max_results=max_results, request=request, hits=functools.partial(read_hits, **paths), key_prefix=key_prefix,
        variant=json.dumps([method, query, top_k, fixed, paths], sort_keys=True),
    )  # fmt: skip
