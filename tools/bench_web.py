"""What the web room costs, over loopback: `python tools/bench_web.py [--json] [--pages 2000] [--only cache]`.

Ratios compare with raw aiohttp on the same pages in the same run, in turns; every figure comes from a fresh process,
the pages from a server in another. Needs `openssl` for a certificate. Prints a table, with `--json` one line of JSON
after it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import gzip
import json
import os
import pathlib
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable

import aiohttp
import bench_parse
from instruments import lag_ms, memory_mb, p99

from dr_jax import world
from dr_jax.agent.chat import Chat
from dr_jax.agent.presets import PRESETS
from dr_jax.records import Failure, Page
from dr_jax.web.cache import Cache
from dr_jax.web.fetch import Fetcher, Limits
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.http import Timeouts
from dr_jax.web.page import Response, extract
from dr_jax.web.workers import ParserPool

_BODY = bench_parse.padded(bench_parse.page()).body
_TOKENIZER = pathlib.Path(world.__file__).parent / "checkpoint"
_RESPONSE = Response("http://good.test/", "text/html; charset=utf-8", _BODY)
_BOMB_BYTES = 64 << 20  # that a few KB of gzip become
_AT_ONCE = 128
_IN_FLIGHT = 1024
_DELAY_S = 1.0


# The server ---------------------------------------------------------------------------------------------------------


def _head(*headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", "Content-Type: text/html", "Connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


_PAGE = _head(f"Content-Length: {len(_BODY)}") + _BODY
_HOSTILE = {
    "bomb": _head("Content-Encoding: gzip") + gzip.compress(bytes(1 << 20), 9) * (_BOMB_BYTES >> 20),
    "cut": _head("Content-Length: 99999") + b"half",
    "no http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "long header": _head("X: " + "x" * 100_000) + b"x",
    "loop": _head("Location: again", status="302 Found"),
    "denied address": _head("Location: http://127.0.0.1:{canary}/", status="302 Found"),
    "denied name": _head("Location: http://rebind.test:{canary}/", status="302 Found"),
    "metadata": _head("Location: http://169.254.169.254/latest", status="302 Found"),
    "error": _head("Content-Length: 0", status="500 Oops"),
    "endless": _head(),
    "silent": b"",
}


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """/page, /slow, or /hostile/<number>/<canary's port>."""
    with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
        request = await reader.readuntil(b"\r\n\r\n")
        _, kind, *rest = request.split()[1].decode().split("/")
        if kind == "hostile":
            name = list(_HOSTILE)[int(rest[0]) % len(_HOSTILE)]
            writer.write(_HOSTILE[name].replace(b"{canary}", rest[1].encode()))
            while name == "endless":
                writer.write(b"x" * 65536)
                await writer.drain()
            if name == "silent":
                await reader.read()
        else:
            if kind == "slow":
                await asyncio.sleep(_DELAY_S)
            writer.write(_PAGE)
        await writer.drain()
    writer.close()


