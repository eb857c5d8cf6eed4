"""The client of chat completions against a server that speaks its wire format, well and badly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dr_jax.agent.model_reader import ModelReader, ReadingLimits, ask_endpoint
from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind, Page
from dr_jax.web.breaker import Breaker
from dr_jax.web.budget import READER, READER_INPUT, READER_OUTPUT, Allowance, Budget
from dr_jax.web.cache import Cache, CachedReader
from dr_jax.web.completions import ChatClient, Endpoint
from dr_jax.web.http import open_session

KEY = "canary-4f9d2c"
ENDPOINT = Endpoint("http://llm.test/v1", "small", KEY, max_tokens=100)
FREE = {READER_INPUT: 0.0, READER_OUTPUT: 0.0}


def completion(text, *, finish="stop", usage=(30, 7)):
    """One real answer's shape."""
    answer = {
        "id": "chatcmpl-1", "object": "chat.completion", "created": 1730000000, "model": "small",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": None,
                     "finish_reason": finish}],
    }  # fmt: skip
    if usage:
        counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
        answer |= {"usage": counts}
    return web.json_response(answer)


def error(status, code="", **headers):
    return web.json_response({"error": {"message": "no", "type": "e", "code": code}}, status=status, headers=headers)


class Llm:
    """Answers in turn, the last one for ever: responses, or functions that make one. Keeps what it was sent."""

    def __init__(self, *answers):
        self.answers, self.requests, self.headers, self.paths = answers, [], [], []

    async def answer(self, request):
        self.paths.append(request.path_qs)
        self.headers.append(request.headers)
        self.requests.append(await request.json())
        answer = self.answers[min(len(self.requests), len(self.answers)) - 1]
        return answer(request) if callable(answer) else answer


@contextlib.asynccontextmanager
async def client(llm, endpoint=ENDPOINT, **settings):
    site = web.Application()
    site.router.add_route("*", "/{path:.*}", llm.answer)
    settings = {"backoff_s": 1e-3, "timeout_s": 1.0} | settings
    async with TestServer(site) as server, open_session(hosts={"llm.test": ("127.0.0.1", server.port)}) as session:
        yield ChatClient(session, endpoint, **settings)


async def complete(*answers, times=1, endpoint=ENDPOINT, **settings):
    llm = Llm(*(lambda request, one=one: one() for one in answers))
    async with client(llm, endpoint, **settings) as chat:
        return [await chat.complete("Be brief.", "Who?") for _ in range(times)], llm


async def test_the_wire_format():
    (answer,), llm = await complete(lambda: completion("Kim Lee."))
    assert answer == "Kim Lee."
    assert llm.paths == ["/v1/chat/completions"]
    assert llm.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert llm.requests == [
        {
            "model": "small",
            "temperature": 0.0,
            "max_tokens": 100,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}],
        }
    ]


@pytest.mark.parametrize(
    ("base_url", "asked"),
    [
        ("http://llm.test/v1/", "/v1/chat/completions"),
        ("http://llm.test/v1", "/v1/chat/completions"),
        ("http://llm.test/deployments/x?api-version=1", "/deployments/x/chat/completions?api-version=1"),
    ],
)
async def test_a_server_of_ones_own_needs_no_key(base_url, asked):
    own = dataclasses.replace(ENDPOINT, base_url=base_url, api_key=None)
    (answer,), llm = await complete(lambda: completion("ok"), endpoint=own)
    assert (answer, llm.paths) == ("ok", [asked])
    assert "Authorization" not in llm.headers[0]


async def test_parameters_go_along_and_none_takes_one_out():
    parameters = {"temperature": None, "max_tokens": None, "max_completion_tokens": 900, "reasoning_effort": "low"}
    _, llm = await complete(lambda: completion("ok"), endpoint=dataclasses.replace(ENDPOINT, parameters=parameters))
    sent = {name: value for name, value in llm.requests[0].items() if name != "messages"}
    assert sent == {"model": "small", "max_completion_tokens": 900, "reasoning_effort": "low"}


