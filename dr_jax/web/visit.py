"""One page, from its URL to its text, and what it weighed: what a browser asks for, whoever carries it out.

`open_visitor` does it with this host's own fetcher and parser processes; `ray_workers` has other machines do so."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Mapping
from typing import Protocol

from dr_jax.records import Failure, Page
from dr_jax.web.budget import PAGE, Budget
from dr_jax.web.fetch import Fetcher, Limits
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.page import Response, extract
from dr_jax.web.politeness import Manners
from dr_jax.web.workers import ParserPool


@dataclasses.dataclass(frozen=True)
class Visit:
    """What came of one URL."""

    answer: Page | Failure
    bytes: int = 0  # of the body, decoded


class Visits(Protocol):
    """URL -> text. Never raises, whatever the URL, the server or the page does; cancellation passes."""

    async def visit(self, url: str, *, max_segment_chars: int) -> Visit: ...


class Fetches(Protocol):
    """`fetch.Fetcher`."""

    async def fetch(self, url: str) -> Response | Failure: ...


class Extract(Protocol):
    """Bytes -> text off the event loop: `ParserPool.extract`, or `extract_in_thread`."""

    async def __call__(self, response: Response, *, max_segment_chars: int) -> Page | Failure: ...


async def extract_in_thread(response: Response, *, max_segment_chars: int) -> Page | Failure:
    """For pages that we wrote ourselves: nothing can stop a thread that a hostile page keeps busy."""
    return await asyncio.to_thread(extract, response, max_segment_chars=max_segment_chars)


class Visitor:
    """Visits with a fetcher and a parser of this process's own."""

    def __init__(self, fetcher: Fetches, *, extract: Extract = extract_in_thread):
        self._fetcher, self._extract = fetcher, extract

    async def visit(self, url: str, *, max_segment_chars: int = 4000) -> Visit:
        return await self.read(await self._fetcher.fetch(url), max_segment_chars=max_segment_chars)

    async def read(self, response: Response | Failure, *, max_segment_chars: int) -> Visit:
        """The visit whose fetch ended with `response`."""
        if isinstance(response, Failure):
            return Visit(response)
        return Visit(await self._extract(response, max_segment_chars=max_segment_chars), len(response.body))


class MeteredVisitor:
    """A visitor that asks the budget first. It stands behind the cache, so a page that is remembered is free.

    `max_bytes`: what one page can weigh (`fetch.Limits.max_bytes`), reserved until the page is here."""

    def __init__(self, visitor: Visits, budget: Budget, *, max_bytes: int):
        self._visitor, self._budget, self._max_bytes = visitor, budget, max_bytes

    async def visit(self, url: str, *, max_segment_chars: int = 4000) -> Visit:
        refused = self._budget.take(PAGE, self._max_bytes)
        if refused:
            return Visit(refused)
        used = 0
        try:
            visit = await self._visitor.visit(url, max_segment_chars=max_segment_chars)
            used = visit.bytes
        finally:  # cancelled too
            self._budget.add_bytes(used - self._max_bytes)
        return visit


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a visitor is opened with, wherever it runs; each as `fetch.Fetcher` takes it."""

    policy: AddressPolicy = AddressPolicy()
    hosts: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)
    limits: Limits = Limits()
    manners: Manners = Manners()
    contact: str = ""


def make_fetcher(settings: Settings) -> Fetcher:
    """The fetcher of `settings`, to be entered."""
    return Fetcher(
        settings.policy, settings.hosts, limits=settings.limits, manners=settings.manners, contact=settings.contact
    )


@contextlib.asynccontextmanager
async def open_visitor(settings: Settings) -> AsyncIterator[Visitor]:
    """A visitor with parser processes of its own."""
    async with ParserPool() as parsers, make_fetcher(settings) as fetcher:
        yield Visitor(fetcher, extract=parsers.extract)
