from __future__ import annotations

import asyncio
import collections

import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web import politeness
from dr_jax.web.fetch import Fetcher, Limits
from dr_jax.web.politeness import Gate, Manners


class Time:
    """Seconds that pass when somebody sleeps."""

    def __init__(self):
        self.now_s = 1000.0

    def __call__(self):
        return self.now_s

    async def sleep(self, seconds):
        self.now_s += seconds
        await asyncio.sleep(0)


def gate(time, **limits):
    limits = {"max_concurrent": 8, "max_per_site": 4, "max_wait_s": 60.0} | limits
    return Gate(**limits, clock=time, sleep=time.sleep)


async def test_starts_at_one_site_keep_their_distance():
    time, starts = Time(), []
    turns = gate(time)

    async def ask():
        starts.append(time())
        await asyncio.sleep(0)

    await asyncio.gather(*(turns.turn("a.test", ask, delay_s=1.0) for _ in range(20)))
    assert starts == [1000.0 + i for i in range(20)]


async def test_another_site_does_not_wait():
    time, starts = Time(), []
    turns = gate(time)

    async def ask():
        starts.append(time())

    for site in ("a.test", "b.test", "c.test"):
        await turns.turn(site, ask, delay_s=30.0)
    assert starts == [1000.0] * 3


@pytest.mark.parametrize(("limits", "peak"), [({"max_per_site": 2}, 2), ({"max_concurrent": 3}, 3)])
async def test_no_more_at_once_than_allowed(limits, peak):
    inside = most = 0
    turns = gate(Time(), **limits)

    async def ask():
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        for _ in range(5):
            await asyncio.sleep(0)
        inside -= 1

    await asyncio.gather(*(turns.turn("a.test", ask) for _ in range(30)))
    assert most == peak


async def answer():
    return "page"


async def test_a_held_site_is_waited_for_or_refused_by_the_length_of_it():
    time = Time()
    turns = gate(time)
    turns.hold("a.test", 60.0)
    turns.hold("a.test", 5.0)  # does not shorten the first
    assert await turns.turn("a.test", answer) == "page"
    assert time.now_s == 1060.0
    turns.hold("a.test", 61.0)
    refusal = await turns.turn("a.test", answer)
    assert (refusal.kind, refusal.retry_after_s, refusal.infrastructure) == (FailureKind.RATE_LIMITED, 61.0, True)
    assert await turns.turn("b.test", answer) == "page"


async def test_nobody_is_held_for_more_than_a_day():
    time = Time()
    turns = gate(time)
    turns.hold("a.test", 1e9)
    assert (await turns.turn("a.test", answer)).retry_after_s == 86_400


async def test_who_would_wait_too_long_is_refused_and_leaves_no_trace():
    never = asyncio.Event()
    turns = Gate(max_concurrent=1, max_per_site=1, max_wait_s=0.05)
    first = asyncio.create_task(turns.turn("a.test", never.wait))
    await asyncio.sleep(0)
    refusals = await asyncio.gather(*(turns.turn(site, answer) for site in ("a.test", "b.test", "b.test")))
    assert {refusal.kind for refusal in refusals} == {FailureKind.RATE_LIMITED}
    assert not first.done()  # the wait is limited, the answer is not
    never.set()
    assert await first is True
    assert [await turns.turn(site, answer) for site in ("a.test", "b.test")] == ["page"] * 2


async def test_a_timeout_of_the_question_passes_as_it_is():
    async def ask():
        raise TimeoutError("theirs")

    with pytest.raises(TimeoutError, match="theirs"):
        await gate(Time()).turn("a.test", ask)


async def test_cancelled_at_any_moment_every_permit_comes_back():
    for moment in range(12):
        turns = Gate(max_concurrent=1, max_per_site=1, max_wait_s=60.0)

        async def ask():
            for _ in range(3):
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(turns.turn("a.test", ask)) for _ in range(3)]
        for _ in range(moment):
            await asyncio.sleep(0)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert await asyncio.wait_for(turns.turn("a.test", answer), 5) == "page"


async def test_idle_sites_are_forgotten_and_held_ones_are_not(monkeypatch):
    monkeypatch.setattr(politeness, "_SWEEP_SITES", 10)
    turns = gate(Time())
    turns._sweep_at = 10
    turns.hold("held.test", 500.0)
    for i in range(100):
        await turns.turn(f"{i}.test", answer)
    assert len(turns._sites) <= 11
    assert isinstance(await turns.turn("held.test", answer), Failure)


@pytest.mark.parametrize("name", ["min_delay_s", "max_crawl_delay_s"])
def test_bad_manners_are_a_config_error(name):
    with pytest.raises(ConfigError, match=f"manners.{name}: -1"):
        Manners(**{name: -1})


