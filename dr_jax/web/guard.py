"""The address policy: which URLs may be asked for, and which addresses may be dialled.

A model chooses the URLs, on machines that hold cloud credentials. So the table below is checked three times: on the URL
of each hop (`admit`), on what the resolver returned (one denied record refuses the name) and on the address of the
socket about to connect, which nothing can get around: not an IP literal, not a redirect, not a name that resolves
differently the second time. `ipaddress.is_global` is not the policy: it differs between Python versions, and calls
NAT64 and 6to4 forms of the metadata server global.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import ipaddress
import re
import socket
from collections.abc import Callable, Mapping, Sequence

import aiohttp
import aiohttp.abc
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.text import MAX_URL_CHARS

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Hosts = Mapping[str, tuple[str, int]]  # name -> (ip, port), as curl's --connect-to
Lookup = Callable[[str], Sequence[str]]  # name -> addresses; may block, runs in a thread

DENIED: tuple[Network, ...] = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4",
        # IPv6: all but 2000::/3, which takes in loopback, NAT64, link-local, unique-local and multicast ...
        "::/3", "4000::/2", "8000::/1",
        # ... and, inside 2000::/3: Teredo and its neighbours, documentation, 6to4.
        "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20",
    )
)  # fmt: skip

_DENIED_NAMES = re.compile(r"(?:^|\.)(?:localhost|internal|local|metadata)$")
# Two labels or more, and a last one that no C library reads as a number (0x7f.1 is 127.0.0.1 to some).
_NAME = re.compile(r"(?:(?!-)[a-z0-9_-]{1,63}(?<!-)\.)+[a-z][a-z0-9-]{0,62}")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


class BlockedAddress(PermissionError):
    """An address the policy refuses to dial. An OSError, so that it passes through aiohttp as one."""


@dataclasses.dataclass(frozen=True)
class AddressPolicy:
    """What may be dialled. There is no switch that allows private addresses: an endpoint of one's own is listed, name,
    address and port, in the `hosts` of whoever may reach it."""

    denied: tuple[Network, ...] = DENIED
    ports: frozenset[int] = frozenset({80, 443})
    blocked_domains: frozenset[str] = frozenset()  # with everything under them; e.g. sites that print a benchmark

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocked_domains", frozenset(map(_domain, self.blocked_domains)))

    def blocked_domain(self, host: str) -> str | None:
        """The domain in `blocked_domains` that `host` is or lies under, or None."""
        if not self.blocked_domains:
            return None
        labels = site_name(host).split(".")
        return next((d for i in range(len(labels)) if (d := ".".join(labels[i:])) in self.blocked_domains), None)

    def denial(self, address: str) -> str | None:
        """Why `address` must not be dialled, or None."""
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return "not an IP address"
        if isinstance(ip, ipaddress.IPv6Address):
            if ip.scope_id is not None:
                return "an address with a zone"
            ip = ip.ipv4_mapped or ip
        network = next((network for network in self.denied if ip in network), None)
        return f"in {network}" if network else None


def admit(url: str | URL, policy: AddressPolicy, hosts: Hosts) -> URL | Failure:
    """`url` parsed, or why it may not be asked for. What is checked is what aiohttp will use: its own normal form."""
    if isinstance(url, str) and (len(url) > MAX_URL_CHARS or _UNPRINTABLE.search(url.strip())):
        return Failure(FailureKind.BAD_URL, f"longer than {MAX_URL_CHARS} characters, or control characters")
    try:
        parsed = URL(url.strip()) if isinstance(url, str) else url
        scheme, host, port, user = parsed.scheme, parsed.raw_host, parsed.port, parsed.raw_user
    except (ValueError, IndexError, AssertionError, TypeError) as error:  # what yarl was seen to raise for odd strings
        return Failure(FailureKind.BAD_URL, type(error).__name__)
    if scheme not in ("http", "https") or not host:
        return Failure(FailureKind.BAD_URL, "not an absolute http or https URL")
    if domain := policy.blocked_domain(host):
        return Failure(FailureKind.BLOCKLISTED, domain)
    if user is not None or parsed.raw_password is not None:
        return Failure(FailureKind.BAD_URL, "user names and passwords are never sent")
    if port not in policy.ports:
        return Failure(FailureKind.BLOCKED, f"port {port}")
    if site_name(host) in hosts:
        return parsed
    return _refused_host(host, policy) or parsed


def _domain(entry: str) -> str:
    """`entry` of a blocklist as URLs spell it."""
    name = entry.strip().rstrip(".")
    try:
        host = URL(f"http://{name}").raw_host or ""
    except ValueError:
        host = ""
    if not re.fullmatch(r"[^\s/:@?#*]+", name) or not host:
        raise ConfigError(f"policy.blocked_domains: {entry!r} is no domain; give a name such as 'example.org'")
    return site_name(host)


def site_name(host: str | None) -> str:
    """`host` as it is compared: lower case, without the last dot."""
    return (host or "").lower().removesuffix(".")


def domain(host: str | None) -> str:
    """The last two labels of a name, the whole of an address: hosts that may belong together share it."""
    name = site_name(host)
    return name if ":" in name or name.replace(".", "").isdigit() else ".".join(name.split(".")[-2:])


def _refused_host(host: str, policy: AddressPolicy) -> Failure | None:
    if ":" in host or host.replace(".", "").isdigit():
        denial = policy.denial(host)
        return Failure(FailureKind.BLOCKED, f"address {denial}") if denial else None
    name = site_name(host)
    if _DENIED_NAMES.search(name) or "." not in name:
        return Failure(FailureKind.BLOCKED, "a local name")
    return None if _NAME.fullmatch(name) else Failure(FailureKind.BAD_URL, "not a host name")


def check_hosts(hosts: Hosts) -> dict[str, tuple[str, int]]:
    """`hosts` with normal names; ConfigError for an entry that is not name -> (ip, port)."""
    for name, (address, port) in hosts.items():
        try:
            ipaddress.ip_address(address)
        except ValueError as error:
            raise ConfigError(f"hosts[{name!r}]: {address!r} is not an IP address; give (ip, port)") from error
        if not 0 < port < 65536:
            raise ConfigError(f"hosts[{name!r}]: port {port} is not in 1..65535")
    return {site_name(name): endpoint for name, endpoint in hosts.items()}


def system_lookup(host: str) -> list[str]:
    """Every address the system's resolver knows for `host`; `socket.gaierror` where it knows none."""
    try:
        infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    except socket.gaierror as error:
        if error.errno != getattr(socket, "EAI_NODATA", None):
            raise
        # glibc also says so where there is no IPv6 address and the question for IPv4 failed, or was not asked.
        infos = socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
    return [str(info[4][0]) for info in infos]


