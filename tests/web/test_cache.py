from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind, Hit, Page
from dr_jax.web.cache import Cache, CachedBrowser, CachedSearcher, _decode, _encode
from dr_jax.web.fetch import Fetcher, Limits
from dr_jax.web.http import open_session
from dr_jax.web.search import open_search
from dr_jax.web.visit import Visitor

HITS = (Hit("Tïtle", "https://a.test/", "snippet"),)
MISSING = Failure(FailureKind.STATUS, "HTTP 404", 404)
DAY_S = 86_400


class Clock:
    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Source:
    """Answers in turn, the last one for ever; waits at `gate` where there is one."""

    def __init__(self, *answers, gate: asyncio.Event | None = None):
        self.answers, self.asked, self.gate, self.begun = list(answers), 0, gate, asyncio.Event()

    async def __call__(self):
        self.asked += 1
        self.begun.set()
        if self.gate:
            await self.gate.wait()
        return self.answers[min(self.asked, len(self.answers)) - 1]


async def ask(cache, source, q="q"):
    return await cache.through({"kind": "search", "q": q}, source)


async def test_a_good_answer_is_asked_for_once_a_week(tmp_path):
    clock, source = Clock(), Source(HITS, ())
    async with Cache(tmp_path / "c.sqlite", clock=clock) as cache:
        assert [await ask(cache, source) for _ in range(3)] == [HITS] * 3
    clock.now_s += 7 * DAY_S - 1
    async with Cache(tmp_path / "c.sqlite", clock=clock) as cache:  # another process, later
        assert await ask(cache, source) == HITS
        assert cache.stats() == {"hits": 1, "misses": 0, "shared": 0, "errors": 0}
        clock.now_s += 1
        assert await ask(cache, source) == ()
        assert cache.stats() == {"hits": 1, "misses": 1, "shared": 0, "errors": 0}
    assert source.asked == 2


async def test_requests_are_equal_whatever_the_order_of_their_keys(tmp_path):
    source = Source(HITS, ())
    async with Cache(tmp_path / "c.sqlite") as cache:
        assert await cache.through({"a": 1, "b": "ü"}, source) == HITS
        assert await cache.through({"b": "ü", "a": 1}, source) == HITS
        assert await cache.through({"b": "ü", "a": 2}, source) == ()


async def test_an_honest_no_is_kept_for_ten_minutes(tmp_path):
    clock, source = Clock(), Source(MISSING, HITS)
    async with Cache(tmp_path / "c.sqlite", clock=clock) as cache:
        assert await ask(cache, source) == MISSING
        clock.now_s += 599
        assert await ask(cache, source) == MISSING
        clock.now_s += 1
        assert await ask(cache, source) == HITS


@pytest.mark.parametrize("mode", ["live", "record"])
@pytest.mark.parametrize("kind", [kind for kind in FailureKind if Failure(kind).infrastructure])
async def test_an_outage_is_never_kept(tmp_path, mode, kind):
    source = Source(Failure(kind), Failure(FailureKind.STATUS, status=503), HITS)
    async with Cache(tmp_path / "c.sqlite", mode) as cache:
        assert (await ask(cache, source)).infrastructure
        assert (await ask(cache, source)).infrastructure
        assert await ask(cache, source) == HITS


async def test_half_an_answer_is_kept_on_a_tape_only(tmp_path):
    cut = Failure(FailureKind.TRUNCATED)
    for mode, again in (("live", HITS), ("record", cut)):
        source = Source(cut, HITS)
        async with Cache(tmp_path / mode, mode) as cache:
            assert await ask(cache, source) == cut
            assert await ask(cache, source) == again


