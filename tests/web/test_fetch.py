from __future__ import annotations

import asyncio
import gzip
import os
import random
import shutil
import socket
import ssl
import subprocess
import zlib

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.fetch import Fetcher, Limits, Moved, _redirect
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.http import Timeouts
from dr_jax.web.page import Response
from dr_jax.web.politeness import Manners
from tests.web.fault_server import http, silent, then_reset

QUICK = Limits(
    max_bytes=100_000, max_wait_s=1.0, backoff_s=1e-3, timeouts=Timeouts(response_s=0.5, idle_s=0.5, total_s=1.0)
)


def refuse(host: str) -> list[str]:
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def to(server, **options) -> Fetcher:
    return Fetcher(hosts={"site.test": ("127.0.0.1", server.port)}, limits=QUICK, lookup=refuse, **options)


async def fetch(server, url="http://site.test/"):
    async with to(server) as fetcher:
        return await fetcher.fetch(url)


async def test_a_page(serve):
    server = await serve(http(b"<p>hello", "Set-Cookie: a=1"))
    async with to(server, contact="https://example.org/bot") as fetcher:
        answer = await fetcher.fetch("http://site.test/wiki?q=1#part")
        assert answer == Response("http://site.test/wiki?q=1", "text/html", b"<p>hello")
        await fetcher.fetch("http://site.test/again")
    first, second = (request.decode().lower() for request in server.requests)
    assert first.startswith("get /wiki?q=1 http/1.1\r\n")
    assert "user-agent: dr_jax/" in first
    assert "+https://example.org/bot" in first
    assert "accept-encoding: gzip, deflate\r\n" in first
    assert "cookie" not in second


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(b"<p>hello</p>" * 100)),
        ("x-gzip", gzip.compress(b"<p>hello</p>" * 50) + gzip.compress(b"<p>hello</p>" * 50)),
        ("deflate", zlib.compress(b"<p>hello</p>" * 100)),
        ("Deflate", zlib.compress(b"<p>hello</p>" * 100, wbits=-15)),
        ("identity", b"<p>hello</p>" * 100),
    ],
)
async def test_content_encodings(serve, encoding, packed):
    answer = await fetch(await serve(http(packed, f"Content-Encoding: {encoding}")))
    assert answer.body == b"<p>hello</p>" * 100


