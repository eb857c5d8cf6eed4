from __future__ import annotations

import asyncio
import json

import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import FailureKind, Hit
from dr_jax.web.breaker import Breaker
from dr_jax.web.budget import Allowance, Budget
from dr_jax.web.cache import Cache, CachedSearcher
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.http import open_session
from dr_jax.web.search import SearchClient, UnblockedSearcher, open_search

KEY = "canary-4f9d2c"

# One real answer's shape, shortened.
ANSWER = {
    "searchParameters": {"q": "apple inc", "gl": "us", "hl": "en", "num": 10, "type": "search", "engine": "google"},
    "knowledgeGraph": {"title": "Apple", "type": "Technology company"},
    "organic": [
        {
            "title": "Apple",
            "link": "https://www.apple.com/",
            "snippet": "Discover the innovative world of Apple.",
            "sitelinks": [{"title": "Support", "link": "https://support.apple.com/"}],
            "position": 1,
        },
        {"title": "Apple Inc.\u202e - Wikipedia", "link": "https://en.wikipedia.org/wiki/Apple_Inc.", "position": 2},
    ],
    "peopleAlsoAsk": [{"question": "What does Apple Inc mean?", "link": "https://example.com"}],
    "credits": 1,
}
HITS = (
    Hit("Apple", "https://www.apple.com/", "Discover the innovative world of Apple."),
    Hit("Apple Inc. - Wikipedia", "https://en.wikipedia.org/wiki/Apple_Inc.", ""),
)


def http(body: bytes | dict, *headers: str, status: str = "200 OK") -> bytes:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"HTTP/1.1 {status}",
        *headers,
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def silent(reader, writer):
    await reader.read()


async def search(server, query="apple inc", *, top_k=10, **settings):
    settings = {"api_key": KEY, "endpoint": "http://search.test/search", "backoff_s": 1e-3, "timeout_s": 1.0} | settings
    async with open_session(hosts={"search.test": ("127.0.0.1", server.port)}) as session:
        return await open_search("serper", session, **settings).search(query, top_k=top_k)


async def test_serper_wire_format(serve):
    server = await serve(http(ANSWER))
    assert await search(server, " apple \n inc", region="de", language="fr") == HITS
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /search HTTP/1.1\r\n")
    assert f"X-API-KEY: {KEY}".encode() in head
    assert b"Content-Type: application/json" in head
    assert json.loads(body) == {"q": "apple inc", "num": 10, "gl": "de", "hl": "fr"}


@pytest.mark.parametrize(("top_k", "num"), [(1, 1), (10, 10), (11, 10), (500, 10), (0, 1), (-3, 1)])
async def test_num_is_what_was_asked_for_up_to_what_one_credit_buys(serve, top_k, num):
    server = await serve(http(ANSWER))
    hits = await search(server, top_k=top_k)
    assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2])["num"] == num
    assert hits == HITS[:num]


async def test_bad_items_are_dropped(serve):
    items = [None, 7, [], {}, {"link": 5}, {"link": "javascript:alert(1)"}, {"link": "/wiki"}, {"title": "no link"}]
    items += [
        {"link": "https://a.test/" + "x" * 3000},
        {"link": "https://a.test/", "title": None, "snippet": [{"x": 1}, 5]},
    ]
    assert await search(await serve(http({"organic": items}))) == (Hit("", "https://a.test/", ""),)


@pytest.mark.parametrize("answer", [{"organic": []}, {"searchParameters": {"q": "x"}, "credits": 1}])
async def test_nothing_found_is_an_answer(serve, answer):
    assert await search(await serve(http(answer))) == ()