class GuardedResolver(aiohttp.abc.AbstractResolver):
    """Addresses of a name: its entry in `hosts`, or what `lookup` says if the policy allows every record of it.

    It has threads of its own: resolvers hang, and must not hold the threads in which pages are parsed."""

    def __init__(self, policy: AddressPolicy, hosts: Hosts, *, timeout_s: float, lookup: Lookup = system_lookup):
        self._policy, self._hosts, self._timeout_s, self._lookup = policy, hosts, timeout_s, lookup
        self._threads = concurrent.futures.ThreadPoolExecutor(max_workers=32, thread_name_prefix="dns")

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[aiohttp.abc.ResolveResult]:
        if endpoint := self._hosts.get(site_name(host)):
            return [_record(host, *endpoint)]
        try:
            async with asyncio.timeout(self._timeout_s):
                addresses = await asyncio.get_running_loop().run_in_executor(self._threads, self._lookup, host)
        except TimeoutError as error:
            raise OSError(f"no answer from the resolver in {self._timeout_s} s") from error
        for address in addresses:
            if denial := self._policy.denial(address):
                raise BlockedAddress(f"{host} resolves to an address {denial}")
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        return [_record(host, address, port) for address in dict.fromkeys(addresses)]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _record(host: str, address: str, port: int) -> aiohttp.abc.ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": numeric}


def guarded_connector(
    policy: AddressPolicy, hosts: Hosts, *, dns_timeout_s: float, lookup: Lookup = system_lookup
) -> aiohttp.TCPConnector:
    """A connector that dials nothing but the endpoints listed in `hosts` and what the policy allows."""
    endpoints = frozenset(hosts.values())

    def open_socket(info: tuple) -> socket.socket:
        family, kind, protocol, _, (address, port, *_) = info
        ours = (address, port) in endpoints
        if not ours and (denial := policy.denial(address)):
            raise BlockedAddress(f"address {denial}")
        connection = socket.socket(family, kind, protocol)
        if not ours and _is_own(connection, address):
            connection.close()
            raise BlockedAddress("an address of this machine")
        return connection

    resolver = GuardedResolver(policy, hosts, timeout_s=dns_timeout_s, lookup=lookup)
    return aiohttp.TCPConnector(resolver=resolver, socket_factory=open_socket, limit=0)  # callers bound concurrency


def _is_own(connection: socket.socket, address: str) -> bool:
    """True where `address` belongs to this machine: the kernel binds a socket to nothing else."""
    try:
        connection.bind((address, 0))
    except OSError:
        return False
    return True
