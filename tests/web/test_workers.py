from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import FailureKind, Page
from dr_jax.web import workers
from dr_jax.web.page import Response, extract
from dr_jax.web.workers import ParseLimits, ParserPool

HTML = b"<title>T</title><h1>Ada</h1><p>Born in <a href='/t'>Tarn</a>. \xf0\x9f\xa6\x89"
PAGE = Response("http://a.test/", "text/html; charset=utf-8", HTML)
# 1000 fonts left open and cloned into every paragraph: the scan is passed by in these tests, the parser meets it.
FONTS = "<p>" + "".join(f"<font color={i}>" for i in range(1000)) + "<p>x" * 20_000


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if workers.__name__ in child.cmdline()]


@pytest.fixture
def no_scan(tmp_path, monkeypatch):
    """Workers whose scan lets everything pass, as it would let a bomb pass that it does not know."""
    (tmp_path / "sitecustomize.py").write_text("import dr_jax.web.scan as scan\nscan.excess = lambda html: None\n")
    monkeypatch.syspath_prepend(tmp_path)


async def test_a_worker_reads_as_the_parser_does():
    async with ParserPool(2) as pool:
        assert await pool.extract(PAGE) == extract(PAGE)
        assert await pool.extract(Response("u", "", b"")) == extract(Response("u", "", b""))
        long = Response("http://a.test/", "text/html", b"<p>Five words are in here.</p>" * 9000)
        assert await pool.extract(long, max_segment_chars=300) == extract(long, max_segment_chars=300)
        many = await asyncio.gather(*(pool.extract(Response(str(i), "", b"<p>x" + b"%d" % i)) for i in range(40)))
        assert [page.segments[0] for page in many] == [f"x{i}" for i in range(40)]
        assert len(children()) == 2
    assert children() == []


@pytest.mark.parametrize(
    "limits", [ParseLimits(cpu_s=30, memory_bytes=400 << 20), ParseLimits(cpu_s=0.3)], ids=["memory", "time"]
)
async def test_a_bomb_costs_its_own_page_alone(no_scan, limits):
    fonts = Response("http://bomb.test/", "text/html", FONTS.encode())
    deep = Response("http://bomb.test/", "text/html", b"<div>" * 60_000)
    bomb = fonts if limits.cpu_s == 30 else deep
    async with ParserPool(2, limits) as pool:
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        results = await asyncio.gather(*(pool.extract(page) for page in (PAGE, bomb, PAGE, PAGE, bomb, PAGE)))
        ticking.cancel()
        assert [getattr(result, "kind", "page") for result in results] == [
            *("page", FailureKind.PARSE_LIMIT, "page", "page", FailureKind.PARSE_LIMIT, "page")
        ]
        assert {results[1].detail, results[4].detail} <= {"the parser ended, out of time or memory", "SelectolaxError"}
        assert ticks > 100  # the loop was free all the time


async def test_a_worker_that_crashes_is_replaced():
    async with ParserPool(1) as pool:
        assert isinstance(await pool.extract(PAGE), Page)
        (first,) = children()
        first.suspend()
        waiting = asyncio.create_task(pool.extract(PAGE))
        while not pool._free.empty():  # noqa: ASYNC110
            await asyncio.sleep(0)
        os.kill(first.pid, signal.SIGSEGV)
        first.resume()
        assert (await waiting).kind is FailureKind.PARSE_LIMIT
        assert await pool.extract(PAGE) == extract(PAGE)
        (second,) = children()
        assert second.pid != first.pid


async def test_a_page_that_found_no_process_is_not_to_blame():
    async with ParserPool(1) as pool:
        await pool.extract(PAGE)
        (first,) = children()
        os.kill(first.pid, signal.SIGKILL)
        assert (await pool.extract(PAGE)).kind is FailureKind.PARSE_LIMIT
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))  # no pipe can be opened
        try:
            failure = await pool.extract(PAGE)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert failure.kind is FailureKind.OVERLOADED
        assert failure.infrastructure
        assert await pool.extract(PAGE) == extract(PAGE)


async def test_a_worker_that_ends_before_its_first_page_is_not_the_pages_fault():
    async with ParserPool(1) as pool:
        (first,) = children()
        first.suspend()  # before it has said that it is ready: its imports take longer than this
        os.kill(first.pid, signal.SIGKILL)
        assert (await pool.extract(PAGE)).kind is FailureKind.OVERLOADED
        assert await pool.extract(PAGE) == extract(PAGE)


async def test_a_pool_that_cannot_be_entered_leaves_no_process():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 12, hard))  # enough for some workers, not for 16
    try:
        with pytest.raises(OSError, match="Too many open files"):
            async with ParserPool(16):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not children()


async def test_a_call_that_is_cancelled_leaves_no_answer_for_the_next():
    async with ParserPool(1) as pool:
        await pool.extract(PAGE)
        (first,) = children()
        first.suspend()
        call = asyncio.create_task(pool.extract(Response("http://other.test/", "", b"<p>other")))
        while not pool._free.empty():  # noqa: ASYNC110
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await pool.extract(PAGE) == extract(PAGE)


async def test_a_worker_is_renewed_after_many_pages(monkeypatch):
    monkeypatch.setattr(workers, "_RECYCLE_PAGES", 2)
    async with ParserPool(1) as pool:
        pids = set()
        for _ in range(6):
            assert isinstance(await pool.extract(PAGE), Page)
            pids |= {child.pid for child in children()}
        assert len(pids) == 3


async def test_a_worker_holds_no_key_of_ours(monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "canary")
    async with ParserPool(1) as pool:
        await pool.extract(PAGE)
        (child,) = children()
        assert "canary" not in str(child.environ())
        assert child.cwd() == "/"


def test_what_a_worker_imports():
    loaded = "import sys, dr_jax.web.workers; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    names = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout.split()
    assert "selectolax" in names
    assert not {"jax", "jaxlib", "aiohttp", "yarl", "transformers"} & set(names)


def test_workers_die_with_their_parent():
    script = """
        import asyncio, sys, psutil
        from dr_jax.web.workers import ParserPool
        async def main():
            async with ParserPool(2):
                print(*(child.pid for child in psutil.Process().children()), flush=True)
                await asyncio.Event().wait()
        asyncio.run(main())
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    workers_left = [psutil.Process(pid) for pid in pids]
    parent.kill()
    parent.communicate()
    assert len(pids) == 2
    assert psutil.wait_procs(workers_left, timeout=30)[1] == []


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: ParserPool(0), "size"),
        (lambda: ParseLimits(cpu_s=0), "cpu_s"),
        (lambda: ParseLimits(memory_bytes=1), "memory_bytes"),
    ],
)
def test_limits_that_cannot_work_are_refused(make, field):
    with pytest.raises(ConfigError, match=field):
        make()