FAULTS = {
    "bad key": (http(b'{"message":"Unauthorized.","statusCode":403}', status="403 F"), FailureKind.AUTH, 1),
    "no key": (http(b"", status="401 U"), FailureKind.AUTH, 1),
    "no credits": (http(b'{"message":"Not enough credits"}', status="400 B"), FailureKind.QUOTA_EXHAUSTED, 1),
    "payment": (http(b"", status="402 P"), FailureKind.QUOTA_EXHAUSTED, 1),
    "bad request": (http(b'{"message":"Missing query parameter"}', status="400 B"), FailureKind.BAD_REQUEST, 1),
    "rate limit": (http(b"", status="429 T"), FailureKind.RATE_LIMITED, 3),
    "rate limit for a day": (http(b"", "Retry-After: 86400", status="429 T"), FailureKind.RATE_LIMITED, 1),
    "rate limit and nonsense": (http(b"", "Retry-After: abc", status="429 T"), FailureKind.RATE_LIMITED, 3),
    "down": (http(b"", status="502 B"), FailureKind.PROVIDER_DOWN, 3),
    "null": (http(b"null"), FailureKind.PROVIDER_DOWN, 3),
    "organic null": (http({"searchParameters": {}, "organic": None}), FailureKind.PROVIDER_DOWN, 3),
    "organic object": (http({"organic": {"link": "https://a.test"}}), FailureKind.PROVIDER_DOWN, 3),
    "other JSON": (http({"message": "hello"}), FailureKind.PROVIDER_DOWN, 3),
    "HTML": (http(b"<html>captcha</html>"), FailureKind.PROVIDER_DOWN, 3),
    "cut JSON": (http(json.dumps(ANSWER).encode()[:-9]), FailureKind.PROVIDER_DOWN, 3),
    "deep JSON": (http(b"[" * 100_000), FailureKind.PROVIDER_DOWN, 3),
    "not UTF-8": (http(b'{"organic": "\xff"}'), FailureKind.PROVIDER_DOWN, 3),
    "huge": (http(b" " * 2_000_000), FailureKind.PROVIDER_DOWN, 3),
    "bad framing": (http(b"x", "Content-Length: 7"), FailureKind.PROVIDER_DOWN, 3),
    "brotli": (http(b"x", "Content-Encoding: br"), FailureKind.PROVIDER_DOWN, 3),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_fault_is_a_typed_failure(serve, fault):
    answer, kind, attempts = FAULTS[fault]
    server = await serve(answer)
    failure = await search(server)
    assert failure.kind is kind
    assert server.connections == attempts
    assert failure.infrastructure == (kind is not FailureKind.BAD_REQUEST)
    assert KEY not in repr(failure)


async def test_silence_is_a_timeout(serve):
    server = await serve(silent)
    assert (await search(server, timeout_s=0.02)).kind is FailureKind.TIMEOUT
    assert server.connections == 3


async def test_what_can_pass_is_tried_again(serve):
    later = http(b"", "Retry-After: 0", status="429 T")
    assert await search(await serve(later, http(b"", status="500 I"), http(ANSWER))) == HITS


async def test_the_key_goes_to_its_endpoint_alone(serve):
    thief = await serve(http(ANSWER))
    server = await serve(http(b"", f"Location: http://thief.test:{thief.port}/search", status="307 T"))
    hosts = {"search.test": ("127.0.0.1", server.port), "thief.test": ("127.0.0.1", thief.port)}
    async with open_session(hosts=hosts) as session:
        client = open_search("serper", session, api_key=KEY, endpoint="http://search.test/search", retries=0)
        assert (await client.search("q", top_k=3)).kind is FailureKind.PROVIDER_DOWN
        assert KEY not in repr(client)
        assert KEY not in str(client.identity)
    assert thief.connections == 0


async def test_a_provider_at_a_denied_address_is_not_dialled(serve):
    server = await serve(http(ANSWER))
    async with open_session(lookup=lambda _: ["127.0.0.1"]) as session:
        client = open_search("serper", session, api_key=KEY, endpoint=f"http://search.test:{server.port}/", retries=0)
        failure = await client.search("q", top_k=3)
    assert (failure.kind, server.connections) == (FailureKind.PROVIDER_DOWN, 0)


@pytest.mark.parametrize("query", ["", " \n", "\x00\ud800", "q" * 2049])
async def test_a_query_that_is_none_is_not_sent(serve, query):
    server = await serve(http(ANSWER))
    assert (await search(server, query)).kind is FailureKind.BAD_REQUEST
    assert server.connections == 0


async def test_control_characters_of_a_query_are_not_sent(serve):
    server = await serve(http(ANSWER))
    await search(server, "a\ud800b \x1b[31mc")
    assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2])["q"] == "ab [31mc"


async def test_concurrency_is_bounded(serve):
    open_now = peak = 0

    async def slow(reader, writer):
        nonlocal open_now, peak
        open_now += 1
        peak = max(peak, open_now)
        await asyncio.sleep(0.01)
        open_now -= 1
        writer.write(http(ANSWER))

    server = await serve(slow)
    async with open_session(hosts={"search.test": ("127.0.0.1", server.port)}) as session:
        client = open_search("serper", session, api_key=KEY, endpoint="http://search.test/", max_concurrent=3)
        answers = await asyncio.gather(*(client.search(f"q{i}", top_k=5) for i in range(12)))
    assert answers == [HITS] * 12
    assert peak == 3