def page(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: text/plain", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def polite(*servers, **manners) -> Fetcher:
    hosts = {f"{name}.test": ("127.0.0.1", server.port) for name, server in zip("ab", servers, strict=False)}
    manners = {"min_delay_s": 0.0, "toward_hosts": True} | manners
    return Fetcher(hosts=hosts, limits=Limits(max_wait_s=2.0, backoff_s=1e-3), manners=Manners(**manners))


def asked(server):
    return [request.split()[1].decode() for request in server.requests]


async def test_robots_are_asked_before_the_first_page_and_once(serve):
    server = await serve(page(b"User-agent: *\nDisallow: /no"), page(b"ok"))
    async with polite(server) as fetcher:
        answers = [await fetcher.fetch(f"http://a.test/{path}") for path in ("yes", "no", "more")]
    assert [getattr(answer, "body", None) for answer in answers] == [b"ok", None, b"ok"]
    assert answers[1].kind is FailureKind.ROBOTS
    assert not answers[1].infrastructure
    assert asked(server) == ["/robots.txt", "/yes", "/more"]


async def test_a_redirect_to_a_site_that_says_no_stops_there(serve):
    second = await serve(page(b"User-agent: *\nDisallow: /"))
    first = await serve(page(b""), page(b"", "302 Found", "Location: http://b.test/x"))
    async with polite(first, second) as fetcher:
        assert (await fetcher.fetch("http://a.test/")).kind is FailureKind.ROBOTS
    assert asked(second) == ["/robots.txt"]


async def test_a_crawl_delay_is_kept_up_to_the_cap(serve):
    server = await serve(page(b"User-agent: *\nCrawl-delay: 900"), page(b"ok"))
    async with polite(server, max_crawl_delay_s=0.1) as fetcher:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        assert [(await fetcher.fetch(f"http://a.test/{i}")).body for i in range(3)] == [b"ok"] * 3
        assert loop.time() - started_s >= 0.2  # a lower bound: two delays lie between three starts


async def test_ones_own_hosts_are_asked_without_ceremony(serve):
    server = await serve(page(b"ok"))
    async with Fetcher(hosts={"a.test": ("127.0.0.1", server.port)}) as fetcher:
        assert [(await fetcher.fetch(f"http://a.test/{i}")).body for i in range(3)] == [b"ok"] * 3
    assert asked(server) == ["/0", "/1", "/2"]


async def test_robots_can_be_turned_off(serve):
    server = await serve(page(b"ok"))
    async with polite(server, robots=False) as fetcher:
        assert (await fetcher.fetch("http://a.test/")).body == b"ok"
    assert asked(server) == ["/"]


async def test_fetchers_on_several_hosts_keep_the_delay_together(serve):
    server = await serve(page(b""), page(b"ok"))
    async with polite(server, min_delay_s=0.02, pipelines=5) as fetcher:
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        assert [(await fetcher.fetch(f"http://a.test/{i}")).body for i in range(3)] == [b"ok"] * 3
        assert loop.time() - started_s >= 0.2  # a lower bound: two delays of 5 x 0.02 s


def test_there_is_at_least_one_pipeline():
    with pytest.raises(ConfigError, match="pipelines: 0 is less than 1"):
        Manners(pipelines=0)


async def test_requests_that_begin_at_once_leave_the_event_loop_its_turn(monkeypatch):
    monkeypatch.setattr(politeness, "_TURN_S", 0.0)  # no start is so short
    gate = Gate(max_concurrent=20, max_per_site=20, max_wait_s=10.0)
    turns_of_the_loop, starts = 0, []

    async def count():
        nonlocal turns_of_the_loop
        while True:
            turns_of_the_loop += 1
            await asyncio.sleep(0)

    async def ask():
        starts.append(turns_of_the_loop)

    counting = asyncio.create_task(count())
    await asyncio.gather(*(gate.turn(f"{i % 2}.test", ask) for i in range(20)))
    counting.cancel()
    assert max(collections.Counter(starts).values()) == 1


async def test_requests_that_begin_at_once_share_a_turn_of_the_event_loop_while_it_is_short(monkeypatch):
    monkeypatch.setattr(politeness, "_TURN_S", 60.0)
    gate = Gate(max_concurrent=20, max_per_site=20, max_wait_s=10.0)
    tasks = [asyncio.create_task(gate.turn("a.test", answer)) for _ in range(20)]
    await asyncio.sleep(0)
    assert all(task.done() for task in tasks)
    assert [task.result() for task in tasks] == ["page"] * 20
