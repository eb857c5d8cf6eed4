"""A cache that several hosts share, on a real Redis server."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess

import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import Hit
from dr_jax.web import cache as cache_module
from dr_jax.web.cache import Cache

SERVER = shutil.which("redis-server")
redis = pytest.importorskip("redis", reason="the client is missing: pip install 'dr_jax[redis]'")
pytestmark = pytest.mark.skipif(SERVER is None, reason="redis-server is missing: apt install redis-server")

REQUEST = {"kind": "search", "query": "kite"}
HITS = (Hit("Kite", "http://kite.test/", "A film."),)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def serve(tmp_path, *options):
    """(process, address) of a server that answers."""
    port = free_port()
    command = [SERVER, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with redis.Redis(port=port, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.02), 500)) as client:
            with contextlib.suppress(redis.AuthenticationError):
                client.ping()
        yield process, f"redis://127.0.0.1:{port}/0"
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


class Web:
    """Counts how often it is asked."""

    def __init__(self):
        self.asked = 0

    async def __call__(self):
        self.asked += 1
        return HITS


async def test_what_one_host_asked_for_the_others_have(tmp_path):
    web = Web()
    with serve(tmp_path) as (_, address):
        async with Cache(address) as one, Cache(address) as two:
            assert await one.through(REQUEST, web) == HITS
            assert await two.through(REQUEST, web) == HITS
            assert two.stats()["hits"] == 1
        async with Cache(address, "replay") as tape:
            assert await tape.through(REQUEST, web) == HITS
    assert web.asked == 1


@pytest.mark.parametrize(("mode", "low", "high"), [("live", 7 * 86_400 - 60, 7 * 86_400 + 1), ("record", -1, -1)])
async def test_the_server_forgets_what_has_expired_and_never_a_tape(tmp_path, mode, low, high):
    with serve(tmp_path) as (_, address):
        async with Cache(address, mode) as cache:
            await cache.through(REQUEST, Web())
        with redis.Redis.from_url(address) as client:
            (key,) = client.keys("*")
            assert key.startswith(b"dr_jax:web:")
            assert low <= client.ttl(key) <= high


async def test_a_flipped_bit_is_a_miss(tmp_path):
    web = Web()
    with serve(tmp_path) as (_, address), redis.Redis.from_url(address) as client:
        async with Cache(address) as cache:
            await cache.through(REQUEST, web)
            (key,) = client.keys("*")
            kept = bytearray(client.get(key))
            for place in (0, 20, len(kept) - 1):  # when it expires, its hash, its content
                client.set(key, bytes(kept[:place] + bytes([kept[place] ^ 1]) + kept[place + 1 :]))
                await cache.through(REQUEST, web)
            client.set(key, b"short")
            await cache.through(REQUEST, web)
            assert cache.stats()["errors"] >= 2
    assert web.asked == 5


async def test_a_server_that_dies_costs_its_entries_and_not_the_run(tmp_path):
    web = Web()
    with serve(tmp_path) as (process, address):
        async with Cache(address) as cache:
            await cache.through(REQUEST, web)
            process.kill()
            process.wait()
            assert await cache.through(REQUEST, web) == HITS
            assert cache.stats()["errors"] > 0
    assert web.asked == 2


async def test_a_server_that_hangs_is_soon_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("dr_jax.web.store._REDIS_TIMEOUT_S", 0.05)
    monkeypatch.setattr(cache_module, "_STORE_REST_S", 3600.0)
    web = Web()
    with serve(tmp_path) as (process, address):
        async with Cache(address) as cache:
            process.send_signal(signal.SIGSTOP)
            for number in range(40):
                assert await cache.through(REQUEST | {"query": str(number)}, web) == HITS
            assert cache.stats()["errors"] == 16  # then nobody asks it
    assert web.asked == 40


async def test_a_full_server_keeps_nothing_more(tmp_path):
    web = Web()
    with serve(tmp_path, "--maxmemory", "1", "--maxmemory-policy", "noeviction") as (_, address):
        async with Cache(address) as cache:
            assert await cache.through(REQUEST, web) == HITS
            assert cache.stats()["errors"] == 1


async def test_a_password_comes_from_the_environment(tmp_path):
    with serve(tmp_path, "--requirepass", "secret") as (_, address):
        async with Cache(address, password="secret") as cache:
            assert await cache.through(REQUEST, Web()) == HITS
        with pytest.raises(ConfigError, match=r"cannot be used as a cache \(.*[Aa]uth"):
            Cache(address)


def test_addresses_that_cannot_be_used():
    for address, message in {
        "redis://user:secret@cache.internal/0": "export REDIS_PASSWORD",
        "redis:///0": "names no host",
        f"redis://127.0.0.1:{free_port()}/0": "cannot be used as a cache",
    }.items():
        with pytest.raises(ConfigError, match=message) as mistake:
            Cache(address)
        assert "secret" not in str(mistake.value)
