from __future__ import annotations

import socket

import aiohttp
import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.guard import (
    AddressPolicy,
    BlockedAddress,
    GuardedResolver,
    admit,
    check_hosts,
    domain,
    guarded_connector,
)

POLICY = AddressPolicy()

# Each range with its two ends, and the nearest addresses outside it.
DENIED = str.split("""
    0.0.0.0 0.255.255.255  10.0.0.0 10.255.255.255  100.64.0.0 100.127.255.255  127.0.0.1 127.255.255.255
    169.254.0.0 169.254.169.254 169.254.255.255  172.16.0.0 172.31.255.255  192.0.0.0 192.0.0.255  192.0.2.1
    192.88.99.0 192.88.99.255  192.168.0.0 192.168.255.255  198.18.0.0 198.19.255.255  198.51.100.7  203.0.113.255
    224.0.0.1 239.255.255.255  240.0.0.0 255.255.255.255
    :: ::1 ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:a9fe:a9fe ::ffff:10.1.2.3 64:ff9b::a9fe:a9fe 64:ff9b:1::1 100::1
    1fff:ffff::1 2001::1 2001:1ff:ffff::1 2001:db8::1 2002:a9fe:a9fe::1 3fff::1 3fff:fff::1 4000::1 fc00::1 fd20:ce::254
    fe80::1 fe80::1%eth0 2600::1%1 fec0::1 ff02::1
    0177.0.0.1 127.1 2130706433 0x7f000001 localhost 1.2.3 1.2.3.4.5 1.2.3.256
""")
ALLOWED = str.split("""
    1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 169.255.0.0
    172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.0.3.0 192.88.98.255 192.88.100.0 192.167.255.255 192.169.0.0
    198.17.255.255 198.20.0.0 198.51.99.255 198.51.101.0 203.0.112.255 203.0.114.0 223.255.255.255 ::ffff:8.8.8.8
    2000::1 2001:200::1 2001:db7:ffff::1 2001:db9::1 2001:ffff::1 2003::1 2606:4700::1111 3ffe:ffff::1
""")


@pytest.mark.parametrize("address", DENIED)
def test_denied_address(address):
    assert POLICY.denial(address)


@pytest.mark.parametrize("address", ALLOWED)
def test_neighbour_of_a_denied_range_is_allowed(address):
    assert POLICY.denial(address) is None


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("http://169.254.169.254/computeMetadata/v1/", FailureKind.BLOCKED),
        ("http://[::ffff:a9fe:a9fe]/", FailureKind.BLOCKED),
        ("http://[64:ff9b::a9fe:a9fe]/", FailureKind.BLOCKED),
        ("http://[fe80::1%25eth0]/", FailureKind.BLOCKED),
        ("http://１２７.0.0.2/", FailureKind.BLOCKED),
        ("http://127。0。0。2/", FailureKind.BLOCKED),
        ("http://①②⑦.⓪.⓪.②/", FailureKind.BLOCKED),
        ("http://2130706433/", FailureKind.BLOCKED),
        ("http://127.2/", FailureKind.BLOCKED),
        ("http://0x7f000002/", FailureKind.BLOCKED),
        ("http://0x7f.0.0.2/", FailureKind.BAD_URL),
        ("http://1.0x7f/", FailureKind.BAD_URL),
        ("http://localhost/", FailureKind.BLOCKED),
        ("http://a.localhost/", FailureKind.BLOCKED),
        ("http://metadata/", FailureKind.BLOCKED),
        ("http://METADATA.google.internal./", FailureKind.BLOCKED),
        ("http://printer.local/", FailureKind.BLOCKED),
        ("http://intranet/", FailureKind.BLOCKED),
        ("http://example.com:22/", FailureKind.BLOCKED),
        ("http://example.com:8476/", FailureKind.BLOCKED),
        ("file:///etc/passwd", FailureKind.BAD_URL),
        ("ftp://example.com/", FailureKind.BAD_URL),
        ("javascript:alert(1)", FailureKind.BAD_URL),
        ("data:text/html,x", FailureKind.BAD_URL),
        ("//example.com/", FailureKind.BAD_URL),
        ("example.com", FailureKind.BAD_URL),
        ("", FailureKind.BAD_URL),
        ("http://", FailureKind.BAD_URL),
        ("http://[", FailureKind.BAD_URL),
        ("http://user@example.com/", FailureKind.BAD_URL),
        ("http://user:password@example.com/", FailureKind.BAD_URL),
        ("http://:password@example.com/", FailureKind.BAD_URL),
        ("http://exa\tmple.com/", FailureKind.BAD_URL),
        ("http://example.com/\ud800", FailureKind.BAD_URL),
        ("http://exa}b.com/", FailureKind.BAD_URL),
        ("http://example.com%00.evil.test/", FailureKind.BAD_URL),
        ("http://example.com:99999/", FailureKind.BAD_URL),
        ("http://example.com\\@evil.test/", FailureKind.BAD_URL),
        ("http://example.com/" + "a" * 2048, FailureKind.BAD_URL),
    ],
)
def test_refused_url(url, kind):
    refused = admit(url, POLICY, {})
    assert isinstance(refused, Failure)
    assert refused.kind is kind


