from __future__ import annotations

import asyncio
import gzip
import os
import shutil
import ssl
import subprocess
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.fetch import Fetcher, Limits, _redirect
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.http import Timeouts
from dr_jax.web.page import Response

QUICK = Limits(max_bytes=100_000, backoff_s=1e-3, timeouts=Timeouts(response_s=0.5, idle_s=0.5, total_s=1.0))


def http(body: bytes = b"", *headers: str, status: str = "200 OK", type: str | None = "text/html") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if type is not None:
        lines.append(f"Content-Type: {type}")
    if not any(h.lower().startswith(("content-length", "transfer-encoding")) for h in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def forever(piece: bytes, head: bytes, *, pause_s: float = 0.0):
    async def answer(reader, writer):
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return answer


async def reset(reader, writer):
    writer.transport.abort()


async def silent(reader, writer):
    await reader.read()


def refuse(host: str) -> list[str]:
    raise OSError(-2, "Name or service not known")


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


BOMB = gzip.compress(bytes(64 << 20), 9)

FAULTS = {
    "gzip bomb": (http(BOMB, "Content-Encoding: gzip"), FailureKind.TOO_LARGE),
    "endless": (forever(b"x" * 9000, b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n"), FailureKind.TOO_LARGE),
    "endless chunks": (
        forever(b"3e8\r\n" + b"x" * 1000 + b"\r\n", http(b"", "Transfer-Encoding: chunked")),
        FailureKind.TOO_LARGE,
    ),
    "drip": (forever(b"x", http(b"", "Content-Length: 9000"), pause_s=0.04), FailureKind.TIMEOUT),
    "header drip": (forever(b"x", b"HTTP/1.1 200 OK\r\nX: ", pause_s=0.04), FailureKind.TIMEOUT),
    "early hints for ever": (forever(b"HTTP/1.1 103 Early Hints\r\n\r\n", b"", pause_s=0.01), FailureKind.TIMEOUT),
    "silent": (silent, FailureKind.TIMEOUT),
    "stacked encodings": (http(BOMB, "Content-Encoding: gzip, gzip"), FailureKind.UNSUPPORTED_ENCODING),
    "stacked headers": (
        http(BOMB, "Content-Encoding: gzip", "Content-Encoding: gzip"),
        FailureKind.UNSUPPORTED_ENCODING,
    ),
    "brotli": (http(b"x", "Content-Encoding: br"), FailureKind.UNSUPPORTED_ENCODING),
    "zstd": (http(b"x", "Content-Encoding: zstd"), FailureKind.UNSUPPORTED_ENCODING),
    "unknown encoding": (http(b"x", "Content-Encoding: rot13"), FailureKind.UNSUPPORTED_ENCODING),
    "corrupt gzip": (http(b"\x1f\x8b" + b"x" * 100, "Content-Encoding: gzip"), FailureKind.PROTOCOL_ERROR),
    "truncated gzip": (http(gzip.compress(os.urandom(999))[:500], "Content-Encoding: gzip"), FailureKind.TRUNCATED),
    "body too short": (http(b"short", "Content-Length: 100"), FailureKind.TRUNCATED),
    "negative length": (http(b"x", "Content-Length: -5"), FailureKind.PROTOCOL_ERROR),
    "two lengths": (http(b"x", "Content-Length: 1", "Content-Length: 2"), FailureKind.PROTOCOL_ERROR),
    "length and chunked": (
        http(b"0\r\n\r\n", "Content-Length: 5", "Transfer-Encoding: chunked"),
        FailureKind.PROTOCOL_ERROR,
    ),
    "length overflow": (http(b"x", f"Content-Length: {10**30}"), FailureKind.PROTOCOL_ERROR),
    "bad chunk size": (http(b"zz\r\nabc\r\n", "Transfer-Encoding: chunked"), FailureKind.PROTOCOL_ERROR),
    "no last chunk": (http(b"3\r\nabc\r\n", "Transfer-Encoding: chunked"), FailureKind.PROTOCOL_ERROR),
    "long header": (http(b"x", "X: " + "y" * 100_000), FailureKind.PROTOCOL_ERROR),
    "many headers": (http(b"x", *(f"X-{i}: y" for i in range(10_000))), FailureKind.PROTOCOL_ERROR),
    "garbage": (b"\x00\x01\x02 not http\r\n\r\n", FailureKind.PROTOCOL_ERROR),
    "reset": (reset, FailureKind.CONNECTION),
    "image": (http(b"x", type="image/png"), FailureKind.UNSUPPORTED_TYPE),
    "pdf": (http(b"%PDF-1.7", type="application/pdf"), FailureKind.UNSUPPORTED_TYPE),
    "type with bytes past ascii": (http(b"x", type="text/\xff\xfe"), FailureKind.UNSUPPORTED_TYPE),
    "redirect without target": (http(status="302 Found"), FailureKind.REDIRECTS),
    "redirect to a long target": (http(b"", "Location: /" + "a" * 3000, status="302 Found"), FailureKind.REDIRECTS),
    "redirect to itself": (http(b"", "Location: /", status="302 Found"), FailureKind.REDIRECTS),
    "redirect to a file": (http(b"", "Location: file:///etc/passwd", status="301 Moved"), FailureKind.BAD_URL),
    "redirect to a bad URL": (http(b"", "Location: http://[", status="301 Moved"), FailureKind.REDIRECTS),
    "rate limited": (http(b"", "Retry-After: 7", status="429 Slow Down"), FailureKind.RATE_LIMITED),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_fault_is_a_typed_failure_and_the_next_page_is_fine(serve, fault):
    answer, kind = FAULTS[fault]
    bad, good = await serve(answer), await serve(http(b"fine"))
    hosts = {"bad.test": ("127.0.0.1", bad.port), "good.test": ("127.0.0.1", good.port)}
    async with Fetcher(hosts=hosts, limits=QUICK, lookup=refuse) as fetcher:
        failure, page = await asyncio.gather(fetcher.fetch("http://bad.test/"), fetcher.fetch("http://good.test/"))
    assert isinstance(failure, Failure), failure
    assert failure.kind is kind
    assert page.body == b"fine"


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
    assert (await fetch(await serve(busy, reset, http(b"ok")))).body == b"ok"
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


async def test_a_name_without_address_is_a_dns_failure():
    async with Fetcher(limits=QUICK, lookup=refuse) as fetcher:
        failure = await fetcher.fetch("http://nowhere.example.com/")
    assert failure.kind is FailureKind.DNS


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


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(URLS, min_size=1, max_size=10))
def test_no_url_makes_fetch_raise(urls):
    async def run():
        async with Fetcher(limits=QUICK, lookup=refuse) as fetcher:
            for url in urls:
                answer = await fetcher.fetch(url)
                assert isinstance(answer, Failure)
                assert answer.detail.isprintable()

    asyncio.run(run())


def test_impossible_limits_are_a_config_error():
    with pytest.raises(ConfigError, match="limits.max_bytes: 0 is less than 1"):
        Limits(max_bytes=0)