async def test_chunked_body_and_missing_content_type(serve):
    head = "Transfer-Encoding: chunked"
    answer = await fetch(await serve(http(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", head, type=None)))
    assert answer == Response("http://site.test/", "", b"abcde")


@pytest.mark.parametrize("size", [99_999, 100_000, 100_001])
async def test_the_byte_cap_is_exact(serve, size):
    for encoding, body in (("identity", os.urandom(size)), ("gzip", gzip.compress(b"a" * size))):
        answer = await fetch(await serve(http(body, f"Content-Encoding: {encoding}")))
        if size <= 100_000:
            assert len(answer.body) == size
        else:
            assert answer.kind is FailureKind.TOO_LARGE


async def test_rate_limit_says_for_how_long(serve):
    server = await serve(http(b"", "Retry-After: 7", status="429 Slow Down"))
    failure = await fetch(server)
    assert (failure.status, failure.retry_after_s, failure.infrastructure) == (429, 7.0, True)
    assert server.connections == 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 300, 304])
async def test_an_honest_no_is_asked_once(serve, status):
    server = await serve(http(b"", status=f"{status} No"))
    failure = await fetch(server)
    assert (failure.kind, failure.status, failure.infrastructure) == (FailureKind.STATUS, status, False)
    assert server.connections == 1


async def test_5xx_and_broken_connections_are_retried_twice(serve):
    busy = http(b"", status="500 Oops")
    assert (await fetch(await serve(busy, then_reset(b""), http(b"ok")))).body == b"ok"
    server = await serve(busy)
    assert (await fetch(server)).status == 500
    assert server.connections == 3


async def test_five_redirects_are_followed_and_six_are_not(serve):
    def hops(n):
        return [http(b"", f"Location: /{i}", status="302 Found") for i in range(n)] + [http(b"there")]

    answer = await fetch(await serve(*hops(5)))
    assert answer == Response("http://site.test/4", "text/html", b"there")
    server = await serve(*hops(6))
    assert (await fetch(server)).kind is FailureKind.REDIRECTS
    assert server.connections == 6


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.2:{port}/",
        "//127.0.0.2:{port}/",
        "http://[::ffff:127.0.0.2]:{port}/",
        "http://１２７.0.0.2:{port}/",
        "http://①②⑦.⓪.⓪.②:{port}/",
        "http://localhost:{port}/",
        "http://0x7f000002:{port}/",
        "http://user:pw@127.0.0.2:{port}/",
        "http://rebound.example.com:{port}/",
    ],
)
async def test_a_redirect_to_a_denied_address_reaches_nobody(serve, target):
    canary = await serve(http(b"secret"), host="127.0.0.2")
    location = target.format(port=canary.port).encode()
    server = await serve(b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: " + location + b"\r\n\r\n")
    hosts = {"site.test": ("127.0.0.1", server.port)}
    policy = AddressPolicy(ports=frozenset({80, canary.port}))
    async with Fetcher(policy, hosts, limits=QUICK, lookup=lambda host: ["127.0.0.2"]) as fetcher:
        failure = await fetcher.fetch("http://site.test/")
        direct = await fetcher.fetch(target.format(port=canary.port))
    assert failure.kind in (FailureKind.BLOCKED, FailureKind.BAD_URL)
    assert direct.kind in (FailureKind.BLOCKED, FailureKind.BAD_URL)
    assert (server.connections, canary.connections) == (1, 0)


@pytest.mark.parametrize(
    ("number", "kind", "infrastructure"),
    [
        (socket.EAI_NONAME, FailureKind.NO_SUCH_HOST, False),
        (socket.EAI_NODATA, FailureKind.NO_SUCH_HOST, False),
        (socket.EAI_AGAIN, FailureKind.DNS, True),
        (socket.EAI_FAIL, FailureKind.DNS, True),
    ],
)
async def test_a_name_that_is_not_there_is_an_answer_and_a_resolver_that_fails_is_not(number, kind, infrastructure):
    def lookup(host):
        raise socket.gaierror(number, "as the C library says it")

    async with Fetcher(limits=QUICK, manners=Manners(robots=False), lookup=lookup) as fetcher:
        failure = await fetcher.fetch("http://nowhere.example.com/")
    assert (failure.kind, failure.infrastructure) == (kind, infrastructure)


async def test_a_name_without_records_is_not_there():
    async with Fetcher(limits=QUICK, lookup=lambda host: []) as fetcher:
        failure = await fetcher.fetch("http://nowhere.example.com/")
    assert failure.kind is FailureKind.NO_SUCH_HOST


async def test_a_pdf_is_taken_as_it_is(serve):
    server = await serve(http(b"%PDF-1.7", type="application/pdf"))
    assert await fetch(server) == Response("http://site.test/", "application/pdf", b"%PDF-1.7")
    assert b"application/pdf" in server.requests[0]


@pytest.fixture
def self_signed(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("makes its certificate with openssl")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=site.test"]
        + ["-keyout", tmp_path / "key", "-out", tmp_path / "cert"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    return context


async def test_a_certificate_nobody_vouches_for_is_refused(self_signed):
    async with await asyncio.start_server(silent, "127.0.0.1", 0, ssl=self_signed) as server:
        hosts = {"site.test": ("127.0.0.1", server.sockets[0].getsockname()[1])}
        async with Fetcher(hosts=hosts, limits=QUICK, lookup=refuse) as fetcher:
            assert (await fetcher.fetch("https://site.test/")).kind is FailureKind.TLS


def openssl(folder, command: str) -> None:
    subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "days", "kind"),
    [
        ("site.test", 1, None),
        ("site.test", -1, FailureKind.TLS),  # expired yesterday
        ("other.test", 1, FailureKind.TLS),
    ],
)
async def test_a_certificate_that_is_vouched_for_must_still_fit(tmp_path, monkeypatch, name, days, kind):
    if not shutil.which("openssl"):
        pytest.skip("makes its certificates with openssl")
    new = "req -newkey rsa:2048 -nodes"
    openssl(tmp_path, f"{new} -x509 -days 2 -subj /CN=ours -keyout ca.key -out ca.pem")
    openssl(tmp_path, f"{new} -subj /CN={name} -addext subjectAltName=DNS:{name} -keyout key.pem -out request")
    signed = "x509 -req -in request -CA ca.pem -CAkey ca.key -CAcreateserial -copy_extensions copy"
    openssl(tmp_path, f"{signed} -days {days} -out cert.pem")
    # aiohttp made its context from the system's authorities when it was imported: here ours is the only one.
    ours = ssl.create_default_context(cafile=tmp_path / "ca.pem")
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", ours)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(http(b"ok"))

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as server:
        hosts = {"site.test": ("127.0.0.1", server.sockets[0].getsockname()[1])}
        async with Fetcher(hosts=hosts, limits=QUICK, lookup=refuse) as fetcher:
            fetched = await fetcher.fetch("https://site.test/")
    assert getattr(fetched, "kind", None) is kind


def test_https_never_redirects_to_http():
    assert _redirect(URL("https://a.test/"), "http://a.test/").kind is FailureKind.REDIRECTS
    assert _redirect(URL("https://a.test/"), "//b.test/c") == URL("https://b.test/c")
    assert _redirect(URL("http://a.test/"), "https://a.test/") == URL("https://a.test/")


async def test_a_site_gets_no_more_than_its_share_and_waiting_is_not_counted(serve):
    open_now = peak = 0

    async def slow(reader, writer):
        nonlocal open_now, peak
        open_now += 1
        peak = max(peak, open_now)
        await asyncio.sleep(0.04)
        open_now -= 1
        writer.write(http(b"ok"))

    server = await serve(slow)
    limits = Limits(max_per_site=2, timeouts=Timeouts(total_s=0.2))
    async with Fetcher(hosts={"site.test": ("127.0.0.1", server.port)}, limits=limits) as fetcher:
        answers = await asyncio.gather(*(fetcher.fetch(f"http://site.test/{i}") for i in range(16)))  # 8 x 40 ms
    assert [answer.body for answer in answers] == [b"ok"] * 16
    assert peak == 2


async def test_cancelled_fetches_leave_nothing_behind(serve):
    arrived = asyncio.Event()

    async def hang(reader, writer):
        if server.connections == 4:
            arrived.set()
        await reader.read()

    server = await serve(hang)
    async with to(server) as fetcher:
        tasks = [asyncio.create_task(fetcher.fetch(f"http://site.test/{i}")) for i in range(8)]
        await arrived.wait()
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        server.answers = [http(b"ok")]
        assert (await fetcher.fetch("http://site.test/")).body == b"ok"


URLS = st.one_of(
    st.text(max_size=60),
    st.builds("{}{}".format, st.sampled_from(["http://", "https://", "HTTP:", "//", "http://["]), st.text(max_size=40)),
    st.from_regex(r"https?://[^/ ]{0,20}(:[0-9]{0,6})?(/[^ ]{0,20})?([?#].{0,10})?", fullmatch=True),
    st.text(st.characters(categories=["Cs", "Cc", "Cf", "No", "Nd", "Po"]), max_size=20).map("http://{}/".format),
)


async def check(urls) -> None:
    async with Fetcher(limits=QUICK, lookup=refuse) as fetcher:
        for url in urls:
            answer = await fetcher.fetch(url)
            assert isinstance(answer, Failure)
            assert answer.detail.isprintable()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(URLS, min_size=1, max_size=10))