async def test_a_tape_is_replayed_for_ever_and_asks_nobody(tmp_path):
    clock, forbidden = Clock(), Source()
    async with Cache(tmp_path / "tape", "record", clock=clock) as cache:
        await ask(cache, Source(HITS), "found")
        await ask(cache, Source(MISSING), "missing")
        await ask(cache, Source(()), "nothing")
    clock.now_s += 5000 * DAY_S
    for mode in ("replay", "live", "replay"):
        async with Cache(tmp_path / "tape", mode, clock=clock) as cache:
            assert await ask(cache, forbidden, "found") == HITS
            assert await ask(cache, forbidden, "missing") == MISSING
            assert await ask(cache, forbidden, "nothing") == ()
    async with Cache(tmp_path / "tape", "replay", clock=clock) as cache:
        assert (await ask(cache, forbidden, "new")).kind is FailureKind.NOT_RECORDED
        assert cache.stats() == {"hits": 0, "misses": 1, "shared": 0, "errors": 0}
    assert forbidden.asked == 0


@pytest.mark.parametrize("column", ["value", "hash", "expires_s", "key"])
async def test_an_entry_that_was_changed_is_a_miss(tmp_path, column, caplog):
    """One flipped bit, an entry that lives longer than it should, or one that answers another request."""
    path = tmp_path / "c.sqlite"
    async with Cache(path) as cache:
        await ask(cache, Source(HITS), "other")
    with sqlite3.connect(path) as db:
        (other_key,) = db.execute("SELECT key FROM entry").fetchone()
    async with Cache(path) as cache:
        await ask(cache, Source(HITS))
    with sqlite3.connect(path) as db:
        if column == "key":
            db.execute("DELETE FROM entry WHERE key = ?", (other_key,))
            db.execute("UPDATE entry SET key = ?", (other_key,))
        elif column == "expires_s":
            db.execute("UPDATE entry SET expires_s = expires_s + 1")
        else:
            blobs = db.execute(f"SELECT key, {column} FROM entry").fetchall()
            for key, blob in blobs:
                flipped = blob[:-1] + bytes([blob[-1] ^ 1])
                db.execute(f"UPDATE entry SET {column} = ? WHERE key = ?", (flipped, key))
    db.close()
    source = Source(())
    async with Cache(path) as cache:
        assert await ask(cache, source, "other") == ()
        assert cache.stats() == {"hits": 0, "misses": 1, "shared": 0, "errors": 1}
        assert await ask(cache, source, "other") == ()
    assert source.asked == 1
    assert "does not match its hash" in caplog.text


async def test_concurrent_equal_requests_are_asked_once(tmp_path):
    source = Source(HITS, gate=asyncio.Event())
    async with Cache(tmp_path / "c.sqlite") as cache:
        asks = [asyncio.create_task(ask(cache, source)) for _ in range(20)]
        await asyncio.sleep(0)
        source.gate.set()
        assert await asyncio.gather(*asks) == [HITS] * 20
        assert cache.stats() == {"hits": 0, "misses": 1, "shared": 19, "errors": 0}
    assert source.asked == 1


async def test_a_cancelled_leader_does_not_fail_its_followers(tmp_path):
    source = Source(HITS, gate=asyncio.Event())
    async with Cache(tmp_path / "c.sqlite") as cache:
        leader = asyncio.create_task(ask(cache, source))
        await source.begun.wait()
        followers = [asyncio.create_task(ask(cache, source)) for _ in range(3)]
        await asyncio.sleep(0)
        leader.cancel()
        followers[0].cancel()
        source.gate.set()
        results = await asyncio.gather(leader, *followers, return_exceptions=True)
        assert [type(r) for r in results[:2]] == [asyncio.CancelledError] * 2
        assert results[2:] == [HITS] * 2
    assert source.asked == 1


async def test_the_last_to_leave_stops_the_work_and_the_next_begins_anew(tmp_path):
    begun, stopped, source = asyncio.Event(), asyncio.Event(), Source(HITS)

    async def hang():
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    async with Cache(tmp_path / "c.sqlite") as cache:
        waiters = [asyncio.create_task(ask(cache, hang)) for _ in range(2)]
        await begun.wait()
        for waiter in waiters:
            waiter.cancel()
        await asyncio.gather(*waiters, return_exceptions=True)
        assert await ask(cache, source) == HITS
        await stopped.wait()
        assert len(asyncio.all_tasks()) == 1


