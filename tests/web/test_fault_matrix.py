"""Faults of the outside world, one row each: what comes back is exactly the value named here, nothing raises, and the
limits on time hold. Rows that other test files own are listed with them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import pathlib
import resource
import socket
import threading
import time

import pytest

from dr_jax.records import Failure, FailureKind, Page
from dr_jax.web.cache import Cache, CachedBrowser
from dr_jax.web.fetch import Fetcher, Limits
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.http import Timeouts
from dr_jax.web.page import Response, extract
from dr_jax.web.politeness import Manners
from dr_jax.web.visit import Visitor
from tests.web import fault_server
from tests.web.fault_server import CHUNKED, HEAD, forever, http, redirect, silent, then_reset

K = FailureKind
OK = None  # no failure: a page
LIMITS = Limits(
    max_bytes=100_000,
    max_wait_s=1.0,
    backoff_s=1e-3,
    timeouts=Timeouts(dns_s=0.3, response_s=0.5, idle_s=0.5, total_s=1.0),
)
HANG_S = 30.0  # far more than any of the limits above allows: who is still there hangs

ELSEWHERE = {
    13: "tests/agent/test_tools.py::test_a_url_that_no_search_returned_is_not_fetched",
    14: "tests/agent/test_tools.py::test_a_turn_that_says_nothing_valid",
    15: "tests/agent/test_tools.py::test_a_query_that_cannot_be_sent_is_not_sent",
    16: "tests/agent/test_tools.py::test_only_the_control_id_opens_a_call",
    36: "tests/web/test_fetch.py::test_a_certificate_that_is_vouched_for_must_still_fit",
    47: "tests/web/test_workers.py::test_a_worker_that_crashes_is_replaced",
    48: "tests/web/test_workers.py::test_a_bomb_costs_its_own_page_alone",
    49: "tests/agent/test_chat.py::test_text_from_outside_never_becomes_a_control_token",
    50: "tests/agent/test_episode.py::test_4_a_page_cannot_write_the_answer",
    51: "tests/agent/test_chat.py::test_text_from_outside_never_becomes_a_control_token",
    52: "tests/agent/test_chat.py::test_a_huge_observation_is_cut_before_it_is_encoded",
    54: "tests/rollout/test_scheduler.py::test_row_54_a_defect_in_one_episode_is_counted_and_the_others_go_on",
    55: "tests/rollout/test_scheduler.py::test_rows_55_and_56_a_step_with_too_many_outside_failures_is_not_trained_on",
    56: "tests/web/test_search.py::test_a_provider_that_is_down_is_not_asked_until_a_probe_succeeds",
    57: "tests/web/test_search.py::test_bad_items_are_dropped",
    58: "tests/agent/test_model_reader.py::test_58_whatever_it_says_about_going_on_the_page_is_bounded",
    59: "tests/rollout/test_watchdog.py::test_a_loop_that_stands_still_is_named_by_its_stack",
    60: "tests/engine/test_service.py::test_a_crash_of_the_device_thread_answers_everyone",
    63: "tests/web/test_cache.py::test_a_full_disk_costs_the_cache_and_not_the_run",
    64: "tests/web/test_cache.py::test_an_entry_that_was_changed_is_a_miss",
    65: "tests/rollout/test_admission.py::test_above_the_watermark_nothing_starts_and_below_it_everything_does",
}


def refuse(host):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def kind_of(answer):
    return answer.kind if isinstance(answer, Failure) else OK


# Row, name, URL, what comes back. {port} is that of a server at 127.0.0.2, an address the policy denies.
URLS = [
    (1, "metadata address", "http://169.254.169.254/computeMetadata/v1/", K.BLOCKED),
    (3, "metadata name", "http://metadata.google.internal/", K.BLOCKED),
    (3, "metadata name, dot and case", "http://METADATA.Google.Internal./", K.BLOCKED),
    (4, "mapped IPv4", "http://[::ffff:127.0.0.2]:{port}/", K.BLOCKED),
    (4, "NAT64", "http://[64:ff9b::a9fe:a9fe]/", K.BLOCKED),
    (4, "6to4", "http://[2002:a9fe:a9fe::1]/", K.BLOCKED),
    (4, "unique local", "http://[fd20:ce::254]/", K.BLOCKED),
    (5, "fullwidth digits", "http://１２７.0.0.2:{port}/", K.BLOCKED),
    (5, "ideographic dots", "http://127。0。0。2:{port}/", K.BLOCKED),
    (5, "circled digits", "http://①②⑦.⓪.⓪.②:{port}/", K.BLOCKED),
    (5, "tab in the host", "http://127.0.\t0.2:{port}/", K.BAD_URL),
    (6, "hexadecimal", "http://0x7f000002:{port}/", K.BLOCKED),
    (6, "octal", "http://0177.1:{port}/", K.BLOCKED),
    (6, "decimal", "http://2130706434:{port}/", K.BLOCKED),
    (7, "one public record, one private", "http://mixed.example.com:{port}/", K.BLOCKED),
    (8, "rebinding name", "http://rebind.example.com:{port}/", K.BLOCKED),
    (9, "file", "file:///etc/passwd", K.BAD_URL),
    (9, "data", "data:text/html,x", K.BAD_URL),
    (9, "ftp", "ftp://example.com/", K.BAD_URL),
    (9, "javascript", "javascript:alert(1)", K.BAD_URL),
    (10, "ssh", "http://example.com:22/", K.BLOCKED),
    (10, "redis", "http://example.com:6379/", K.BLOCKED),
    (10, "coordinator", "http://example.com:8476/", K.BLOCKED),
    (11, "user and password", "http://user:pw@site.test/", K.BAD_URL),
    (12, "one megabyte", "http://site.test/" + "a" * 1_000_000, K.BAD_URL),
    (12, "lone surrogate", "http://site.test/\ud800", K.BAD_URL),
    (12, "open bracket", "http://[", K.BAD_URL),
    (12, "IndexError in aiohttp", "http:///", K.BAD_URL),
]
RECORDS = {"mixed.example.com": ["8.8.8.8", "127.0.0.2"], "rebind.example.com": ["127.0.0.2"]}


@pytest.mark.parametrize(("url", "kind"), [pytest.param(u, k, id=f"{row} {name}") for row, name, u, k in URLS])
async def test_url(serve, url, kind):
    canary, site = await serve(http(b"secret"), host="127.0.0.2"), await serve(redirect("placeholder"))
    target = url.replace("{port}", str(canary.port))
    hosts = {"site.test": ("127.0.0.1", site.port)}
    policy = AddressPolicy(ports=frozenset({80, 443, canary.port}))
    async with asyncio.timeout(HANG_S), Fetcher(policy, hosts, limits=LIMITS, lookup=RECORDS.__getitem__) as fetcher:
        failure = await fetcher.fetch(target)
    assert kind_of(failure) is kind
    assert not failure.infrastructure
    assert (canary.connections, site.connections) == (0, 0)


# Row, name, what the server says to connection 1, 2, ..., what comes back, and how many requests that takes.
WIRE = [
    (2, "redirect to the metadata address", [redirect("http://169.254.169.254/x")], K.BLOCKED, 1),
    (17, "gzip bomb of 1 GiB", [http(fault_server.GIBIBYTE, "Content-Encoding: gzip")], K.TOO_LARGE, 1),
    (18, "brotli", [fault_server.BROTLI], K.UNSUPPORTED_ENCODING, 1),
    (19, "gzip twice", [http(fault_server.GIBIBYTE, "Content-Encoding: gzip, gzip")], K.UNSUPPORTED_ENCODING, 1),
    (19, "gzip in two headers", [http(b"x", "Content-Encoding: gzip", "Content-Encoding: gzip")],
     K.UNSUPPORTED_ENCODING, 1),
    (19, "unknown coding", [http(b"x", "Content-Encoding: rot13")], K.UNSUPPORTED_ENCODING, 1),
    (19, "zstd", [http(b"x", "Content-Encoding: zstd")], K.UNSUPPORTED_ENCODING, 1),
    (20, "corrupt gzip", [http(b"\x1f\x8b" + b"x" * 99, "Content-Encoding: gzip")], K.PROTOCOL_ERROR, 1),
    (20, "truncated gzip", [http(fault_server.CUT_GZIP, "Content-Encoding: gzip")], K.TRUNCATED, 3),
    (21, "endless body", [forever(b"x" * 9000)], K.TOO_LARGE, 1),
    (21, "endless chunks", [forever(b"3e8\r\n" + b"x" * 1000 + b"\r\n", CHUNKED)], K.TOO_LARGE, 1),
    (22, "chunks of one byte, slowly", [forever(b"1\r\nx\r\n", CHUNKED, pause_s=0.01)], K.TIMEOUT, 1),
    (23, "body drips", [forever(b"x", pause_s=0.04)], K.TIMEOUT, 1),
    (23, "header drips", [forever(b"x", HEAD + b"X: ", pause_s=0.04)], K.TIMEOUT, 1),
    (23, "silent", [silent], K.TIMEOUT, 1),
    (24, "early hints, slow", [forever(b"HTTP/1.1 103 Early Hints\r\n\r\n", b"", pause_s=0.01)], K.TIMEOUT, 1),
    (24, "early hints, fast", [forever(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 9, b"")], K.TIMEOUT, 1),
    (25, "body shorter than promised", [http(b"short", "Content-Length: 100")], K.TRUNCATED, 3),
    (26, "negative length", [http(b"x", "Content-Length: -5")], K.PROTOCOL_ERROR, 1),
    (26, "two lengths", [http(b"x", "Content-Length: 1", "Content-Length: 2")], K.PROTOCOL_ERROR, 1),
    (26, "length and chunks", [http(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked")],
     K.PROTOCOL_ERROR, 1),
    (26, "length overflows", [http(b"x", f"Content-Length: {10**30}")], K.PROTOCOL_ERROR, 1),
    (26, "no HTTP at all", [b"\x00\x01\x02 not http\r\n\r\n"], K.PROTOCOL_ERROR, 1),
    (27, "bad chunk size", [CHUNKED + b"zz\r\nabc\r\n"], K.PROTOCOL_ERROR, 1),
    (27, "no last chunk", [CHUNKED + b"3\r\nabc\r\n"], K.PROTOCOL_ERROR, 1),
    (28, "header of 10 MB", [http(b"x", "X: " + "y" * 10_000_000)], K.PROTOCOL_ERROR, 1),
    (28, "100,000 headers", [http(b"x", *(f"X-{i}: y" for i in range(100_000)))], K.PROTOCOL_ERROR, 1),
    # In the body aiohttp does not tell a reset from a body that ends too early. Before it, it asks once more
    # by itself: three attempts are six requests.
    (29, "reset at once", [then_reset(b"")], K.CONNECTION, 6),
    (29, "reset in the headers", [then_reset(HEAD)], K.CONNECTION, 6),
    (29, "reset in the body", [then_reset(HEAD + b"Content-Length: 9\r\n\r\nabc")], K.TRUNCATED, 3),
    (30, "redirect loop", [redirect("/")], K.REDIRECTS, 6),
    (30, "six hops", [*map(redirect, "abcdef"), http(b"there")], K.REDIRECTS, 6),
    (30, "five hops", [*map(redirect, "abcde"), http(b"there")], OK, 6),
    (30, "to a file", [redirect("file:///etc/passwd")], K.BAD_URL, 1),
    (31, "no Location", [http(status="302 Found")], K.REDIRECTS, 1),
    (31, "Location is garbage", [redirect("http://[")], K.REDIRECTS, 1),
    (31, "Location of 8,000 characters", [redirect("/" + "a" * 8000)], K.REDIRECTS, 1),
    (31, "Location of 1 MB", [redirect("/" + "a" * 1_000_000)], K.PROTOCOL_ERROR, 1),
    *((32, status, [http(status=f"{status} No")], K.STATUS, 1) for status in ("401", "403", "404", "410")),
    (33, "429, back at once", [http(b"", "Retry-After: 0", status="429 No"), http(b"ok")], OK, 2),
    (33, "429, a day", [http(b"", "Retry-After: 86400", status="429 No")], K.RATE_LIMITED, 1),
    (33, "429, abc", [http(b"", "Retry-After: abc", status="429 No")], K.RATE_LIMITED, 1),
    (33, "429, a date", [http(b"", "Retry-After: Fri, 31 Dec 2100 23:59:59 GMT", status="429 No")], K.RATE_LIMITED, 1),
    (34, "500 twice, then a page", [*[http(status="500 Oops")] * 2, http(b"ok")], OK, 3),
    (34, "500 for ever", [http(status="500 Oops")], K.STATUS, 3),
    (35, "image", [http(b"x", type="image/png")], K.UNSUPPORTED_TYPE, 1),
    (35, "type with bytes past ASCII", [http(b"x", type="text/\xff\xfe")], K.UNSUPPORTED_TYPE, 1),
    (35, "zip", [http(b"PK", type="application/zip")], K.UNSUPPORTED_TYPE, 1),
    (35, "pdf", [http(b"%PDF-1.7", type="application/pdf")], OK, 1),
    (35, "no type", [http(b"<p>x", type=None)], OK, 1),
    (37, "cookies", [http(b"ok", *(f"Set-Cookie: c{i}={'x' * 4000}" for i in range(90)))], OK, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "kind", "requests"), [pytest.param(a, k, n, id=f"{row} {name}") for row, name, a, k, n in WIRE]
)
async def test_wire(serve, answers, kind, requests):
    """Whatever one server does, a page of another arrives meanwhile."""
    bad, good = await serve(*answers), await serve(http(b"fine"))
    hosts = {"bad.test": ("127.0.0.1", bad.port), "good.test": ("127.0.0.1", good.port)}
    async with asyncio.timeout(HANG_S), Fetcher(hosts=hosts, limits=LIMITS, lookup=refuse) as fetcher:
        answer, page = await asyncio.gather(fetcher.fetch("http://bad.test/"), fetcher.fetch("http://good.test/"))
        assert page.body == b"fine"
        assert kind_of(answer) is kind
        assert bad.connections == requests
    assert not any(b"cookie" in request.lower() for request in bad.requests)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        pytest.param(
            http(fault_server.CUT_GZIP, "Content-Encoding: gzip"), K.TRUNCATED, id="20 truncated gzip is not kept"
        ),
        pytest.param(http(b"xyz", "Content-Encoding: gzip"), K.PROTOCOL_ERROR, id="20 corrupt gzip is not kept"),
        pytest.param(http(b"short", "Content-Length: 99"), K.TRUNCATED, id="25 half a body is not kept"),
    ],
)
async def test_cache(serve, tmp_path, answer, kind):
    server = await serve(answer, http(b"<p>whole"))
    limits = dataclasses.replace(LIMITS, retries=0)
    fetcher = Fetcher(hosts={"site.test": ("127.0.0.1", server.port)}, limits=limits)
    async with Cache(tmp_path / "web") as cache, fetcher:
        browser = CachedBrowser(Visitor(fetcher), cache)
        first, second = await browser.browse("http://site.test/"), await browser.browse("http://site.test/")
    assert kind_of(first) is kind
    assert second.segments == ("whole",)


@pytest.mark.parametrize(
    ("error", "kind", "infrastructure"),
    [
        pytest.param(socket.EAI_NONAME, K.NO_SUCH_HOST, False, id="38 no such name"),
        pytest.param(socket.EAI_AGAIN, K.DNS, True, id="38 the resolver fails"),
        pytest.param(None, K.DNS, True, id="38 the resolver hangs"),
    ],
)
async def test_resolver(error, kind, infrastructure):
    done = threading.Event()

    def lookup(host):
        if error is None:
            done.wait(HANG_S)
        raise socket.gaierror(error or 0, "as the C library says it")

    try:
        async with asyncio.timeout(HANG_S), Fetcher(limits=LIMITS, lookup=lookup) as fetcher:
            failure = await fetcher.fetch("http://nowhere.example.com/")
    finally:
        done.set()
    assert (failure.kind, failure.infrastructure) == (kind, infrastructure)


NO_ENTRY = b"User-agent: *\nDisallow: /"
ROBOTS = [
    ("says no", http(NO_ENTRY), K.ROBOTS),
    ("says no behind a redirect", [redirect("/elsewhere.txt"), http(NO_ENTRY)], K.ROBOTS),
    ("says no within 500 KiB of 10 MB", http(NO_ENTRY + b"\n# x" * 2_500_000), K.ROBOTS),
    ("is not there", http(status="404 Not Found"), OK),
    ("is forbidden", http(status="403 Forbidden"), OK),
    ("fails", http(status="500 Oops"), K.STATUS),
    ("is silent", silent, K.TIMEOUT),
    ("breaks off", then_reset(b""), K.CONNECTION),
    ("is garbage on the wire", b"\x00 not http\r\n\r\n", K.PROTOCOL_ERROR),
    ("is binary", http(os.urandom(5000).replace(b":", b" "), type="image/png"), OK),
    ("redirects for ever", redirect("/robots.txt"), OK),
    ("redirects to the metadata address", redirect("http://169.254.169.254/"), K.BLOCKED),
]


@pytest.mark.parametrize(("robots", "kind"), [pytest.param(r, k, id=f"39 robots.txt {n}") for n, r, k in ROBOTS])
async def test_robots(serve, robots, kind):
    pages = []
    rules = robots if isinstance(robots, list) else [robots]

    async def answer(reader, writer):
        path = server.requests[-1].split()[1]
        if path == b"/page":
            pages.append(path)
            writer.write(http(b"ok"))
            return
        step = rules[min(server.connections, len(rules)) - 1]
        writer.write(step) if isinstance(step, bytes) else await step(reader, writer)

    server = await serve(answer)
    hosts = {"site.test": ("127.0.0.1", server.port)}
    manners = Manners(min_delay_s=0.0, toward_hosts=True)
    fetcher = Fetcher(hosts=hosts, limits=LIMITS, manners=manners, lookup=refuse)
    async with asyncio.timeout(HANG_S), fetcher:
        assert kind_of(await fetcher.fetch("http://site.test/page")) is kind
    assert len(pages) == (kind is OK)


def page(*parts: str | bytes, type: str = "text/html") -> Response:
    return Response("http://a.test/", type, b"".join(p if isinstance(p, bytes) else p.encode() for p in parts))


HELLO = "<main><p>Hello, world.</p></main>"
CONTENT = [
    *((40, f"charset {name}", page(HELLO, type=f"text/html; charset={name}"), OK)
      for name in ("hex", "rot13", "undefined", "utf-7", "bogus")),
    (41, "invalid UTF-8", page("<p>Hello, world. ", b"\xff\xfe\xfd", type="text/html; charset=utf-8"), OK),
    (41, "NUL", page("<p>Hello, world.", " " * 2000, b"\x00"), OK),
    (41, "surrogate bytes", page("<p>Hello, world. ", b"\xed\xa0\x80"), OK),
    (41, "byte-order mark", page(b"\xef\xbb\xbf", HELLO), OK),
    (41, "byte-order mark of UTF-16", page(HELLO.encode("utf-16")), OK),
    (42, "100,000 nested divs", page("<div>" * 100_000), K.PARSE_LIMIT),
    (42, "1,000,000 nested divs", page("<div>" * 800_000), K.PARSE_LIMIT),
    (43, "formatting bomb", page("<p>", *(f"<font a={i}>" for i in range(1000)), "<p>x" * 5000), K.PARSE_LIMIT),
    (44, "100,000 attributes", page("<p ", *(f"a{i} " for i in range(100_000)), ">x"), K.PARSE_LIMIT),
    (44, "50,000 options", page("<select>", "<option>x" * 50_000), K.PARSE_LIMIT),
    (44, "20,000 list items", page("<ul>", "<li>Hello, world." * 20_000), OK),
    (45, "2 MiB on one line", page("<p>", "Hello, world. " * 150_000), OK),
    (46, "empty body", page(""), K.EMPTY),
    (46, "only scripts", page("<script>", "x()" * 99, "</script>"), K.EMPTY),
    (46, "frameset", page("<frameset><frame src=a></frameset>"), K.EMPTY),
    (46, "application", page("<div id=root></div><script src=app.js></script>"), K.EMPTY),
]  # fmt: skip


@pytest.mark.parametrize(("response", "kind"), [pytest.param(r, k, id=f"{row} {n}") for row, n, r, k in CONTENT])
def test_content(response, kind):
    answer = extract(response)
    assert kind_of(answer) is kind
    if isinstance(answer, Page):
        text = "\n".join(answer.segments)
        assert text.startswith(("Hello, world.", "- Hello, world."))
        assert len(text.encode("utf-8")) <= 410_000
        assert not set(text) & set("\x00\ufeff")


def _tasks_of_ours() -> int:
    """Tasks that are not the test server's ends of connections."""
    return sum("handle" not in task.get_coro().__qualname__ for task in asyncio.all_tasks())


