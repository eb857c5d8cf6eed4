"""Where the cache keeps its entries: an SQLite file of this host, or a Redis server that several hosts share.

A store is called from the threads of its cache, never from the event loop."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import sqlite3
import struct
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from dr_jax.errors import ConfigError

REDIS_SCHEMES = ("redis", "rediss")
_REDIS_THREADS = 8  # calls that wait for the network at once
_REDIS_TIMEOUT_S = 1.0  # a cache that takes longer costs more than it saves
_REDIS_PREFIX = "dr_jax:web:"
_HEADER = struct.Struct("<d32s")  # expires_s, digest


class Entry(NamedTuple):
    """`expires_s`: Unix time, inf for never; `digest`: 32 bytes."""

    expires_s: float
    blob: bytes
    digest: bytes


class StoreError(Exception):
    """The store did not do as asked. The web still may."""


class Store(Protocol):
    """Entries by key. Each call raises `StoreError` and nothing else."""

    def get(self, key: str) -> Entry | None: ...

    def put(self, key: str, entry: Entry) -> None: ...

    def close(self) -> None: ...


def is_redis(where: str) -> bool:
    return urlsplit(where).scheme in REDIS_SCHEMES


def threads(where: str) -> int:
    """How many may call the store at once. SQLite's is used by the thread that opened it."""
    return _REDIS_THREADS if is_redis(where) else 1


def check(where: str) -> None:
    """Raises `ConfigError` for an address of Redis that cannot be right; opens nothing."""
    if not is_redis(where):
        return
    url = urlsplit(where)
    if url.password is not None:
        raise ConfigError("cache.path: a password in the address would be logged; export REDIS_PASSWORD=... instead")
    if not url.hostname:
        raise ConfigError(f"cache.path: {where!r} names no host; write redis://host:6379/0")
    if importlib.util.find_spec("redis") is None:
        raise ConfigError(f"cache.path: {where!r} needs a package: pip install 'dr_jax[redis]'")


def open_store(where: str, *, drop_before_s: float = 0.0, password: str = "") -> Store:
    """The store at `where`: a path, or 'redis://host:port/number' ('rediss' for TLS).

    `drop_before_s`: Unix time; a file forgets what had expired by then (Redis does so by itself).

    Raises:
      ConfigError: it cannot be used.
    """
    check(where)
    try:
        return _RedisStore(where, password) if is_redis(where) else _SqliteStore(where, drop_before_s)
    except StoreError as error:
        remedy = "start it, or see the address" if is_redis(where) else "move it away"
        raise ConfigError(f"cache.path: {where} cannot be used as a cache ({error}); {remedy}") from error


class _SqliteStore:
    def __init__(self, path: str, drop_before_s: float):
        try:
            self._db = sqlite3.connect(path, isolation_level=None)  # every statement its own transaction
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")  # a power cut may cost the last entries, never the file
            self._db.execute("PRAGMA busy_timeout=5000")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS entry "
                "(key TEXT PRIMARY KEY, expires_s REAL, value BLOB, hash BLOB) WITHOUT ROWID"
            )
            self._db.execute("DELETE FROM entry WHERE expires_s <= ?", (drop_before_s,))
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error

    def get(self, key: str) -> Entry | None:
        try:
            row = self._db.execute("SELECT expires_s, value, hash FROM entry WHERE key = ?", (key,)).fetchone()
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error
        return Entry(*row) if row else None

    def put(self, key: str, entry: Entry) -> None:
        try:
            self._db.execute("INSERT OR REPLACE INTO entry VALUES (?, ?, ?, ?)", (key, *entry))
        except sqlite3.Error as error:
            raise StoreError(str(error)) from error

    def close(self) -> None:
        self._db.close()


class _RedisStore:
    def __init__(self, url: str, password: str):
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        self._error = redis.RedisError
        self._client = redis.Redis.from_url(
            url,
            password=password or None,
            socket_timeout=_REDIS_TIMEOUT_S,
            socket_connect_timeout=_REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),  # once: a connection that idled may be gone
        )
        try:
            self._client.ping()
        except self._error as error:
            raise StoreError(str(error)) from error

    def get(self, key: str) -> Entry | None:
        try:
            kept = self._client.get(_REDIS_PREFIX + key)
        except self._error as error:
            raise StoreError(str(error)) from error
        if kept is None or len(kept) < _HEADER.size:
            return None
        expires_s, digest = _HEADER.unpack_from(kept)
        return Entry(expires_s, kept[_HEADER.size :], digest)

    def put(self, key: str, entry: Entry) -> None:
        until = None if math.isinf(entry.expires_s) else math.ceil(entry.expires_s)
        kept = _HEADER.pack(entry.expires_s, entry.digest) + entry.blob
        try:
            self._client.set(_REDIS_PREFIX + key, kept, exat=until)
        except self._error as error:
            raise StoreError(str(error)) from error

    def close(self) -> None:
        self._client.close()


def can_replay(where: str) -> bool:
    """Whether there is something to run from."""
    return is_redis(where) or pathlib.Path(where).is_file()
