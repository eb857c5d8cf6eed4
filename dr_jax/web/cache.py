"""What the web said, kept in a store: a cache (`live`), or a tape to make (`record`) and to run from (`replay`).

Values are compressed JSON, never pickle, with a hash over key and content that is verified on every read: a flipped bit
is a miss. Failures of the infrastructure are never kept, so an outage is never remembered as an answer. The store is
asked in threads, so that the event loop never waits for it; a store that fails costs its entries, not the run.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import math
import pathlib
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.interfaces import Reader
from dr_jax.records import Failure, FailureKind, Hit, Page
from dr_jax.web import store
from dr_jax.web.breaker import Breaker
from dr_jax.web.page import EXTRACTOR, from_plain, to_plain
from dr_jax.web.store import Entry, StoreError
from dr_jax.web.text import clean_line
from dr_jax.web.visit import Visits

MODES = ("live", "record", "replay")


@dataclasses.dataclass(frozen=True)
class Extraction:
    """What a reader found in a page: (segment index, text), in reading order."""

    found: tuple[tuple[int, str], ...]


Value = tuple[Hit, ...] | Page | Extraction | Failure

_DAY_S = 86_400.0
_NEGATIVE_TTL_S = 600.0
_STORE, _STORE_REST_S = "store", 15.0  # how long a store that failed again and again is not asked
_BROKEN_ANSWER = frozenset({FailureKind.TRUNCATED, FailureKind.PROTOCOL_ERROR})  # likely gone at the next attempt
_log = logging.getLogger(__name__)


class Cache:
    """Answers by request. `live`: fresh entries are served, others asked for. `record`: the same, but kept for ever.
    `replay`: nothing is asked for; what the store does not hold is `Failure(NOT_RECORDED)`.

    `path`: an SQLite file, or the 'redis://host:port/number' that several hosts share (`store.open_store`).
    Concurrent equal requests of one cache are asked once (`shared` counts the others); two hosts may ask both."""

    def __init__(
        self,
        path: str | pathlib.Path,
        mode: str = "live",
        ttl_s: float = 7 * _DAY_S,
        *,
        password: str = "",
        clock: Callable[[], float] = time.time,
    ):
        if mode not in MODES:
            raise ConfigError(f"cache.mode: {mode!r} is not one of {', '.join(MODES)}")
        where = str(path)
        if mode == "replay" and not store.can_replay(where):
            raise ConfigError(f"cache.path: nothing to replay at {path}; run with cache.mode='record' first")
        self._mode, self._ttl_s, self._clock = mode, ttl_s, clock
        self._flights: dict[str, _Flight] = {}
        self._counts: collections.Counter[str] = collections.Counter()
        self._breaker = Breaker(threshold=2 * store.threads(where), cool_s=_STORE_REST_S)
        self._threads = concurrent.futures.ThreadPoolExecutor(store.threads(where), thread_name_prefix="web-cache")
        drop_before_s = 0.0 if mode == "replay" else clock()
        try:
            self._store = self._threads.submit(
                store.open_store, where, drop_before_s=drop_before_s, password=password
            ).result()
        except ConfigError:
            self._threads.shutdown()
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        flights = [flight.task for flight in self._flights.values()]
        for task in flights:
            task.cancel()
        await asyncio.gather(*flights, return_exceptions=True)
        await self._in_thread(self._store.close)
        self._threads.shutdown()

    def stats(self) -> dict[str, int]:
        """Requests so far: `hits`, `misses`, `shared` (joined one under way); `errors` of entries and of the store."""
        return {name: self._counts[name] for name in ("hits", "misses", "shared", "errors")}

    async def through(self, request: Mapping[str, Any], ask: Callable[[], Awaitable[Value]]) -> Value:
        """The kept answer to `request`, or what `ask` says, kept for the next time. `request` is plain JSON."""
        canonical = json.dumps(request, sort_keys=True, separators=(",", ":"))
        key = hashlib.sha256(canonical.encode()).hexdigest()
        if key not in self._flights:
            kept = await self._asked(self._get, key)
            if kept is not None:
                self._counts["hits"] += 1
                return kept
        flight = self._flights.get(key)  # one that has begun meanwhile, too
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.create_task(self._miss(key, ask)))
            flight.task.add_done_callback(lambda _: self._land(key, flight))
        else:
            self._counts["shared"] += 1
        # The work belongs to nobody who waits for it: a waiter that is cancelled leaves, the last one stops it.
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.task.done():
                self._land(key, flight)
                flight.task.cancel()

    def _land(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    async def _miss(self, key: str, ask: Callable[[], Awaitable[Value]]) -> Value:
        self._counts["misses"] += 1
        if self._mode == "replay":
            return Failure(FailureKind.NOT_RECORDED, "not on the tape")
        value = await ask()
        ttl_s = self._kept_for_s(value)
        if ttl_s > 0:
            await self._asked(self._put, key, value, self._clock() + ttl_s)
        return value

    def _kept_for_s(self, value: Value) -> float:
        if isinstance(value, Failure) and value.infrastructure:
            return 0.0
        if self._mode == "record":
            return math.inf
        if not isinstance(value, Failure):
            return self._ttl_s
        return 0.0 if value.kind in _BROKEN_ANSWER else min(_NEGATIVE_TTL_S, self._ttl_s)

    async def _asked(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work` of the store; None where it fails, or failed so often that it is left alone for a while."""
        if self._breaker.admit(_STORE):
            return None
        try:
            answer = await self._in_thread(work, *args)
        except StoreError as error:
            self._breaker.record(_STORE, failed=True)
            self._alarm(str(error))
            return None
        self._breaker.record(_STORE, failed=False)
        return answer

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *args)

    def _get(self, key: str) -> Value | None:
        entry = self._store.get(key)
        if entry is None or (self._mode != "replay" and entry.expires_s <= self._clock()):
            return None
        if entry.digest == _digest(key, entry.expires_s, entry.blob):
            return _decode(zlib.decompress(entry.blob))
        self._alarm("an entry does not match its hash")
        return None

    def _put(self, key: str, value: Value, expires_s: float) -> None:
        blob = zlib.compress(_encode(value), 3)
        self._store.put(key, Entry(expires_s, blob, _digest(key, expires_s, blob)))

    def _alarm(self, message: str) -> None:
        if not self._counts["errors"]:
            _log.warning("web cache: %s (counted as cache errors from now on)", message)
        self._counts["errors"] += 1