def test_no_url_makes_fetch_raise(urls):
    asyncio.run(check(urls))


@pytest.mark.slow
async def test_no_url_of_40_000_makes_fetch_raise():
    """Drawn without hypothesis, which takes minutes for as many."""
    draw = random.Random(0)
    starts = [
        "",
        "//",
        "http://",
        "https://",
        "HTTP:",
        "http://[",
        "https://a.",
        "http://1.",
        "http://a.test:",
        "ftp://",
    ]
    alphabet = "ab.1:/@?#[]%\\ \t\n\x00-_~;=&+éßİﬀ０①。．\u200d\u202e\ud800\U0001f600xn--"

    def some(characters: int) -> str:
        wild = (chr(draw.randrange(0x3000)) for _ in range(draw.randrange(3)))
        return "".join((*draw.choices(alphabet, k=draw.randrange(characters)), *wild))

    def url() -> str:
        host = some(30) if draw.random() < 0.5 else "".join(draw.choices("abcé1-", k=6)) + ".test"
        return f"{draw.choice(starts)}{host}{draw.choice(['', '/', '/', '/?', ':80/'])}{some(12)}"

    await check(url() for _ in range(40_000))


def test_impossible_limits_are_a_config_error():
    with pytest.raises(ConfigError, match="limits.max_bytes: 0 is less than 1"):
        Limits(max_bytes=0)