async def _serve(certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    servers = [await asyncio.start_server(_answer, "127.0.0.1", 0, backlog=4096, ssl=tls) for tls in (None, context)]
    print(*(server.sockets[0].getsockname()[1] for server in servers), flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent is gone
    os._exit(0)


# What is measured ---------------------------------------------------------------------------------------------------


Answered = tuple[str, object, float]  # url, answer, seconds


async def _each(
    urls: list[str], fetch: Callable[[str], Awaitable[object]], at_once: int, done: Callable[[Answered], object]
) -> None:
    """Fetches all, `at_once` in flight, and tells `done` of each."""
    left = iter(urls)

    async def work() -> None:
        for url in left:
            start_s = time.monotonic()
            answer = await fetch(url)
            done((url, answer, time.monotonic() - start_s))

    await asyncio.gather(*(work() for _ in range(at_once)))


async def _all(urls: list[str], fetch: Callable[[str], Awaitable[object]], at_once: int) -> list[Answered]:
    answers = []
    await _each(urls, fetch, at_once, answers.append)
    return answers


async def _rate(urls: list[str], fetch: Callable[[str], Awaitable[object]], at_once: int) -> float:
    start_s = time.monotonic()
    answers = await _all(urls, fetch, at_once)
    seconds = time.monotonic() - start_s
    assert {answer for _, answer, _ in answers} == {len(_BODY)}
    return len(urls) / seconds


def _fetcher(port: int, *, policy: AddressPolicy | None = None, at_once: int = _AT_ONCE) -> Fetcher:
    limits = Limits(
        max_concurrent=at_once, max_per_site=at_once, retries=0, break_after=10**9, timeouts=Timeouts(total_s=5.0)
    )
    hosts = {name: ("127.0.0.1", port) for name in ("good.test", "bad.test")}
    return Fetcher(policy, hosts, limits=limits, lookup=lambda _: ["127.0.0.1"])


async def _size(fetcher: Fetcher, url: str) -> int | Failure:
    """Bytes of the page; the page itself is let go, so that memory is the fetcher's."""
    answer = await fetcher.fetch(url)
    return answer if isinstance(answer, Failure) else len(answer.body)


async def guarded_vs_raw(scheme: str, port: int, pages: int, rounds: int = 20) -> dict[str, float]:
    """Pages per second of the fetcher and of raw aiohttp, a new connection each, and the ratio of the medians.

    The two take turns, many and short ones, and each goes first in every other round: what disturbs the machine for a
    moment (a collection of garbage, a neighbour) falls on few rounds of either."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session, _fetcher(port) as fetcher:

        async def raw(url: str) -> int:
            async with session.get(url) as response:
                return len(await response.read())

        sides = {
            "guarded": (f"{scheme}://good.test/page", functools.partial(_size, fetcher)),
            "raw": (f"{scheme}://127.0.0.1:{port}/page", raw),
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds):
            for name in sorted(sides, reverse=number % 2 == 0):
                url, fetch = sides[name]
                rates[name].append(await _rate([url] * (pages // 4), fetch, _AT_ONCE))
    guarded_per_s, raw_per_s = (statistics.median(rates[name]) for name in ("guarded", "raw"))
    return {"ratio": guarded_per_s / raw_per_s, "guarded_per_s": guarded_per_s, "raw_per_s": raw_per_s}


async def in_flight_1024(port: int, pages: int) -> dict[str, float]:
    """Fetches from a server that takes a second to answer, 1,024 at once."""
    async with _fetcher(port, at_once=_IN_FLIGHT) as fetcher, lag_ms() as lags:
        rate = await _rate(
            ["http://good.test/slow"] * max(pages, 4 * _IN_FLIGHT), functools.partial(_size, fetcher), _IN_FLIGHT
        )
    return {"pages_per_s": rate, "rss_mb": memory_mb("VmHWM"), "lag_p99_ms": p99(lags)}


async def hostile(port: int, pages: int) -> dict[str, float]:
    """Three of ten fetches go to a server that does its worst; the others are compared with the same without it."""
    reached = 0

    def canary(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal reached
        reached += 1
        writer.close()

    async with await asyncio.start_server(canary, "127.0.0.1", 0) as server:
        denied = server.sockets[0].getsockname()[1]
        policy = AddressPolicy(ports=frozenset({80, 443, denied}))  # its address alone protects it
        mixed = [
            f"http://bad.test/hostile/{i}/{denied}" if i % 10 < 3 else "http://good.test/page" for i in range(pages)
        ]
        async with _fetcher(port, policy=policy) as fetcher:
            fetch = functools.partial(_size, fetcher)
            clean = await _all(["http://good.test/page"] * pages, fetch, _AT_ONCE)
            before_mb = memory_mb("VmHWM")
            async with lag_ms() as lags:
                answers = await _all(mixed, fetch, _AT_ONCE)
    healthy = [(answer, seconds) for url, answer, seconds in answers if url.endswith("/page")]
    return {
        "healthy_ok": sum(answer == len(_BODY) for answer, _ in healthy) / len(healthy),
        "p99_ratio": p99([seconds for _, seconds in healthy]) / p99([seconds for *_, seconds in clean]),
        "rss_mb": memory_mb("VmHWM") - before_mb,
        "lag_max_ms": max(lags),
        "denied_reached": reached,
    }


async def fetch_and_parse(port: int, pages: int) -> dict[str, float]:
    """Pages fetched and extracted in two parser processes, which share two cores with everything else here."""
    async with _fetcher(port) as fetcher, ParserPool(2) as pool:

        async def browse(url: str) -> int:
            answer = await fetcher.fetch(url)
            return answer if isinstance(answer, Failure) else len((await pool.extract(answer)).segments)

        await _all(["http://good.test/page"] * 16, browse, 16)  # the workers have started
        start_s = time.monotonic()
        answers = await _all(["http://good.test/page"] * pages, browse, _AT_ONCE)
        seconds = time.monotonic() - start_s
    assert {answer for _, answer, _ in answers} == {len(extract(_RESPONSE).segments)}
    return {"pages_per_s": pages / seconds}


async def soak(port: int, fetches: int) -> dict[str, float]:
    """One of ten fetches hostile, for long: what grows between a tenth of the way and the end."""
    urls = [f"http://bad.test/hostile/{i // 10}/1" if i % 10 == 0 else "http://good.test/page" for i in range(fetches)]
    async with _fetcher(port) as fetcher:
        states = []
        for part in (urls[: fetches // 10], urls[fetches // 10 :]):
            await _each(part, functools.partial(_size, fetcher), _AT_ONCE, lambda _: None)
            await asyncio.sleep(0.1)  # closed connections are noticed
            states.append((memory_mb("VmRSS"), len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())))
    rss_mb, fds, tasks = (after - before for before, after in zip(*states, strict=True))
    return {"rss_mb_per_10k": rss_mb / (0.9 * fetches / 10_000), "fds": fds, "tasks": tasks}


def parse() -> dict[str, float]:
    """How dense the page is, and the same figure for real pages of its size where there are any."""
    figures = {"dense_elements": bench_parse.elements([_RESPONSE])}
    if real := bench_parse.documentation():
        rate = bench_parse.inline(real, 5.0)
        figures |= {"documentation_per_s_core": rate, "documentation_elements": bench_parse.elements(real)}
    return figures


def observation(tokenizer: str) -> dict[str, float]:
    """Milliseconds in which a page becomes 8,192 tokens of a prompt."""
    chat, preset = Chat.load(tokenizer), dataclasses.replace(PRESETS["deepresearcher"], observation_tokens=8192)
    text = "\n".join(extract(_RESPONSE).segments) * 4
    times_ms = []
    for _ in range(200):
        start_s = time.monotonic()
        chat.reply(preset, [], text)
        times_ms.append(1e3 * (time.monotonic() - start_s))
    return {"encode_p99_ms": p99(times_ms), "encode_median_ms": statistics.median(times_ms)}


async def cache(pages: int) -> dict[str, float]:
    """Writes, then verified reads, of pages of 50 KB, 64 at once."""
    text = (_BODY.decode() * 2)[: 50 << 10]
    page = Page("http://good.test/", "Arn", tuple(text[i : i + 4000] for i in range(0, len(text), 4000)))

    async def ask() -> Page:
        return page

    with tempfile.TemporaryDirectory() as folder:
        async with Cache(pathlib.Path(folder) / "web.sqlite") as kept:
            rates = []
            for _ in range(2):
                numbers, start_s = map(str, range(pages)), time.monotonic()
                await _all(list(numbers), lambda number: kept.through({"n": number}, ask), 64)
                rates.append(pages / (time.monotonic() - start_s))
            assert kept.stats()["hits"] == kept.stats()["misses"] == pages
    return {"hits_per_s": rates[1], "writes_per_s": rates[0]}


def _measure(name: str, ports: tuple[int, int], options: argparse.Namespace) -> object:
    pages = options.pages
    if name == "parse_pages_per_s_core":
        return bench_parse.inline([_RESPONSE], 5.0)
    if name == "parse":
        return parse()
    if name == "observation":
        return observation(options.tokenizer)
    return asyncio.run(
        {
            "guarded_vs_raw": lambda: guarded_vs_raw("http", ports[0], pages),
            "guarded_vs_raw_tls": lambda: guarded_vs_raw("https", ports[1], pages),
            "in_flight_1024": lambda: in_flight_1024(ports[0], pages),
            "fetch_and_parse": lambda: fetch_and_parse(ports[0], pages),
            "soak": lambda: soak(ports[0], options.soak_fetches),
            "hostile": lambda: hostile(ports[0], pages),
            "cache": lambda: cache(pages),
        }[name]()
    )


# The command --------------------------------------------------------------------------------------------------------

FIGURES = (
    *("guarded_vs_raw", "guarded_vs_raw_tls", "parse_pages_per_s_core", "parse", "fetch_and_parse", "in_flight_1024"),
    *("hostile", "observation", "cache", "soak"),
)


def _certificate(folder: str) -> str:
    path = f"{folder}/server.pem"
    names = "subjectAltName=DNS:good.test,IP:127.0.0.1"
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", f"{path}.key")
    command = ("openssl", "req", "-x509", *key, "-out", path, "-days", "1", "-subj", "/CN=good.test", "-addext", names)
    subprocess.run(command, check=True, capture_output=True)
    with open(path, "a") as both:
        both.write(pathlib.Path(f"{path}.key").read_text())
    return path


def run(options: argparse.Namespace) -> dict[str, object]:
    """The figures, each from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        certificate = _certificate(folder)
        here = (sys.executable, __file__)
        with subprocess.Popen([*here, "--serve", certificate], stdin=-1, stdout=-1, text=True) as server:
            ports = server.stdout.readline().split()
            asked = [f"--{name}={getattr(options, name)}" for name in ("pages", "soak_fetches", "tokenizer")]
            trusting = {**os.environ, "SSL_CERT_FILE": certificate}
            return {
                name: json.loads(
                    subprocess.run(
                        [*here, *asked, "--measure", name, *ports],
                        env=trusting,
                        check=True,
                        stdout=subprocess.PIPE,
                    ).stdout
                )
                for name in options.only
            }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one line of JSON after the table")
    parser.add_argument("--pages", type=int, default=2000, help="of each measurement but the soak")
    parser.add_argument("--soak_fetches", type=int, default=100_000)
    parser.add_argument("--tokenizer", default=str(_TOKENIZER), help="a directory; the embedded world's is a small one")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=FIGURES, help="some of the figures")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(_serve(options.serve))
    elif options.measure:
        name, *ports = options.measure
        print(json.dumps(_measure(name, (int(ports[0]), int(ports[1])), options)))
    else:
        _report(run(options), options.json)


def _report(figures: dict[str, object], as_json: bool) -> None:
    for name, value in figures.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in parts:
            print(f"{f'{name} {part}':40} {number:10.3f}")
    if as_json:
        ratios = {name: figures[name]["ratio"] for name in figures if name.startswith("guarded")}
        print(json.dumps({**figures, **ratios}))


if __name__ == "__main__":
    main()