async def test_closing_stops_what_is_in_flight(tmp_path):
    threads = threading.active_count()
    source = Source(HITS, gate=asyncio.Event())
    async with Cache(tmp_path / "c.sqlite") as cache:
        waiter = asyncio.create_task(ask(cache, source))
        await source.begun.wait()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert threading.active_count() == threads


async def test_a_full_disk_costs_the_cache_and_not_the_run(tmp_path, caplog):
    async with Cache(tmp_path / "c.sqlite") as cache:
        await cache._in_thread(cache._store._db.execute, "PRAGMA max_page_count=1")
        page = Page("http://a.test/", "t", (os.urandom(40_000).hex(),))
        source = Source(page)
        assert await ask(cache, source) == page
        assert await ask(cache, source) == page
        assert cache.stats() == {"hits": 0, "misses": 2, "shared": 0, "errors": 2}
    assert caplog.text.count("full") == 1


async def test_two_processes_share_one_file(tmp_path):
    async with Cache(tmp_path / "c.sqlite") as one, Cache(tmp_path / "c.sqlite") as two:
        sources = [Source((Hit(str(i), "https://a.test/", ""),)) for i in range(20)]
        await asyncio.gather(*(ask((one, two)[i % 2], source, str(i)) for i, source in enumerate(sources)))
        for i in range(20):
            assert (await ask((two, one)[i % 2], Source(MISSING), str(i)))[0].title == str(i)
        assert one.stats()["errors"] == two.stats()["errors"] == 0


WRITER = """
import asyncio, sys
from dr_jax.records import Hit
from dr_jax.web.cache import Cache

async def main():
    async with Cache(sys.argv[1]) as cache:
        for i in range(10**6):
            async def ask(i=i):
                return (Hit(str(i), "https://a.test/", "x" * 5000),)
            await cache.through({"kind": "search", "q": str(i)}, ask)
            print(i, flush=True)

asyncio.run(main())
"""