@pytest.mark.parametrize("key", ["", "two\r\nlines", "schlüssel"])
async def test_an_impossible_key_is_a_config_error_that_does_not_show_it(key):
    async with open_session() as session:
        with pytest.raises(ConfigError, match="search.api_key: .*SERPER_API_KEY") as caught:
            open_search("serper", session, api_key=key)
    assert not key or key not in str(caught.value)


async def test_a_key_in_the_clear_is_a_config_error():
    async with open_session() as session:
        with pytest.raises(ConfigError, match="search.endpoint: 'http://google.serper.dev' .* use https"):
            open_search("serper", session, api_key=KEY, endpoint="http://google.serper.dev")


@pytest.mark.parametrize(
    ("provider", "why"),
    [("bing", "2025-08-11"), ("google_cse", "closed to new users"), ("altavista", "unknown provider")],
)
async def test_other_providers_name_what_to_use(provider, why):
    async with open_session() as session:
        assert isinstance(open_search("serper", session, api_key=KEY), SearchClient)
        with pytest.raises(ConfigError, match=f"search.provider: '{provider}': .*{why}.*Use one of: serper"):
            open_search(provider, session, api_key=KEY)


async def ask(port, *queries, provider="serper", **settings):
    settings = {"endpoint": "http://search.test/search", "backoff_s": 1e-3, "api_key": KEY, "retries": 0} | settings
    async with open_session(hosts={"search.test": ("127.0.0.1", port)}) as session:
        client = open_search(provider, session, **settings)
        return [await client.search(query, top_k=5) for query in queries]


@pytest.mark.parametrize(
    "endpoint", ["https://a.example/search", "http://127.0.0.1:8080/", "http://[::1]/", "http://localhost:8888/search"]
)
@pytest.mark.parametrize("provider", ["serper", "searxng"])
async def test_what_stays_on_this_machine_needs_no_https(endpoint, provider):
    async with open_session() as session:
        assert open_search(provider, session, api_key=KEY, endpoint=endpoint).identity["endpoint"] == endpoint


@pytest.mark.parametrize(
    "host", ["searxng:8080", "10.0.0.7", "192.168.1.2:8888", "[fd00::1]", "search.internal", "nas.local", "a.home.arpa"]
)
async def test_a_key_does_not_cross_the_own_network_in_the_clear_but_a_query_may(host):
    async with open_session() as session:
        assert open_search("searxng", session, endpoint=f"http://{host}/search")
        with pytest.raises(ConfigError, match="search.endpoint: .* would send the key in the clear; use https"):
            open_search("tavily", session, api_key=KEY, endpoint=f"http://{host}/search")


@pytest.mark.parametrize("host", ["searx.example", "8.8.8.8", "evil-internal.example", "x.test.example"])
async def test_a_public_instance_is_asked_by_https_alone(host):
    async with open_session() as session:
        with pytest.raises(ConfigError, match="search.endpoint: .*could change the results; use https"):
            open_search("searxng", session, endpoint=f"http://{host}/search")


@pytest.mark.parametrize("endpoint", ["", "search.example", "ftp://a.test/", "file:///etc", "https://me:pw@a.example/"])
async def test_an_endpoint_that_is_none(endpoint):
    async with open_session() as session:
        with pytest.raises(ConfigError, match="search.endpoint: provider 'searxng' needs an http.s. URL without user"):
            open_search("searxng", session, endpoint=endpoint)


async def test_a_provider_that_is_down_is_not_asked_until_a_probe_succeeds(serve):
    now_s = 0.0
    down = http(b"", status="503 S")
    server = await serve(down, down, down, http(ANSWER))
    settings = {"breaker": Breaker(2, 10.0, lambda: now_s)}
    failures = await ask(server.port, "a", "b", "c", "d", **settings)
    assert [one.kind for one in failures] == [FailureKind.PROVIDER_DOWN] * 4
    assert [one.status for one in failures] == [503, 503, None, None]
    assert server.connections == 2
    now_s = 10.0
    failed_probe, refused = await ask(server.port, "e", "f", **settings)
    assert (failed_probe.status, refused.status, server.connections) == (503, None, 3)
    now_s = 20.0
    assert await ask(server.port, "g", "h", **settings) == [HITS, HITS]


