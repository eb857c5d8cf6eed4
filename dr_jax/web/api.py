"""What every paid API has in common, whatever it is asked: a key that goes to one address, bounded concurrency, retries
that end, a circuit breaker, and errors as values."""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.breaker import Breaker
from dr_jax.web.http import failure_of, read_body, retry, retry_after_s

T = TypeVar("T")

_MAX_ANSWER_BYTES = 1 << 20
RETRYABLE = frozenset({
    FailureKind.RATE_LIMITED, FailureKind.PROVIDER_DOWN, FailureKind.CONNECTION, FailureKind.TIMEOUT, FailureKind.DNS,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer of whatever status, as it came; the body decompressed."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def failure(self, kind: FailureKind, detail: str = "") -> Failure:
        later = kind in (FailureKind.RATE_LIMITED, FailureKind.PROVIDER_DOWN)
        wait_s = retry_after_s(self.headers) if later else None
        return Failure(kind, detail or f"HTTP {self.status}", self.status, wait_s)

    def json(self, path: str) -> Any:
        """What lies at the dotted `path` of a JSON body; None where nothing does."""
        try:
            return dig(json.loads(self.body), path)
        except (ValueError, RecursionError):
            return None


def dig(answer: Any, path: str) -> Any:
    """What lies at a dotted path (`web.results`) of nested objects; None where there is no such place."""
    for name in path.split("."):
        if not isinstance(answer, dict):
            return None
        answer = answer.get(name)
    return answer


def by_status(reply: Reply) -> Failure:
    """What a status means at every API that has no rule of its own for it."""
    match reply.status:
        case 429:
            return reply.failure(FailureKind.RATE_LIMITED)
        case 402:
            return reply.failure(FailureKind.QUOTA_EXHAUSTED, "no credits left")
        case 401 | 403:
            return reply.failure(FailureKind.AUTH, "the key was refused")
        case status if 400 <= status < 500:
            return reply.failure(FailureKind.BAD_REQUEST)
    return reply.failure(FailureKind.PROVIDER_DOWN)


def retryable(failure: Failure) -> bool:
    """True where the same request can succeed a moment later."""
    final = failure.status is not None and 400 <= failure.status < 500 and failure.status not in (408, 429)
    return failure.kind in RETRYABLE and not final


class Api:
    """One endpoint of one provider. Never raises for what it is sent or answered; cancellation passes.

    `session` comes from `http.open_session` and serves this provider alone. An answer that redirects is not followed:
    the key in `headers` goes to `url` and nowhere else. A request holds its slot while it waits to try again, so that a
    provider that asks for less gets less; one that is down is not asked for a while (`breaker`)."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        name: str,
        url: URL,
        *,
        headers: Mapping[str, str],
        timeout_s: float,
        max_concurrent: int,
        retries: int,
        backoff_s: float,
        breaker: Breaker | None = None,
    ):
        self.name, self.url = name, url
        self._session, self._headers = session, {"Accept": "application/json", **headers}
        self._timeout_s, self._retries, self._backoff_s = timeout_s, retries, backoff_s
        self._slots = asyncio.Semaphore(max_concurrent)
        # More in a row than one moment's requests, so that a single hiccup of the network does not open it.
        self._breaker = breaker or Breaker(threshold=2 * max_concurrent, cool_s=15.0)

    async def ask(self, attempt: Callable[[], Awaitable[T | Failure]]) -> T | Failure:
        """What `attempt` comes to, tried again where that can help."""
        async with self._slots:
            refused = self._breaker.admit(self.name)
            if refused:
                return refused
            answer = await retry(attempt, retryable=retryable, retries=self._retries, backoff_s=self._backoff_s)
            failed = isinstance(answer, Failure) and answer.kind in RETRYABLE
            self._breaker.record(self.name, failed)
        return answer

    async def send(self, method: str, request: Mapping[str, Any]) -> Reply | Failure:
        """One request: `request` as the query string (GET) or as JSON (POST)."""
        sent: dict[str, Any] = {"params" if method == "GET" else "json": request}
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.request(
                    method, self.url, headers=self._headers, allow_redirects=False, **sent
                ) as response,
            ):
                body = await read_body(response, _MAX_ANSWER_BYTES)
                return _broken(body) if isinstance(body, Failure) else Reply(response.status, response.headers, body)
        # The border: what aiohttp raises for a broken provider is not a closed list.
        except Exception as error:  # noqa: BLE001
            return _broken(failure_of(error))


def _broken(failure: Failure) -> Failure:
    """`failure` of a provider: where a page would be at fault, a provider is down."""
    return (
        failure if failure.infrastructure else Failure(FailureKind.PROVIDER_DOWN, f"{failure.kind}: {failure.detail}")
    )


def check_key(key: str, complaint: str) -> str:
    """`key`, if a header can hold it; a `ConfigError` that says `complaint`, and not the key, where it cannot."""
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(complaint)
    return key


def check_endpoint(field: str, endpoint: str, name: str, *, keyed: bool) -> URL:
    """`endpoint`, if what is sent there is safe: https, or plain http to this machine (a key never leaves it), or,
    where there is no key, to a name or address of the own network. `field` and `name` stand in the error."""
    try:
        url = URL(endpoint)
    except ValueError:
        url = URL()
    if not url.raw_host or url.scheme not in ("http", "https") or url.raw_user is not None:
        raise ConfigError(f"{field}: {name} needs an http(s) URL without user or password")
    if url.scheme == "https" or _is_this_machine(url.raw_host):
        return url
    if keyed:
        raise ConfigError(f"{field}: {endpoint!r} would send the key in the clear; use https")
    if not _is_own_network(url.raw_host):
        raise ConfigError(f"{field}: {endpoint!r}: anybody on the way could change the results; use https")
    return url


def _is_this_machine(host: str) -> bool:
    # .test can never be a public name (RFC 6761): it is where a world of one's own is mapped to.
    address = _address(host)
    return address.is_loopback if address else host == "localhost" or host.endswith((".localhost", ".test"))


def _is_own_network(host: str) -> bool:
    address = _address(host)
    own_name = "." not in host or host.endswith((".internal", ".local", ".home.arpa"))
    return address.is_private if address else own_name


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