@dataclasses.dataclass
class _Flight:
    task: asyncio.Task[Value]
    waiters: int = 0


def _digest(key: str, expires_s: float, blob: bytes) -> bytes:
    return hashlib.sha256(f"{key} {expires_s!r} ".encode() + blob).digest()


def _encode(value: Value) -> bytes:
    match value:
        case Extraction(found):
            plain: dict[str, Any] = {"found": found}
        case Page() | Failure():
            plain = to_plain(value)
        case hits:
            plain = {"hits": [vars(hit) for hit in hits]}
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()


def _decode(blob: bytes) -> Value:
    match json.loads(blob):
        case {"found": found}:
            return Extraction(tuple((segment, text) for segment, text in found))
        case {"hits": hits}:
            return tuple(Hit(**hit) for hit in hits)
        case plain:
            return from_plain(plain)


class IdentifiedSearcher(Protocol):
    """A Searcher that can say what, besides the query, decides its results."""

    @property
    def identity(self) -> Mapping[str, str]: ...

    async def search(self, query: str, *, top_k: int) -> tuple[Hit, ...] | Failure: ...


class CachedSearcher:
    """A Searcher in front of another one."""

    def __init__(self, searcher: IdentifiedSearcher, cache: Cache):
        self._searcher, self._cache = searcher, cache

    async def search(self, query: str, *, top_k: int) -> tuple[Hit, ...] | Failure:
        request = {"kind": "search", **self._searcher.identity, "query": clean_line(query), "top_k": top_k}
        return await self._cache.through(request, lambda: self._searcher.search(query, top_k=top_k))


class CachedBrowser:
    """The Browser: has a page visited, and keeps its text."""

    def __init__(self, visitor: Visits, cache: Cache, *, max_segment_chars: int = 4000):
        if max_segment_chars < 1:
            raise ConfigError(f"max_segment_chars: {max_segment_chars} is less than 1; a few thousand is usual")
        self._visitor, self._cache, self._max_segment_chars = visitor, cache, max_segment_chars

    async def browse(self, url: str) -> Page | Failure:
        request = {
            "kind": "page", "url": _canonical(url), "extractor": EXTRACTOR, "segment": self._max_segment_chars,
        }  # fmt: skip
        return await self._cache.through(request, lambda: self._ask(url))

    async def _ask(self, url: str) -> Page | Failure:
        return (await self._visitor.visit(url, max_segment_chars=self._max_segment_chars)).answer


class CachedReader:
    """A Reader in front of another one, whose answers depend on what it is asked alone: an endpoint at temperature 0,
    never a policy, which changes with its weights. `identity`: what, besides the request, decides the answer."""

    def __init__(self, reader: Reader, cache: Cache, *, identity: Mapping[str, str]):
        self._reader, self._cache, self._identity = reader, cache, dict(identity)

    async def read(
        self, page: Page, *, question: str, query: str, notes: Sequence[str]
    ) -> tuple[tuple[int, str], ...] | Failure:
        async def ask() -> Extraction | Failure:
            found = await self._reader.read(page, question=question, query=query, notes=notes)
            return found if isinstance(found, Failure) else Extraction(found)

        content = json.dumps([page.title, page.segments, page.headings]).encode()
        request = {
            "kind": "extraction", "reader": self._identity, "page": hashlib.sha256(content).hexdigest(),
            "question": question, "query": query, "notes": list(notes),
        }  # fmt: skip
        value = await self._cache.through(request, ask)
        return value if isinstance(value, Failure) else value.found


def _canonical(url: str) -> str:
    """One spelling for URLs that ask for the same page; as it is where it is no URL at all."""
    try:
        return str(URL(url.strip()).with_fragment(None))
    except (ValueError, IndexError, AssertionError, TypeError):
        return clean_line(url)