def write_until_killed(path, after: int) -> int:
    """The last entry that a process has said to have written when it was killed."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
    written = [int(writer.stdout.readline()) for _ in range(after)]
    writer.kill()
    writer.communicate()
    return written[-1]


@pytest.mark.parametrize("after", [1, 20])
async def test_a_writer_that_is_killed_leaves_whole_entries(tmp_path, after):
    last = write_until_killed(tmp_path / "c.sqlite", after)
    async with Cache(tmp_path / "c.sqlite") as cache:
        for i in range(last + 1):
            found = await ask(cache, Source(MISSING), str(i))
            assert found == (Hit(str(i), "https://a.test/", "x" * 5000),)
        assert cache.stats()["errors"] == 0


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUES = st.one_of(
    st.builds(
        Failure, st.sampled_from(FailureKind), TEXT, st.none() | st.integers(100, 599), st.none() | st.floats(0, 1e6)
    ),
    st.lists(st.builds(Hit, TEXT, TEXT, TEXT), max_size=4).map(tuple),
    st.builds(
        Page, TEXT, TEXT, st.lists(TEXT, max_size=4).map(tuple), st.lists(st.tuples(TEXT, TEXT), max_size=3).map(tuple)
    ),
)


@settings(deadline=None)
@given(VALUES)
def test_every_value_survives_the_file(value):
    assert _decode(_encode(value)) == value


def test_config_errors(tmp_path):
    with pytest.raises(ConfigError, match="cache.mode: 'offline' is not one of live, record, replay"):
        Cache(tmp_path / "c", "offline")
    with pytest.raises(ConfigError, match="nothing to replay at .*; run with cache.mode='record' first"):
        Cache(tmp_path / "c", "replay")
    (tmp_path / "notes.txt").write_text("my notes " * 999)
    with pytest.raises(ConfigError, match="cannot be used as a cache"):
        Cache(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "my notes " * 999
    with pytest.raises(ConfigError, match="cannot be used as a cache"):
        Cache(tmp_path / "no" / "such" / "folder")


async def test_a_segment_holds_something(tmp_path):
    async with Cache(tmp_path / "c") as cache:
        with pytest.raises(ConfigError, match="max_segment_chars: 0 is less than 1"):
            CachedBrowser(Visitor(Fetcher()), cache, max_segment_chars=0)


def http(body: bytes, type: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Type: {type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_a_recorded_session_is_replayed_without_a_network(serve, tmp_path):
    web = await serve(http(b"<title>T</title><main><h1>Ada</h1><p>Born in <a href=/t>Tarn</a>.</main>", "text/html"))
    engine = await serve(http(b'{"organic":[{"title":"Ada","link":"http://site.test/a","snippet":"s"}]}', "text/json"))
    hosts = {"site.test": ("127.0.0.1", web.port), "search.test": ("127.0.0.1", engine.port)}

    async def session(mode):
        limits = Limits(retries=0)
        async with (
            Cache(tmp_path / "tape", mode) as cache,
            open_session(hosts=hosts) as api,
            Fetcher(hosts=hosts, limits=limits) as fetcher,
        ):
            search = CachedSearcher(
                open_search("serper", api, api_key="k", endpoint="http://search.test/search"), cache
            )
            browser = CachedBrowser(Visitor(fetcher), cache)
            hits = await search.search("ada", top_k=5)
            pages = [await browser.browse(url) for url in (hits[0].url, hits[0].url + "#x", "http://localhost/", "]")]
            return hits, pages, await search.search(" ada\n", top_k=5), cache.stats()

    recorded = await session("record")
    assert recorded[1][0] == Page(
        "http://site.test/a", "T", ("# Ada\nBorn in Tarn.",), (("Tarn", "http://site.test/t"),), ("Ada",)
    )
    assert [getattr(page, "kind", None) for page in recorded[1]] == [
        None,
        None,
        FailureKind.BLOCKED,
        FailureKind.BAD_URL,
    ]
    assert recorded[3] == {"hits": 2, "misses": 4, "shared": 0, "errors": 0}
    assert (web.connections, engine.connections) == (1, 1)
    replayed = await session("replay")
    assert replayed[:3] == recorded[:3]
    assert replayed[3] == {"hits": 6, "misses": 0, "shared": 0, "errors": 0}
    assert (web.connections, engine.connections) == (1, 1)


async def test_a_browser_extracts_with_what_it_is_given(serve, tmp_path):
    web = await serve(http(b"<h1>Ada</h1>", "text/html"))
    hosts = {"site.test": ("127.0.0.1", web.port)}

    async def refuse(response, *, max_segment_chars):
        return Failure(FailureKind.PARSE_LIMIT, f"{response.body.decode()} {max_segment_chars}")

    async with Cache(tmp_path / "c") as cache, Fetcher(hosts=hosts) as fetcher:
        browser = CachedBrowser(Visitor(fetcher, extract=refuse), cache, max_segment_chars=7)
        assert (await browser.browse("http://site.test/")).detail == "<h1>Ada</h1> 7"


async def test_what_decides_an_answer_is_in_its_key(serve, tmp_path):
    web = await serve(http(b"<p>" + b"A sentence of a page. " * 200, "text/html"))
    engine = await serve(http(b'{"organic":[]}', "text/json"))
    hosts = {"site.test": ("127.0.0.1", web.port), "search.test": ("127.0.0.1", engine.port)}
    async with Cache(tmp_path / "c") as cache, open_session(hosts=hosts) as api, Fetcher(hosts=hosts) as fetcher:
        small = await CachedBrowser(Visitor(fetcher), cache, max_segment_chars=500).browse("http://site.test/")
        large = await CachedBrowser(Visitor(fetcher), cache, max_segment_chars=5000).browse("http://site.test/")
        assert (len(small.segments), len(large.segments)) == (10, 1)
        for region in ("us", "de"):
            client = open_search("serper", api, api_key="k", endpoint="http://search.test/", region=region)
            for top_k in (3, 5):
                await CachedSearcher(client, cache).search("q", top_k=top_k)
    assert (web.connections, engine.connections) == (2, 4)