@pytest.mark.parametrize(
    ("url", "normal"),
    [
        ("http://example.com/a b?q=1", "http://example.com/a%20b?q=1"),
        (" https://EXAMPLE.com:443/ ", "https://example.com/"),
        ("http://bücher.de/ä", "http://xn--bcher-kva.de/%C3%A4"),
        ("http://8.8.8.8/", "http://8.8.8.8/"),
        ("http://my_blog.example.com./", "http://my_blog.example.com./"),
        ("http://lore.test/wiki", "http://lore.test/wiki"),
        ("http://localdomain.internal.example.org/", "http://localdomain.internal.example.org/"),
        ("http://example.com/" + "a" * (2048 - 19), "http://example.com/" + "a" * (2048 - 19)),
    ],
)
def test_admitted_url(url, normal):
    assert str(admit(url, POLICY, {})) == normal


def test_a_listed_host_is_exempt_by_its_name_alone():
    hosts = check_hosts({"Search.Local.": ("127.0.0.1", 8080)})
    assert str(admit("http://search.local/x", POLICY, hosts)) == "http://search.local/x"
    for url in ("http://search.local:22/", "http://127.0.0.1/", "http://a.search.local/"):
        assert admit(url, POLICY, hosts).kind is FailureKind.BLOCKED


@pytest.mark.parametrize(
    ("host", "blocked"),
    [
        ("example.org", True),
        ("a.b.example.org", True),
        ("EXAMPLE.org.", True),
        ("notexample.org", False),
        ("example.org.evil.com", False),
        ("org", False),
        ("b\u00fccher.de", True),
        ("www.xn--bcher-kva.de", True),
        ("10.0.0.1", True),
    ],
)
def test_a_blocked_domain_is_its_whole_tree_and_nothing_else(host, blocked):
    policy = AddressPolicy(blocked_domains=frozenset({"Example.org.", "b\u00fccher.de", "10.0.0.1"}))
    refused = admit(f"http://{host}/", policy, {})
    assert (isinstance(refused, Failure) and refused.kind is FailureKind.BLOCKLISTED) == blocked


@pytest.mark.parametrize("entry", ["", "http://example.org", "example.org/page", "*.example.org", "a b", "user@host"])
def test_an_entry_that_is_no_domain_is_a_config_error(entry):
    with pytest.raises(ConfigError, match="policy.blocked_domains"):
        AddressPolicy(blocked_domains=frozenset({entry}))


@pytest.mark.parametrize("endpoint", [("localhost", 80), ("127.0.0.1", 0), ("127.0.0.1", 65536)])
def test_a_bad_entry_in_hosts_is_a_config_error(endpoint):
    with pytest.raises(ConfigError, match="hosts\\['a.test'\\]"):
        check_hosts({"a.test": endpoint})


