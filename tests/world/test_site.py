from __future__ import annotations

import asyncio
import json
import time

import aiohttp
import pytest
import pytest_asyncio
import yarl

from dr_jax.world import pages
from dr_jax.world.site import SLOW_S, serve, slow_page


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(world):
    async with serve(world) as running:
        yield running


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def _ask(site, method, path, host, **options):
    headers = {"Host": host, **options.pop("headers", {})}
    async with aiohttp.ClientSession() as session:
        url = yarl.URL(f"http://127.0.0.1:{site.port}{path}", encoded=True)
        async with session.request(method, url, headers=headers, allow_redirects=False, **options) as reply:
            return reply.status, reply.headers, await reply.read()


async def _search(site, body, key="any", host="search.lore.test"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, headers, reply = await _ask(
        site, "POST", "/search", host, data=data, headers={"X-API-KEY": key} if key else {}
    )
    assert headers["Content-Type"].startswith("application/json")
    return status, json.loads(reply)


async def test_hosts(site):
    assert site.hosts == {"lore.test": ("127.0.0.1", site.port), "search.lore.test": ("127.0.0.1", site.port)}


async def test_every_page_is_served(site, articles):
    for article in articles[::50]:
        status, headers, body = await _ask(site, "GET", f"/{pages.path(article.title)}", "lore.test")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert body == pages.render(article)


async def test_host_may_carry_a_port_and_any_case(site, articles):
    path = f"/{pages.path(articles[0].title)}"
    assert (await _ask(site, "GET", path, "LORE.test:80"))[0] == 200
    assert (await _ask(site, "GET", path, "other.test"))[0] == 421
    assert (await _ask(site, "GET", path, "search.lore.test"))[0] == 404


async def test_the_browser_of_a_person(site, articles):
    for path in ("/", "/List_of_films", f"/{pages.path(articles[0].title)}"):
        assert (await _ask(site, "GET", path, f"127.0.0.1:{site.port}"))[0] == 200
    assert (await _search(site, {"q": "film"}, host="localhost"))[0] == 200


async def test_remakes_lie_at_their_own_address(site, world):
    name = world.remakes[0].name
    path = pages.url(name).removeprefix("http://lore.test")
    for spelling in (path, path.replace("(", "%28").replace(")", "%29"), path.replace("_", "%20")):
        status, _, body = await _ask(site, "GET", spelling, "lore.test")
        assert status == 200
        assert f"<h1>{name}</h1>".encode() in body


async def test_dead_links_and_wrong_methods(site, articles):
    dead = f"/{pages.path(articles[0].sections[-1].items[-1])}"
    status, headers, body = await _ask(site, "GET", dead, "lore.test")
    assert (status, headers["Content-Type"]) == (404, "text/html; charset=utf-8")
    assert b"Page not found" in body
    assert (await _ask(site, "POST", "/", "lore.test"))[0] == 405
    assert (await _ask(site, "GET", "/%00%ff", "lore.test"))[0] == 404
    assert (await _ask(site, "GET", "/robots.txt", "lore.test"))[2] == b"User-agent: *\nAllow: /\n"


async def test_the_slow_page_delays_nobody_else(site, world, articles):
    started = time.monotonic()
    slow = asyncio.create_task(_ask(site, "GET", f"/{pages.path(slow_page(world))}", "lore.test"))
    await _ask(site, "GET", f"/{pages.path(articles[0].title)}", "lore.test")
    assert not slow.done()
    assert (await slow)[0] == 200
    assert time.monotonic() - started >= SLOW_S


async def test_search_speaks_serper(site, world):
    film = world.of_kind("film")[0]
    status, reply = await _search(site, {"q": film.name, "num": 3, "gl": "us", "hl": "en"})
    assert status == 200
    assert reply["searchParameters"]["q"] == film.name
    assert [set(row) for row in reply["organic"]] == [{"title", "link", "snippet", "position"}] * 3
    assert [row["position"] for row in reply["organic"]] == [1, 2, 3]
    assert (reply["organic"][0]["title"], reply["organic"][0]["link"]) == (film.name, pages.url(film.name))
    assert len((await _search(site, {"q": "film"}))[1]["organic"]) == 10
    assert (await _search(site, {"q": "qwertyuiop"}))[1]["organic"] == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"{", 400),
        (b"\xff", 400),
        (b"[" * 100_000, 400),
        (b"", 400),
        ([], 400),
        ({}, 400),
        ({"q": ""}, 400),
        ({"q": 1}, 400),
        ({"q": "a", "num": "3"}, 400),
        ({"q": "\ud800\0'\"", "num": 10**30}, 200),
        ({"q": "x" * 1_000_000}, 200),
        ({"q": "film", "num": -1}, 200),
    ],
)
async def test_search_refuses_what_serper_refuses(site, body, status):
    got, reply = await _search(site, body)
    assert got == status
    if status != 200:
        assert reply["statusCode"] == status
        assert reply["message"]


async def test_search_needs_a_key(site):
    assert await _search(site, {"q": "film"}, key=None) == (403, {"message": "Unauthorized.", "statusCode": 403})


async def test_two_sites_at_once_and_a_free_port_after(world):
    async with serve(world) as one, serve(world) as two:
        assert one.port != two.port
    async with serve(world, port=one.port) as again:
        assert again.port == one.port