async def test_53_cancelled_anywhere_nothing_is_left(serve):
    server = await serve(http(b"ok"))
    limits = Limits(max_concurrent=1, max_per_site=1)
    before = _tasks_of_ours()
    async with Fetcher(hosts={"site.test": ("127.0.0.1", server.port)}, limits=limits) as fetcher:
        for moment in range(25):
            task = asyncio.create_task(fetcher.fetch("http://site.test/"))
            for _ in range(moment):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            async with asyncio.timeout(HANG_S):
                assert (await fetcher.fetch("http://site.test/")).body == b"ok"
    assert _tasks_of_ours() == before


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
async def test_61_the_wall_clock_jumps(serve, monkeypatch, jump_s):
    real = time.time

    async def answer(reader, writer):
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        writer.write(http(b"ok"))

    server = await serve(answer)
    async with Fetcher(hosts={"site.test": ("127.0.0.1", server.port)}, limits=LIMITS) as fetcher:
        assert [(await fetcher.fetch("http://site.test/")).body for _ in range(2)] == [b"ok"] * 2


async def test_62_no_file_descriptor_is_left(serve):
    server = await serve(http(b"ok"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    async with Fetcher(hosts={"site.test": ("127.0.0.1", server.port)}, limits=LIMITS) as fetcher:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 256), hard))
        try:
            while True:
                taken.append(os.dup(0))
        except OSError:
            failure = await fetcher.fetch("http://site.test/")
        finally:
            for descriptor in taken:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert (failure.kind, failure.infrastructure) == (K.CONNECTION, True)
        assert (await fetcher.fetch("http://site.test/")).body == b"ok"


def test_every_row_is_here_or_somewhere():
    here = {row for row, *_ in (*URLS, *WIRE, *CONTENT)} | {38, 39, 53, 61, 62}
    assert sorted([*here, *ELSEWHERE]) == list(range(1, 66))
    root = pathlib.Path(__file__).parents[2]
    for place in ELSEWHERE.values():
        path, _, name = place.partition("::")
        assert f"def {name}(" in (root / path).read_text(), place
