"""How the search client and the fetcher speak HTTP: one guarded session, capped bodies, errors as values, and retries
that end."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import email.utils
import random
import socket
import ssl
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import aiohttp

from dr_jax import __version__
from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.guard import AddressPolicy, BlockedAddress, Hosts, Lookup, check_hosts, guarded_connector, system_lookup

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """Seconds a request may take. aiohttp's default is one limit of 300 s."""

    dns_s: float = 5.0
    connect_s: float = 5.0
    response_s: float = 15.0  # from asking to the last header, resolving and connecting included
    idle_s: float = 10.0  # between two reads
    total_s: float = 20.0  # redirects and retries included; waiting in our own queue is not

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"timeouts.{name}: {value} is not a positive number of seconds")


def open_session(
    policy: AddressPolicy | None = None,
    hosts: Hosts | None = None,
    *,
    timeouts: Timeouts | None = None,
    contact: str = "",
    accept: str = "*/*",
    lookup: Lookup = system_lookup,
) -> aiohttp.ClientSession:
    """A session that dials only what the policy allows, keeps no cookies, reads no proxy from the environment and does
    not decompress (`read_body` does, with a cap). Open one per purpose: a key goes to its own host's session only.

    Needs a running event loop. `contact`: a URL or address that site owners can write to."""
    timeouts = timeouts or Timeouts()
    connector = guarded_connector(
        policy or AddressPolicy(), check_hosts(hosts or {}), dns_timeout_s=timeouts.dns_s, lookup=lookup
    )
    agent = f"dr_jax/{__version__} (research agent{f'; +{contact}' if contact else ''})"
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        headers={"User-Agent": agent, "Accept": accept, "Accept-Encoding": "gzip, deflate"},
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=timeouts.connect_s, sock_read=timeouts.idle_s),
    )


def own_host(field: str, endpoint: str, address: str) -> dict[str, tuple[str, int]]:
    """`hosts` for an endpoint of one's own: its name and the (ip, port) to dial for it; nothing where `address` is ''.

    Raises:
      ConfigError: `address`, which is what `field` says, is not 'ip:port', or there is no name to dial it for.
    """
    if not address:
        return {}
    ip, _, port = address.rpartition(":")
    name = urllib.parse.urlsplit(endpoint).hostname
    if not name or not port.isdecimal():
        raise ConfigError(
            f"{field}: got {address!r} for endpoint {endpoint!r}; need 'ip:port' beside an endpoint such as "
            "'http://searx.internal/search'"
        )
    return {name: (ip.strip("[]"), int(port))}


class _Inflater:
    """Undoes gzip (one member or several) and deflate (with or without a zlib header), never past a limit."""

    def __init__(self, encoding: str):
        self._encoding = encoding
        self._inflate = None

    def feed(self, chunk: bytes, max_bytes: int) -> bytes:
        out = bytearray()
        while chunk and len(out) < max_bytes:
            if self._inflate is None or self._inflate.eof:
                headless = self._encoding == "deflate" and chunk[0] & 0x0F != 8
                self._inflate = zlib.decompressobj(-zlib.MAX_WBITS if headless else zlib.MAX_WBITS | 32)
            out += self._inflate.decompress(chunk, max_bytes - len(out))
            chunk = self._inflate.unconsumed_tail or self._inflate.unused_data
        return bytes(out)

    @property
    def complete(self) -> bool:
        return self._inflate is None or self._inflate.eof


async def read_body(response: aiohttp.ClientResponse, max_bytes: int, *, cut: bool = False) -> bytes | Failure:
    """The decoded body; as soon as it passes `max_bytes`, on the wire or decoded, TOO_LARGE or, with `cut`, what came
    until there."""
    encoding = ", ".join(response.headers.getall("Content-Encoding", ())).strip().lower().removeprefix("x-")
    if encoding not in ("", "identity", "gzip", "deflate"):
        return Failure(FailureKind.UNSUPPORTED_ENCODING, "only one of gzip and deflate")
    inflater = _Inflater(encoding) if encoding in ("gzip", "deflate") else None
    parts, wire_bytes, size = [], 0, 0
    while chunk := await response.content.readany():
        wire_bytes += len(chunk)
        try:
            parts.append(inflater.feed(chunk, max_bytes + 1 - size) if inflater else chunk)
        except zlib.error:
            return Failure(FailureKind.PROTOCOL_ERROR, f"corrupt {encoding}")
        size += len(parts[-1])
        if max(wire_bytes, size) > max_bytes:
            return (
                b"".join(parts)[:max_bytes] if cut else Failure(FailureKind.TOO_LARGE, f"more than {max_bytes} bytes")
            )
    if inflater and not inflater.complete:
        return Failure(FailureKind.TRUNCATED, f"{encoding} ends too early")
    return b"".join(parts)


