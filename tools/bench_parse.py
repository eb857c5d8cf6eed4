"""Pages per second of one core, on pages of about 50 KB: `python tools/bench_parse.py [--seconds 10]`.

Prints the rate of `page.extract` alone, on a dense page that is made here and on the pages of that size of Debian's
documentation packages, where there are any (python3-doc, sqlite3-doc, postgresql-doc, apache2-doc); and of a
`ParserPool` of one worker."""

from __future__ import annotations

import argparse
import asyncio
import pathlib
import time
from collections.abc import Sequence

from selectolax.lexbor import LexborHTMLParser

from dr_jax.web.page import Response, extract
from dr_jax.web.workers import ParserPool

_PART = """<section id="s{i}"><h2>Part {i}</h2>
<p class="text">The river <a href="/wiki/Arn_{i}" title="Arn">Arn</a> rises in the hills above the town, and
<b>falls</b> four hundred metres on its way to the sea. A mill stood here until 19{i:02}, when the flood took it.</p>
<p>Its water drove nine wheels; the last of them, the <i>Nan</i>, is kept in the museum by the bridge. Each spring
the council counts the fish on their way up, and each autumn it sets the weirs again. The figures have been printed in
the almanac since the year of the flood, and show how the trout came back after the tannery upstream was closed.</p>
<ul><li>Length: {i} km</li><li>Bridges: <a href="/b/{i}">{i}</a></li><li>Fish: trout, grayling, eel</li></ul>
<table><tr><th>Year</th><th>Level</th></tr><tr><td>19{i:02}</td><td>2.{i} m</td></tr></table>
<script>window.ads = window.ads || []; window.ads.push({{"slot": "{i}", "size": [300, 250]}});</script></section>
"""


def page() -> Response:
    """An article of about 50 KB."""
    parts = "".join(_PART.format(i=i) for i in range(10, 55))
    nav = '<nav><ul><li><a href="/">Home</a></li></ul></nav>'
    html = (
        f"<!doctype html><html><head><title>Arn</title></head><body>{nav}<main><h1>Arn</h1>{parts}</main></body></html>"
    )
    return Response("http://a.test/wiki/Arn", "text/html; charset=utf-8", html.encode())


def padded(response: Response) -> Response:
    """The same with a comment that makes it 50 KiB."""
    comment = b"<!-- " + b"x" * ((50 << 10) - len(response.body) - 9) + b" -->"
    return Response(response.url, response.content_type, response.body + comment)


def documentation() -> list[Response]:
    """The pages of 45 to 55 KiB in Debian's documentation packages; none where they are not installed."""
    folders = ("python3-doc/html", "sqlite3", "postgresql-doc-*/html", "apache2-doc/manual")
    docs = pathlib.Path("/usr/share/doc")
    paths = [path for name in folders for folder in sorted(docs.glob(name)) for path in sorted(folder.rglob("*.html"))]
    sized = [path for path in paths if 45 << 10 <= path.stat().st_size < 55 << 10]
    return [Response(f"http://a.test{path}", "text/html", path.read_bytes()) for path in sized]


def elements(responses: Sequence[Response]) -> float:
    """Elements of a page, on average."""
    return sum(len(LexborHTMLParser(response.body).css("*")) for response in responses) / len(responses)


def inline(responses: Sequence[Response], seconds: float) -> float:
    """Pages per second of this thread's CPU time, all of `responses` equally often."""
    count, start_s = 0, time.thread_time()
    while time.thread_time() - start_s < seconds:
        for response in responses:
            extract(response)
        count += len(responses)
    return count / (time.thread_time() - start_s)


async def pooled(response: Response, seconds: float) -> float:
    """Pages per second of wall time through one worker."""
    async with ParserPool(1) as pool:
        await pool.extract(response)  # started
        count, start_s = 0, time.monotonic()
        while time.monotonic() - start_s < seconds:
            await asyncio.gather(*(pool.extract(response) for _ in range(8)))
            count += 8
        return count / (time.monotonic() - start_s)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0)
    seconds = parser.parse_args().seconds
    response = padded(page())
    for name, responses in (("dense", [response]), ("documentation", documentation())):
        if responses:
            rate = inline(responses, seconds)
            print(f"extract, {name}: {rate:.0f} pages/s of one core; {elements(responses):.0f} elements a page")
    print(f"one worker: {asyncio.run(pooled(response, seconds)):.0f} pages/s")


if __name__ == "__main__":
    main()