@pytest.mark.parametrize(
    "addresses",
    [["10.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["2606:4700::1111", "fe80::1%eth0"], ["8.8.8.8", "::ffff:127.0.0.1"]],
)
async def test_one_denied_record_refuses_the_name(addresses):
    resolver = GuardedResolver(POLICY, {}, timeout_s=1, lookup=lambda _: addresses)
    with pytest.raises(BlockedAddress):
        await resolver.resolve("mixed.example.com", 80)
    await resolver.close()


async def test_resolver_returns_checked_records_and_the_port_of_listed_hosts():
    resolver = GuardedResolver(
        POLICY, {"a.test": ("127.0.0.1", 81)}, timeout_s=1, lookup=lambda _: ["8.8.8.8", "2606::1"]
    )
    records = await resolver.resolve("b.example.com", 443)
    assert [(r["host"], r["port"], r["family"]) for r in records] == [
        ("8.8.8.8", 443, socket.AF_INET),
        ("2606::1", 443, socket.AF_INET6),
    ]
    assert [(r["host"], r["port"]) for r in await resolver.resolve("A.test.", 443)] == [("127.0.0.1", 81)]
    await resolver.close()


@pytest.mark.parametrize("literal", ["127.0.0.2", "[::ffff:127.0.0.2]", "①②⑦.0.0.2"])
async def test_the_socket_is_the_last_guard(serve, literal):
    """aiohttp asks no resolver about IP literals, and follows redirects by itself: the socket must refuse."""
    canary = await serve(b"", host="127.0.0.2")
    front = await serve(f"HTTP/1.1 302 Found\r\nLocation: http://{literal}:{canary.port}/\r\n\r\n".encode())
    connector = guarded_connector(POLICY, {"front.test": ("127.0.0.1", front.port)}, dns_timeout_s=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        for url in (f"http://{literal}:{canary.port}/", "http://front.test/"):
            with pytest.raises(aiohttp.ClientConnectorError) as caught:
                await session.get(url)
            assert isinstance(caught.value.os_error, BlockedAddress)
    assert front.connections == 1
    assert canary.connections == 0


async def test_rebinding_reaches_nothing(serve):
    """The lookup that is checked is the lookup that is used."""
    canary = await serve(b"", host="127.0.0.2")
    answers = iter(["8.8.8.8", "127.0.0.2"])
    connector = guarded_connector(POLICY, {}, dns_timeout_s=1, lookup=lambda _: [next(answers)])
    assert admit("http://rebind.example.com/", POLICY, {})  # the first, harmless answer is never asked for
    async with aiohttp.ClientSession(connector=connector) as session:
        with pytest.raises((aiohttp.ClientError, AssertionError)):  # 8.8.8.8: the suite's own fuse
            await session.get(f"http://rebind.example.com:{canary.port}/")
        connector.clear_dns_cache()
        with pytest.raises(aiohttp.ClientConnectorDNSError):
            await session.get(f"http://rebind.example.com:{canary.port}/")
    assert canary.connections == 0


async def test_addresses_of_this_machine_are_refused_whatever_the_table_says(serve):
    server = await serve(b"")
    connector = guarded_connector(AddressPolicy(denied=()), {}, dns_timeout_s=1)
    async with aiohttp.ClientSession(connector=connector) as session:
        with pytest.raises(aiohttp.ClientConnectorError) as caught:
            await session.get(f"http://127.0.0.1:{server.port}/")
    assert "of this machine" in str(caught.value.os_error)
    assert server.connections == 0


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("Example.com.", "example.com"), ("www.example.com", "example.com"), ("a.b.example.co.uk", "co.uk"),
        ("8.8.8.8", "8.8.8.8"), ("2600::1", "2600::1"), ("localhost", "localhost"), (None, ""),
    ],
)  # fmt: skip
def test_hosts_that_may_belong_together_share_a_domain(host, name):
    assert domain(host) == name
