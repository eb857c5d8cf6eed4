"""The world on loopback: its pages at `http://lore.test/`, its search at `http://search.lore.test/search`.

One port serves both, told apart by the Host header. Clients reach it by mapping the host names to `Site.hosts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping

from aiohttp import web

from dr_jax.world import pages
from dr_jax.world.index import Index
from dr_jax.world.lore import World

SEARCH_HOST = f"search.{pages.HOST}"
SLOW_S = 0.15
MAX_RESULTS = 100
MAX_BODY_BYTES = 4 * 2**20
_LOCAL = ("127.0.0.1", "localhost")


@dataclasses.dataclass(frozen=True)
class Site:
    """A running site. `hosts` maps each of its host names to the (ip, port) that answers for it."""

    port: int
    hosts: Mapping[str, tuple[str, int]]


@contextlib.asynccontextmanager
async def serve(world: World, *, port: int = 0) -> AsyncIterator[Site]:
    """The running site; port 0 takes any free one. Everything is rendered before the first request."""
    routes = _Routes(world)
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_route("*", "/{path:.*}", routes.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        address = runner.addresses[0]
        yield Site(address[1], {host: (address[0], address[1]) for host in (pages.HOST, SEARCH_HOST)})
    finally:
        await runner.cleanup()
        routes.index.close()


def slow_page(world: World) -> str:
    """The name of the one page that answers after `SLOW_S`."""
    return world.of_kind("film")[-1].name


class _Routes:
    """Routes by host; holds the rendered pages and the index."""

    def __init__(self, world: World):
        articles = pages.articles(world)
        self.index = Index(articles)
        self.slow = slow_page(world)
        self.html = {article.title: pages.render(article) for article in articles}
        self.html |= {f"List of {plural}": pages.render_list(world, kind) for kind, plural in pages.PLURALS.items()}
        self.html[""] = pages.render_home(world)

    async def answer(self, request: web.Request) -> web.Response:
        host = request.host.partition(":")[0].lower()
        if host == SEARCH_HOST or (host in _LOCAL and request.path == "/search"):
            return await self._search(request)
        if host == pages.HOST or host in _LOCAL:
            return await self._page(request)
        return web.Response(status=421, text=f"no such site: {host}")

    async def _page(self, request: web.Request) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, headers={"Allow": "GET, HEAD"})
        if request.path == "/robots.txt":
            return web.Response(text="User-agent: *\nAllow: /\n")
        name = request.path.removeprefix("/").replace("_", " ")
        if name == self.slow:
            await asyncio.sleep(SLOW_S)
        body = self.html.get(name)
        status = 404 if body is None else 200
        body = body or pages.render_missing(name)
        return web.Response(status=status, body=body, content_type="text/html", charset="utf-8")

    async def _search(self, request: web.Request) -> web.Response:
        """Serper's request and answer."""
        if request.method != "POST" or request.path != "/search":
            return _refusal(404, "Not Found")
        if not request.headers.get("X-API-KEY"):
            return _refusal(403, "Unauthorized.")
        try:
            body = json.loads(await request.read())
        except (ValueError, RecursionError):
            return _refusal(400, "Invalid JSON")
        query, num = (body.get("q"), body.get("num", 10)) if isinstance(body, dict) else (None, 10)
        if not isinstance(query, str) or not query:
            return _refusal(400, "Missing query parameter")
        if not isinstance(num, int):
            return _refusal(400, "num must be a whole number")
        hits = self.index.search(query, min(num, MAX_RESULTS))
        organic = [
            {"title": hit.title, "link": hit.url, "snippet": hit.snippet, "position": position}
            for position, hit in enumerate(hits, start=1)
        ]
        parameters = {"q": query, "num": num, "type": "search", "engine": "lore"}
        return web.json_response({"searchParameters": parameters, "organic": organic})


def _refusal(status: int, message: str) -> web.Response:
    return web.json_response({"message": message, "statusCode": status}, status=status)
