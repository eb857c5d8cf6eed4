"""The searxng provider against a real server: Debian's `searx`, whose engine is a table of pages in SQLite."""

from __future__ import annotations

import pathlib
import shutil
import socket
import sqlite3
import subprocess
import time

import pytest

from dr_jax.records import FailureKind, Hit
from dr_jax.web.http import open_session
from dr_jax.web.search import open_search

EXAMPLE = pathlib.Path("/usr/share/doc/searx/examples/settings.yml")
PAGES = [
    ("http://kite.example/ada", "Ada Tarn", "Ada Tarn filmed Kite\nin Arn.  "),
    ("http://kite.example/kite", "Kite <i>(film)</i>", "Kite is a film of 1961 – “the best”."),
    ("ftp://kite.example/kite", "Kite", "A file of the film."),
]
ENGINE = """
  - name: {name}
    engine: sqlite
    shortcut: {shortcut}
    categories: general
    database: {database}
    query_str: SELECT url, title, content FROM {table} WHERE content LIKE '%' || :query || '%'
"""


@pytest.fixture(scope="module")
def searx(tmp_path_factory):
    """The URL of its search."""
    if shutil.which("searx-run") is None or not EXAMPLE.is_file():
        pytest.skip("searx is not installed: apt-get install searx")
    folder = tmp_path_factory.mktemp("searx")
    with sqlite3.connect(folder / "pages.sqlite") as database:
        database.execute("CREATE TABLE pages (url, title, content)")
        database.executemany("INSERT INTO pages VALUES (?, ?, ?)", PAGES)
    database.close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    head, _, rest = EXAMPLE.read_text().partition("\nengines:\n")
    engines = [
        ENGINE.format(name=name, shortcut=name[:2], table=name, database=folder / "pages.sqlite")
        for name in ("pages", "missing")  # there is no such table
    ]
    head = head.replace("port : 8888", f"port : {port}")
    settings = folder / "settings.yml"
    settings.write_text("\n".join([head, "engines:", *engines, rest[rest.index("\nlocales:") :]]))
    environment = {"SEARX_SETTINGS_PATH": str(settings), "SEARX_SECRET": "of this test", "PATH": "/usr/bin:/bin"}
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(["searx-run"], env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        _wait_for(port, server, folder / "log")
        yield f"http://127.0.0.1:{port}/search"
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(port: int, server: subprocess.Popen, log: pathlib.Path) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.1)


async def test_its_results_are_read_as_it_gives_them(searx):
    async with open_session(hosts={"127.0.0.1": _endpoint(searx)}) as session:
        client = open_search("searxng", session, endpoint=searx)
        found = await client.search("!pa film", top_k=5)
        assert set(found) == {
            Hit("Ada Tarn", "http://kite.example/ada", "Ada Tarn filmed Kite in Arn."),
            Hit("Kite (film)", "http://kite.example/kite", "Kite is a film of 1961 – “the best”."),
        }  # the address that is not of the web is dropped
        assert len(await client.search("!pa film", top_k=1)) == 1
        assert await client.search("!pa nothing says this", top_k=5) == ()


async def test_an_engine_of_it_that_fails_is_no_honest_nothing(searx):
    async with open_session(hosts={"127.0.0.1": _endpoint(searx)}) as session:
        client = open_search("searxng", session, endpoint=searx, retries=0)
        failure = await client.search("!mi film", top_k=5)
    assert (failure.kind, failure.infrastructure) == (FailureKind.PROVIDER_DOWN, True)
    assert "engines of the instance" in failure.detail


def _endpoint(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rpartition(":")[2].partition("/")[0])
