from __future__ import annotations

import asyncio

import pytest

from dr_jax.records import FailureKind
from dr_jax.web.budget import Allowance, Budget, Spent
from dr_jax.web.fetch import Fetcher, Limits
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.visit import MeteredVisitor, Settings, Visitor, open_visitor


def page(body: bytes) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def visit(server, budget, *urls, max_bytes=1000, timeout_s=None):
    hosts = {"site.test": ("127.0.0.1", server.port)}
    async with Fetcher(hosts=hosts, limits=Limits(max_bytes=max_bytes, retries=0)) as fetcher:
        metered = MeteredVisitor(Visitor(fetcher), budget, max_bytes=max_bytes)
        async with asyncio.timeout(timeout_s):
            return await asyncio.gather(*(metered.visit(url) for url in urls))


async def test_pages_are_counted_in_bytes(serve):
    budget = Budget()
    server = await serve(page(b"x" * 300), b"HTTP/1.1 404 N\r\nContent-Length: 0\r\n\r\n")
    (visited,) = await visit(server, budget, "http://site.test/")
    (failed,) = await visit(server, budget, "http://site.test/")
    assert (visited.answer.segments, visited.bytes) == (("x" * 300,), 300)
    assert (failed.answer.status, failed.bytes) == (404, 0)
    assert budget.run == Spent(2, 300, 0.0)


async def test_pages_under_way_cannot_overspend_together(serve):
    budget = Budget(Allowance(bytes=2500))
    server = await serve(page(b"x" * 900))
    answers = await visit(server, budget, *["http://site.test/"] * 5)
    assert [getattr(one.answer, "kind", None) for one in answers] == [None] * 2 + [FailureKind.QUOTA_EXHAUSTED] * 3
    assert (server.connections, budget.run.bytes) == (2, 1800)


async def test_a_page_given_up_gives_its_reservation_back(serve):
    async def silent(reader, writer):
        await reader.read()

    budget = Budget(Allowance(bytes=1000))
    with pytest.raises(TimeoutError):
        await visit(await serve(silent), budget, "http://site.test/", timeout_s=0.05)
    assert budget.run == Spent(1, 0, 0.0)


async def test_an_open_visitor_reads_in_parser_processes_and_keeps_its_settings(serve):
    server = await serve(page(b"<h1>Ada</h1>"))
    settings = Settings(
        AddressPolicy(blocked_domains=frozenset({"evil.example"})), {"site.test": ("127.0.0.1", server.port)},
        contact="me@example.org",
    )  # fmt: skip
    async with open_visitor(settings) as visitor:
        visited = await visitor.visit("http://site.test/")
        blocked = await visitor.visit("http://evil.example/")
    assert visited.answer.segments == ("# Ada",)
    assert b"me@example.org" in server.requests[0]
    assert blocked.answer.kind is FailureKind.BLOCKLISTED