def test_a_patience_of_nothing_is_a_config_error():
    with pytest.raises(ConfigError, match="limits.max_wait_s: 0 is not a positive"):
        Limits(max_wait_s=0)


async def test_a_429_is_asked_again_when_the_site_said(serve):
    server = await serve(http(b"", "Retry-After: 0", status="429 Slow Down"), http(b"ok"))
    assert (await fetch(server)).body == b"ok"


async def test_a_leg_ends_where_a_redirect_leaves_the_domain(serve):
    first = await serve(http(b"", "Location: http://www.a.test/x", status="302 Found"))
    second = await serve(http(b"", "Location: http://b.test/y?z#w", status="302 Found"))
    third = await serve(http(b"there"))
    names = {"a.test": first, "www.a.test": second, "b.test": third}
    hosts = {name: ("127.0.0.1", server.port) for name, server in names.items()}
    async with Fetcher(hosts=hosts, limits=QUICK, lookup=refuse) as fetcher:
        moved = await fetcher.leg(Moved("http://a.test/", 0))
        assert moved == Moved("http://b.test/y?z#w", 2)
        assert third.connections == 0
        assert (await fetcher.leg(moved)).body == b"there"
        assert (await fetcher.leg(Moved("http://a.test/", 5))).kind is FailureKind.REDIRECTS
        assert (await fetcher.leg(Moved("http://localhost/", 0))).kind is FailureKind.BLOCKED


@pytest.mark.parametrize("status", ["429 Slow Down", "503 Busy"])
async def test_a_site_that_asked_for_patience_is_left_alone(serve, status):
    server = await serve(http(b"", "Retry-After: 86400", status=status), http(b"too early"))
    async with to(server) as fetcher:
        first, second = await fetcher.fetch("http://site.test/a"), await fetcher.fetch("http://SITE.test./b")
    assert first.retry_after_s == 86400
    assert second.kind is FailureKind.RATE_LIMITED
    assert 86000 < second.retry_after_s <= 86400
    assert server.connections == 1


async def test_a_host_that_fails_again_and_again_is_left_alone_and_others_are_not(serve):
    bad, good = await serve(http(b"", status="500 Oops")), await serve(http(b"fine"))
    hosts = {"bad.test": ("127.0.0.1", bad.port), "good.test": ("127.0.0.1", good.port)}
    async with Fetcher(hosts=hosts, limits=QUICK, lookup=refuse) as fetcher:
        failures = [await fetcher.fetch(f"http://bad.test/{i}") for i in range(4)]
        assert (await fetcher.fetch("http://good.test/")).body == b"fine"
    assert [failure.kind for failure in failures] == [FailureKind.STATUS] + [FailureKind.PROVIDER_DOWN] * 3
    assert all(failure.infrastructure for failure in failures)
    assert bad.connections == 5


async def test_pages_that_are_missing_do_not_make_a_host_broken(serve):
    server = await serve(http(b"", status="404 Not Found"))
    async with to(server) as fetcher:
        failures = [await fetcher.fetch(f"http://site.test/{i}") for i in range(8)]
    assert {failure.status for failure in failures} == {404}


async def test_a_blocked_domain_is_never_asked_not_even_by_a_redirect(serve):
    blocked = await serve(http(b"the answers"))
    server = await serve(http(b"", "Location: http://www.Answers.test./all", status="302 Found"))
    hosts = {"site.test": ("127.0.0.1", server.port), "www.answers.test": ("127.0.0.1", blocked.port)}
    policy = AddressPolicy(blocked_domains=frozenset({"answers.test"}))
    async with Fetcher(policy, hosts, limits=QUICK) as fetcher:
        failures = [await fetcher.fetch(url) for url in ("http://site.test/", "http://www.answers.test/")]
    assert {(failure.kind, failure.detail) for failure in failures} == {(FailureKind.BLOCKLISTED, "answers.test")}
    assert not failures[0].infrastructure
    assert (server.connections, blocked.connections) == (1, 0)