async def test_a_character_that_is_none_is_no_exception():
    llm = Llm(lambda request: completion("ok"))
    async with client(llm, budget=Budget(prices=PRICES)) as chat:
        assert await chat.complete("Be brief.", "Who? \ud800") == "ok"


def text(body, status=200):
    return lambda: web.Response(body=body, status=status, content_type="application/json")


DOWN = FailureKind.PROVIDER_DOWN
FAULTS = {
    "no key": (lambda: error(401), FailureKind.AUTH, 1),
    "forbidden": (lambda: error(403), FailureKind.AUTH, 1),
    "unknown model": (lambda: error(404, "model_not_found"), FailureKind.AUTH, 1),
    "no credits": (lambda: error(402), FailureKind.QUOTA_EXHAUSTED, 1),
    "quota": (lambda: error(429, "insufficient_quota"), FailureKind.QUOTA_EXHAUSTED, 1),
    "rate limit": (lambda: error(429, "rate_limit_exceeded"), FailureKind.RATE_LIMITED, 3),
    "rate limit for a day": (lambda: error(429, **{"Retry-After": "86400"}), FailureKind.RATE_LIMITED, 1),
    "unknown parameter": (lambda: error(400, "unsupported_parameter"), DOWN, 1),
    "unprocessable": (text(b'{"detail": [1]}', 422), DOWN, 1),
    "filtered": (lambda: error(400, "content_filter"), FailureKind.BAD_REQUEST, 1),
    "too long": (lambda: error(400, "context_length_exceeded"), FailureKind.BAD_REQUEST, 1),
    "filtered answer": (lambda: completion("", finish="content_filter"), FailureKind.BAD_REQUEST, 1),
    "down": (lambda: error(503), DOWN, 3),
    "redirect": (lambda: web.Response(status=307, headers={"Location": "http://llm.test/other"}), DOWN, 3),
    "empty": (lambda: completion(""), DOWN, 3),
    "blank": (lambda: completion(" \n"), DOWN, 3),
    "only thought": (lambda: completion(None, finish="length"), DOWN, 3),
    "no choices": (lambda: web.json_response({"choices": []}), DOWN, 3),
    "choices null": (lambda: web.json_response({"choices": None}), DOWN, 3),
    "choice 7": (lambda: web.json_response({"choices": [7]}), DOWN, 3),
    "no message": (lambda: web.json_response({"choices": [{"text": "old"}]}), DOWN, 3),
    "null": (text(b"null"), DOWN, 3),
    "HTML": (text(b"<html>gateway</html>"), DOWN, 3),
    "cut JSON": (text(b'{"choices": [{"mess'), DOWN, 3),
    "deep JSON": (text(b"[" * 100_000), DOWN, 3),
    "huge": (text(b" " * 2_000_000), DOWN, 3),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_fault_is_a_typed_failure(fault, caplog):
    answer, kind, attempts = FAULTS[fault]
    with caplog.at_level(logging.DEBUG):
        (failure,), llm = await complete(answer)
    assert isinstance(failure, Failure)
    assert failure.kind is kind
    assert len(llm.requests) == attempts
    assert failure.infrastructure == (kind is not FailureKind.BAD_REQUEST)
    assert KEY not in repr(failure) + caplog.text


async def test_what_can_pass_is_tried_again():
    answers, llm = await complete(
        lambda: error(503), lambda: error(429, **{"Retry-After": "0"}), lambda: completion("x")
    )
    assert (answers, len(llm.requests)) == (["x"], 3)


async def test_silence_is_a_timeout_and_nothing_is_left(serve):
    async def silent(reader, writer):
        await reader.read()

    server = await serve(silent)
    async with open_session(hosts={"llm.test": ("127.0.0.1", server.port)}) as session:
        failure = await ChatClient(session, ENDPOINT, timeout_s=0.02, retries=0).complete("s", "u")
    assert failure.kind is FailureKind.TIMEOUT


async def test_the_key_goes_to_its_endpoint_alone():
    thief = Llm(lambda request: completion("stolen"))
    site = web.Application()
    site.router.add_route("*", "/{path:.*}", thief.answer)
    async with TestServer(site) as other:
        there = {"Location": f"http://127.0.0.1:{other.port}/v1/chat/completions"}
        (failure,), _ = await complete(lambda: web.Response(status=307, headers=there), retries=0)
    assert (failure.kind, thief.requests) == (DOWN, [])
    assert KEY not in repr(ENDPOINT)


async def test_an_endpoint_at_a_denied_address_is_not_dialled():
    llm = Llm(lambda request: completion("x"))
    site = web.Application()
    site.router.add_route("*", "/{path:.*}", llm.answer)
    async with TestServer(site) as server, open_session(lookup=lambda _: ["127.0.0.1"]) as session:
        endpoint = dataclasses.replace(ENDPOINT, base_url=f"http://llm.test:{server.port}/v1")
        failure = await ChatClient(session, endpoint, retries=0).complete("s", "u")
    assert (failure.kind, llm.requests) == (DOWN, [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"api_key": ""}, "reading.key_variable: the endpoint needs a key"),
        ({"api_key": f"{KEY}\r\nX: y"}, "reading.key_variable: the endpoint needs a key that a header can hold"),
        (
            {"base_url": "http://api.example/v1"},
            "reading.endpoint: 'http://api.example/v1' would send the key",
        ),
        (
            {"base_url": "http://api.example/v1", "api_key": None},
            "reading.endpoint: .* could change the results",
        ),
        ({"base_url": ""}, "reading.endpoint: reader 'endpoint' needs an http.s. URL"),
        ({"base_url": "https://me:pw@api.example/v1"}, "reading.endpoint: reader 'endpoint' needs an http.s. URL with"),
        ({"base_url": "https://["}, "reading.endpoint: reader 'endpoint' needs an http.s. URL"),
        ({"model": ""}, "reading.model: is empty"),
        ({"parameters": {"stream": True, "model": "x"}}, "reading.parameters: model, stream cannot be set here"),
        (
            {"parameters": {"max_tokens": None}},
            "reading.parameters: one of max_tokens, max_completion_tokens must limit",
        ),
        ({"parameters": {"max_tokens": "many"}}, "reading.parameters: one of max_tokens, max_completion_tokens must"),
    ],
)
def test_an_endpoint_that_cannot_be_right(change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        dataclasses.replace(ENDPOINT, **change)
    assert KEY not in str(caught.value)


# Money ---------------------------------------------------------------------------------------------------------------

PRICES = {READER_INPUT: 2.0, READER_OUTPUT: 10.0}  # US dollars per million tokens
# "Be brief." and "Who?" are 13 bytes, and 64 tokens are the frame's: at most 77 x 2 + 100 x 10 micro-dollars.
MOST_USD = 1154e-6


async def test_a_call_is_charged_by_the_tokens_it_took():
    budget = Budget(prices=PRICES)
    await complete(lambda: completion("x", usage=(30, 7)), times=2, budget=budget)
    assert (budget.run.calls, budget.run.usd) == (2, 260e-6)
    assert budget.run.bytes > 2 * 200


@pytest.mark.parametrize("usage", [None, ("30", 7), (-1, 7), (True, 7), (1 << 70, 7)])
async def test_an_endpoint_that_does_not_say_is_charged_the_most_it_can_have_been(usage):
    budget = Budget(prices=PRICES)

    def answer():
        counts = None if usage is None else {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
        return web.json_response({"choices": [{"message": {"content": "x"}}], "usage": counts})

    assert (await complete(answer, budget=budget))[0] == ["x"]
    assert budget.run.usd == MOST_USD


async def test_a_call_that_could_overspend_is_not_made():
    budget = Budget(Allowance(usd=MOST_USD + 259e-6), prices=PRICES)
    answers, llm = await complete(lambda: completion("x"), times=3, budget=budget)
    assert answers[:1] == ["x"]
    assert [(one.kind, one.infrastructure) for one in answers[2:]] == [(FailureKind.QUOTA_EXHAUSTED, True)]
    assert (len(llm.requests), budget.run.usd) == (2, 260e-6)


async def test_a_refusal_costs_nothing_and_a_price_of_each_call_is_one_too():
    budget = Budget(prices=FREE | {READER: 0.01})
    await complete(lambda: error(503), lambda: error(401), lambda: completion("x"), times=2, budget=budget)
    assert (budget.run.calls, budget.run.usd) == (3, 0.01)


async def test_tokens_without_a_price_are_found_before_the_run():
    async with open_session() as session:
        with pytest.raises(ConfigError, match="no price for 'reader_input'; give US dollars per million tokens"):
            ChatClient(session, ENDPOINT, budget=Budget())


async def test_an_endpoint_that_is_down_is_not_asked_and_not_paid_for():
    budget = Budget(prices=PRICES)
    failures, llm = await complete(
        lambda: error(400), times=4, budget=budget, breaker=Breaker(2, 60.0, clock=lambda: 0.0)
    )
    assert [one.kind for one in failures] == [DOWN] * 4
    assert (len(llm.requests), budget.run.calls, budget.run.usd) == (2, 2, 0.0)


# A reader behind it --------------------------------------------------------------------------------------------------

PAGE = Page(
    "http://ann", "Ann Lee", ("Ann Lee paints.", "She married Kim Lee."), headings=("Ann Lee", "Ann Lee > Life")
)
READ = "<extracted_info>\n{}\n</extracted_info>\n<page_down>{}</page_down>"


async def read(chat, cache, *, notes=(), question="Whom did Ann marry?", version="1", page=PAGE):
    reader = CachedReader(
        ModelReader(ask_endpoint(chat), ReadingLimits()), cache, identity=chat.identity | {"version": version}
    )
    return await reader.read(page, question=question, query="Ann Lee", notes=notes)


async def test_a_page_is_read_once_and_replayed_without_an_endpoint(tmp_path):
    llm = Llm(*(lambda request, say=say: completion(READ.format(*say)) for say in (("", "yes"), ("Kim Lee.", "no"))))
    async with client(llm) as chat:
        async with Cache(tmp_path / "tape", "record") as cache:
            found = [await read(chat, cache) for _ in range(3)]
            assert cache.stats()["hits"] == 2
        assert found == [((1, "Kim Lee."),)] * 3
        assert len(llm.requests) == 2
        async with Cache(tmp_path / "tape", "replay") as cache:
            assert await read(chat, cache) == found[0]
            unheard = await read(chat, cache, question="Where does Ann live?")
    assert unheard.kind is FailureKind.NOT_RECORDED
    assert len(llm.requests) == 2


async def test_what_decides_an_extraction_is_in_its_key(tmp_path):
    llm = Llm(lambda request: completion(READ.format("x", "no")))
    async with client(llm) as chat, Cache(tmp_path / "c") as cache:
        await read(chat, cache)
        await read(chat, cache, notes=["Ann paints."])
        await read(chat, cache, question="Where?")
        await read(chat, cache, version="2")
        await read(chat, cache, page=dataclasses.replace(PAGE, segments=("Ann Lee paints.", "She married.")))
        assert cache.stats()["hits"] == 0
        await read(chat, cache, page=dataclasses.replace(PAGE, url="http://mirror"))
        assert (cache.stats()["hits"], len(llm.requests)) == (1, 5)
    async with client(llm, dataclasses.replace(ENDPOINT, model="large")) as chat, Cache(tmp_path / "c") as cache:
        await read(chat, cache)
        assert cache.stats()["hits"] == 0


async def test_a_page_that_taught_nothing_is_not_asked_about_again_and_an_outage_is(tmp_path):
    llm = Llm(lambda request: error(503), lambda request: completion(READ.format("", "no")))
    async with client(llm, retries=0) as chat, Cache(tmp_path / "c") as cache:
        assert (await read(chat, cache)).kind is DOWN
        assert [await read(chat, cache) for _ in range(2)] == [(), ()]
    assert len(llm.requests) == 2


def test_the_request_of_a_cache_key_holds_no_key_of_ours():
    assert KEY not in json.dumps(ENDPOINT.request())