# What a resolver says when it has looked and there is nothing; the rest (EAI_AGAIN, EAI_FAIL) is its own failure.
_NO_SUCH_HOST = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})

# In order: the first row whose type fits decides. Everything else is PROTOCOL_ERROR.
_KINDS: tuple[tuple[type[BaseException], FailureKind], ...] = (
    (BlockedAddress, FailureKind.BLOCKED),
    (TimeoutError, FailureKind.TIMEOUT),
    (aiohttp.ClientConnectorDNSError, FailureKind.DNS),
    (aiohttp.ClientSSLError, FailureKind.TLS),
    (ssl.SSLError, FailureKind.TLS),
    (aiohttp.InvalidURL, FailureKind.BAD_URL),
    (aiohttp.NonHttpUrlClientError, FailureKind.BAD_URL),
    (UnicodeError, FailureKind.BAD_URL),
    (aiohttp.http_exceptions.ContentLengthError, FailureKind.TRUNCATED),
    (aiohttp.http_exceptions.TransferEncodingError, FailureKind.PROTOCOL_ERROR),
    (aiohttp.ClientConnectionError, FailureKind.CONNECTION),
    (OSError, FailureKind.CONNECTION),
)


def failure_of(error: Exception) -> Failure:
    """`error`, raised while asking a server, as a value. Its text stays behind: it can hold headers, and so a key."""
    cause = error
    if isinstance(error, aiohttp.ClientConnectorError) and isinstance(error.os_error, BlockedAddress):
        cause = error.os_error
    elif isinstance(error, aiohttp.ClientPayloadError) and error.__cause__ is not None:
        cause = error.__cause__
    elif isinstance(error, aiohttp.ClientConnectorDNSError) and error.os_error.errno in _NO_SUCH_HOST:
        return Failure(FailureKind.NO_SUCH_HOST)
    kind = next((kind for kinds, kind in _KINDS if isinstance(cause, kinds)), FailureKind.PROTOCOL_ERROR)
    return Failure(kind, type(cause).__name__)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that `Retry-After` asks for, as a number or a date; None where it is absent or makes no sense."""
    value = headers.get("Retry-After", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        when = email.utils.parsedate_to_datetime(value)
        seconds = when.timestamp() - datetime.datetime.now(datetime.UTC).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(seconds, 0.0)


async def retry(
    attempt: Callable[[], Awaitable[T | Failure]],
    *,
    retryable: Callable[[Failure], bool],
    retries: int,
    backoff_s: float,
    max_wait_s: float = 60.0,
) -> T | Failure:
    """The first answer that is not a retryable failure, or the last failure. Waits `backoff_s`, doubling, with jitter,
    or what the server asked for; a server that asks for more than `max_wait_s` is not asked again."""
    turn = 0
    while isinstance(answer := await attempt(), Failure) and retryable(answer):
        wait_s = pause_s(answer, turn, retries=retries, backoff_s=backoff_s, max_wait_s=max_wait_s)
        if wait_s is None:
            break
        await asyncio.sleep(wait_s)
        turn += 1
    return answer


def pause_s(failure: Failure, turn: int, *, retries: int, backoff_s: float, max_wait_s: float) -> float | None:
    """Seconds to wait after `failure`, which `turn` others came before; None where it is the last answer."""
    if turn == retries:
        return None
    wait_s = max(backoff_s * 2**turn * random.uniform(0.5, 1.5), failure.retry_after_s or 0.0)
    return None if wait_s > max_wait_s else wait_s