@pytest.mark.parametrize("status", ["400 B", "401 U", "402 P"])
async def test_a_provider_that_says_no_is_not_down(serve, status):
    server = await serve(http(b"", status=status))
    failures = await ask(server.port, *"abcd", breaker=Breaker(1, 10.0))
    assert server.connections == 4
    assert len(set(failures)) == 1


async def test_each_attempt_is_paid_for_before_it_is_made(serve):
    budget = Budget(Allowance(usd=0.003), prices={"serper": 0.001})
    server = await serve(http(b"<html>"), http(ANSWER))  # an answer of status 200 is charged, useful or not
    found = await ask(server.port, "a", "b", "c", retries=1, budget=budget)
    assert found[:2] == [HITS, HITS]
    assert (found[2].kind, server.connections) == (FailureKind.QUOTA_EXHAUSTED, 3)
    assert (budget.run.calls, budget.run.usd) == (3, 0.003)
    assert budget.run.bytes == 6 + 2 * len(json.dumps(ANSWER))


async def test_a_refusal_of_the_provider_costs_nothing_and_a_silence_may(serve):
    budget = Budget()
    assert (await ask((await serve(http(b"", status="500 I"))).port, "a", retries=2, budget=budget))[0].status == 500
    assert (budget.run.calls, budget.run.usd) == (3, 0.0)
    assert (await ask((await serve(silent)).port, "a", timeout_s=0.02, budget=budget))[0].kind is FailureKind.TIMEOUT
    assert (budget.run.calls, budget.run.usd) == (4, 0.001)


async def test_a_breaker_that_is_open_spends_nothing(serve):
    budget, breaker = Budget(), Breaker(1, 10.0)
    breaker.record("serper", failed=True)
    await ask((await serve(http(ANSWER))).port, "a", budget=budget, breaker=breaker)
    assert budget.run.calls == 0


async def test_a_service_without_a_price_is_found_before_the_run():
    wire = {"endpoint": "https://a.example/", "query": "q", "results": "r"}
    async with open_session() as session:
        with pytest.raises(ConfigError, match="budget.prices: no price for 'json'"):
            open_search("json", session, wire=wire, budget=Budget())


async def test_hits_on_a_blocked_domain_are_not_shown_though_they_were_kept(serve, tmp_path):
    urls = [
        "http://answers.test/",
        "https://www.Answers.test:8080/q?x=1",
        "http://a@answers.test/",
        "http://fine.test/",
    ]
    server = await serve(http({"organic": [{"title": url, "link": url, "snippet": "the answer"} for url in urls]}))
    blocks = AddressPolicy(blocked_domains=frozenset({"answers.test"}))
    async with (
        open_session(hosts={"search.test": ("127.0.0.1", server.port)}) as session,
        Cache(tmp_path / "web.sqlite") as cache,
    ):
        client = open_search("serper", session, api_key=KEY, endpoint="http://search.test/search")
        shown = [
            await UnblockedSearcher(CachedSearcher(client, cache), policy).search("who", top_k=10)
            for policy in (AddressPolicy(), blocks)
        ]
        assert cache.stats()["hits"] == 1
    assert [[hit.url for hit in hits] for hits in shown] == [urls, urls[-1:]]


async def test_a_failure_passes_the_filter_of_blocked_domains(serve):
    server = await serve(http(b"", status="401 Unauthorized"))
    async with open_session(hosts={"search.test": ("127.0.0.1", server.port)}) as session:
        client = open_search("serper", session, api_key=KEY, endpoint="http://search.test/search")
        failure = await UnblockedSearcher(client, AddressPolicy()).search("who", top_k=10)
    assert failure.kind is FailureKind.AUTH


async def test_attempts_start_no_faster_than_the_rate(serve):
    server, loop = await serve(http(b"", status="500 I"), http(ANSWER)), asyncio.get_running_loop()
    started_s = loop.time()
    found = await ask(server.port, "a", "b", "c", max_per_s=20.0, retries=1)
    assert found == [HITS] * 3
    assert server.connections == 4
    assert loop.time() - started_s >= 0.15  # a lower bound: three delays lie between four starts


@pytest.mark.parametrize("limits", [{"max_concurrent": 0}, {"max_per_s": 0.0}])
async def test_a_limit_that_lets_nothing_start(limits):
    async with open_session() as session:
        with pytest.raises(ConfigError, match="let none start"):
            open_search("serper", session, api_key="k", **limits)
