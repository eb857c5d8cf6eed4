"""Each provider's wire, as its documentation shows it, spoken by a server on loopback."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import FailureKind, Hit
from dr_jax.web.http import open_session
from dr_jax.web.search import open_search

KEY = "canary-4f9d2c"
HITS = (Hit("Apple", "https://www.apple.com/", "A company."), Hit("Apple Inc.", "https://en.wikipedia.org/wiki/A", ""))

ANSWERS = {
    "serper": {
        "searchParameters": {"q": "apple inc"},
        "organic": [
            {"title": "Apple", "link": "https://www.apple.com/", "snippet": "A company.", "position": 1},
            {"title": "Apple Inc.", "link": "https://en.wikipedia.org/wiki/A", "position": 2},
        ],
    },
    "brave": {
        "type": "search",
        "query": {"original": "apple inc", "more_results_available": True},
        "mixed": {"type": "mixed", "main": [{"type": "web", "index": 0, "all": False}]},
        "web": {
            "type": "search",
            "results": [
                {"title": "Apple", "url": "https://www.apple.com/", "description": "A company.", "extra_snippets": []},
                {"title": "Apple Inc.", "url": "https://en.wikipedia.org/wiki/A", "profile": {"name": "Wikipedia"}},
            ],
        },
    },
    "tavily": {
        "query": "apple inc",
        "answer": None,
        "images": [],
        "results": [
            {"title": "Apple", "url": "https://www.apple.com/", "content": "A company.", "score": 0.9},
            {"title": "Apple Inc.", "url": "https://en.wikipedia.org/wiki/A", "content": None, "raw_content": None},
        ],
        "response_time": 1.1,
    },
    "exa": {
        "requestId": "b5947044",
        "results": [
            {"id": "1", "title": "Apple", "url": "https://www.apple.com/", "highlights": ["A company."]},
            {"id": "2", "title": "Apple Inc.", "url": "https://en.wikipedia.org/wiki/A", "highlights": []},
        ],
        "costDollars": {"total": 0.007},
    },
    "searxng": {
        "query": "apple inc",
        "number_of_results": 0,
        "results": [
            {"title": "Apple", "url": "https://www.apple.com/", "content": "A company.", "engine": "brave", "score": 4},
            {"title": "Apple Inc.", "url": "https://en.wikipedia.org/wiki/A", "content": "", "engines": ["qwant"]},
        ],
        "unresponsive_engines": [["google", "CAPTCHA"]],
    },
}
NONE = {
    "serper": {"searchParameters": {"q": "x"}},
    "brave": {"type": "search", "query": {"original": "x"}},
    "tavily": {"query": "x", "results": []},
    "exa": {"requestId": "b", "results": []},
    "searxng": {"query": "x", "results": [], "unresponsive_engines": []},
}
# Start line and body (JSON or query string) of search("apple inc", top_k=5) in Germany, in German; how the key goes.
ASKS = {
    "serper": ("POST", {"q": "apple inc", "num": 5, "gl": "de", "hl": "de"}, f"X-API-KEY: {KEY}"),
    "brave": (
        "GET",
        {
            "q": "apple inc",
            "count": "5",
            "country": "DE",
            "search_lang": "de",
            "result_filter": "web",
            "text_decorations": "false",
        },
        f"X-Subscription-Token: {KEY}",
    ),
    "tavily": (
        "POST",
        {"query": "apple inc", "max_results": 5, "search_depth": "basic"},
        f"Authorization: Bearer {KEY}",
    ),
    "exa": ("POST", {"query": "apple inc", "numResults": 5, "contents": {"highlights": True}}, f"x-api-key: {KEY}"),
    "searxng": ("GET", {"q": "apple inc", "format": "json", "language": "de"}, ""),
}


def http(body, *headers: str, status: str = "200 OK") -> bytes:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status}", *headers, "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def search(server, provider, *, top_k=5, **settings):
    settings = {"api_key": KEY, "retries": 0, "timeout_s": 1.0} | settings
    if provider != "json":
        settings["endpoint"] = "http://search.test/search"
    async with open_session(hosts={"search.test": ("127.0.0.1", server.port)}) as session:
        return await open_search(provider, session, **settings).search("apple inc", top_k=top_k)


def asked(request: bytes):
    """Method, path, fields (of the query or the JSON body) and head of one request."""
    head, _, body = request.partition(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
    url = urlsplit(target)
    fields = json.loads(body) if body else {name: value[0] for name, value in parse_qs(url.query).items()}
    return method, url.path, fields, head.decode()


@pytest.mark.parametrize("provider", ASKS)
async def test_what_is_sent(serve, provider):
    server = await serve(http(ANSWERS[provider]))
    assert await search(server, provider, region="de", language="de") == HITS
    method, path, fields, head = asked(server.requests[0])
    assert (method, path, fields) == (ASKS[provider][0], "/search", ASKS[provider][1])
    assert ASKS[provider][2] in head
    assert head.count(KEY) == bool(ASKS[provider][2])


@pytest.mark.parametrize("provider", NONE)
async def test_nothing_found_is_an_answer(serve, provider):
    assert await search(await serve(http(NONE[provider])), provider) == ()


@pytest.mark.parametrize("provider", ANSWERS)
async def test_no_more_than_asked_for(serve, provider):
    assert await search(await serve(http(ANSWERS[provider])), provider, top_k=1) == HITS[:1]


@pytest.mark.parametrize(("provider", "most"), [("brave", 20), ("tavily", 20), ("exa", 10)])
async def test_no_more_than_one_call_buys(serve, provider, most):
    server = await serve(http(ANSWERS[provider]))
    await search(server, provider, top_k=500)
    assert str(most) in [str(value) for value in asked(server.requests[0])[2].values()]


@pytest.mark.parametrize("body", [b"null", b"[]", b"{}", b"7", b"<html>", b"[" * 100_000, b'{"results": {"url": 1}}'])
@pytest.mark.parametrize("provider", ANSWERS)
async def test_an_answer_of_another_shape_is_a_provider_that_is_down(serve, provider, body):
    assert (await search(await serve(http(body)), provider)).kind is FailureKind.PROVIDER_DOWN


@pytest.mark.parametrize("web", [None, [], {"results": None}, {"results": "x"}])
async def test_brave_with_a_broken_list_is_not_nothing_found(serve, web):
    server = await serve(http({"type": "search", "web": web}))
    assert (await search(server, "brave")).kind is FailureKind.PROVIDER_DOWN


async def test_a_searxng_whose_engines_are_out_did_not_look(serve):
    server = await serve(http({"results": [], "unresponsive_engines": [["google", "CAPTCHA"]]}))
    assert (await search(server, "searxng")).kind is FailureKind.PROVIDER_DOWN


async def test_excerpts_of_a_page_are_one_snippet(serve):
    found = {"results": [{"title": "T", "url": "https://a.test/", "highlights": ["one \n two", 7, "three"]}]}
    assert await search(await serve(http(found)), "exa") == (Hit("T", "https://a.test/", "one two … three"),)


def brave(code, status):
    return {"type": "ErrorResponse", "error": {"id": "1", "status": status, "code": code, "meta": {}}, "time": 1}


def windows(remaining, reset, limit="1, 2000"):
    return tuple(
        f"X-RateLimit-{name}: {value}" for name, value in (("Limit", limit), ("Remaining", remaining), ("Reset", reset))
    )


K = FailureKind
FAULTS = [
    *((name, "429 T", b"", ("Retry-After: 7",), K.RATE_LIMITED, 7.0) for name in ANSWERS),
    *((name, "401 U", b"", (), K.AUTH, None) for name in ANSWERS),
    *((name, "403 F", b"", (), K.AUTH, None) for name in ANSWERS),
    *((name, "402 P", b"", (), K.QUOTA_EXHAUSTED, None) for name in ANSWERS),
    *((name, "400 B", {"error": "invalid"}, (), K.BAD_REQUEST, None) for name in ANSWERS),
    *((name, "503 S", b"", ("Retry-After: 9",), K.PROVIDER_DOWN, 9.0) for name in ANSWERS),
    *((name, "302 F", b"", ("Location: https://b.test/",), K.PROVIDER_DOWN, None) for name in ANSWERS),
    ("serper", "400 B", {"message": "Not enough credits"}, (), K.QUOTA_EXHAUSTED, None),
    ("brave", "422 U", brave("SUBSCRIPTION_TOKEN_INVALID", 422), (), K.AUTH, None),
    ("brave", "422 U", brave("VALIDATION", 422), (), K.BAD_REQUEST, None),
    ("brave", "429 T", brave("RATE_LIMITED", 429), windows("0, 1985", "1, 1419704"), K.RATE_LIMITED, 1.0),
    ("brave", "429 T", brave("RATE_LIMITED", 429), windows("0, 0", "1, 1419704", "50, 0"), K.RATE_LIMITED, 1.0),
    ("brave", "429 T", brave("RATE_LIMITED", 429), windows("1, 0", "1, 1419704"), K.QUOTA_EXHAUSTED, None),
    ("brave", "429 T", brave("QUOTA_LIMITED", 429), (), K.QUOTA_EXHAUSTED, None),
    ("brave", "429 T", brave("RATE_LIMITED", 429), windows("0", "1"), K.RATE_LIMITED, None),
    ("brave", "429 T", b"[" * 100_000, windows("x", "y"), K.RATE_LIMITED, None),
    ("tavily", "401 U", {"detail": {"error": "Unauthorized: missing or invalid API key."}}, (), K.AUTH, None),
    ("tavily", "432 L", {"detail": {"error": "This request exceeds your plan."}}, (), K.QUOTA_EXHAUSTED, None),
    ("tavily", "433 L", {"detail": {"error": "pay-as-you-go limit"}}, (), K.QUOTA_EXHAUSTED, None),
    ("exa", "402 P", {"requestId": "b", "error": "x", "tag": "NO_MORE_CREDITS"}, (), K.QUOTA_EXHAUSTED, None),
]


@pytest.mark.parametrize(("provider", "status", "body", "headers", "kind", "wait_s"), FAULTS)
async def test_a_refusal_has_a_name(serve, provider, status, body, headers, kind, wait_s):
    failure = await search(await serve(http(body, *headers, status=status)), provider)
    assert (failure.kind, failure.status, failure.retry_after_s) == (kind, int(status[:3]), wait_s)
    assert failure.infrastructure == (kind is not K.BAD_REQUEST)
    assert KEY not in repr(failure)


async def test_a_searxng_without_json_says_what_to_set(serve):
    failure = await search(await serve(http(b"<h1>Forbidden</h1>", status="403 F")), "searxng")
    assert "search.formats" in failure.detail


WIRE = {
    "endpoint": "http://search.test/v2/find",
    "query": "text",
    "results": "data.items",
    "top_k": "limit",
    "extra": {"lang": "en"},
    "key_header": "Authorization",
    "key_prefix": "Token ",
    "title": "meta.name",
    "url": "meta.href",
    "snippet": "abstract",
}
ITEMS = {"data": {"items": [{"meta": {"name": "T", "href": "https://a.test/"}, "abstract": "S"}, {"meta": 5}, None]}}


async def test_any_other_api_is_asked_by_settings(serve):
    server = await serve(http(ITEMS))
    assert await search(server, "json", wire=WIRE) == (Hit("T", "https://a.test/", "S"),)
    method, path, fields, head = asked(server.requests[0])
    assert (method, path, fields) == ("POST", "/v2/find", {"text": "apple inc", "limit": 5, "lang": "en"})
    assert f"Authorization: Token {KEY}" in head


async def test_any_other_api_by_get_without_key_and_count(serve):
    server = await serve(http(ITEMS))
    wire = WIRE | {"method": "GET", "key_header": "", "top_k": ""}
    assert await search(server, "json", wire=wire) == (Hit("T", "https://a.test/", "S"),)
    method, _, fields, head = asked(server.requests[0])
    assert (method, fields, KEY in head) == ("GET", {"text": "apple inc", "lang": "en"}, False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "PUT"}, "search.method: 'PUT'; allowed: GET, POST"),
        ({"endpoint": ""}, "search.endpoint: is empty"),
        ({"query": ""}, "search.query: is empty"),
        ({"results": ""}, "search.results: is empty"),
        ({"url": ""}, "search.url: is empty"),
        ({"max_results": 0}, "search.max_results: 0 is less than 1"),
        ({"resutls": "x"}, "search.wire: .*resutls"),
        ({"method": "GET", "extra": {"safe": True}}, "search.extra: .*text or a number"),
        ({"extra": {"x": {1}}}, "search.wire: .*not JSON serializable"),
        ({"endpoint": "http://a.example/"}, "would send the key in the clear"),
    ],
)
async def test_settings_that_cannot_work(change, message):
    async with open_session() as session:
        with pytest.raises(ConfigError, match=message):
            open_search("json", session, api_key=KEY, wire=WIRE | change)


async def test_the_other_api_needs_its_settings():
    async with open_session() as session:
        with pytest.raises(ConfigError, match="search.wire: .*'endpoint', 'query', and 'results'"):
            open_search("json", session, api_key=KEY)


async def test_a_cache_tells_providers_and_their_settings_apart():
    async with open_session() as session:
        settings = {"api_key": KEY, "endpoint": "http://search.test/"}
        identities = [open_search(name, session, **settings).identity for name in ANSWERS]
        for change in ({}, {"results": "other"}, {"extra": {"lang": "de"}}, {"top_k": "n"}):
            identities.append(open_search("json", session, api_key=KEY, wire=WIRE | change).identity)
        identities.append(open_search("serper", session, language="de", **settings).identity)
    assert len({json.dumps(one, sort_keys=True) for one in identities}) == len(ANSWERS) + 5
    assert KEY not in str(identities)
