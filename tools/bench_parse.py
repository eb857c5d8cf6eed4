"""Pages per second of one core, on generated pages of about 50 KB: `python tools/bench_parse.py [--seconds 10]`.

Prints the rate of `page.extract` alone, and of a `ParserPool` of one worker."""

from __future__ import annotations

import argparse
import asyncio
import time

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


def inline(response: Response, seconds: float) -> float:
    """Pages per second of this thread's CPU time."""
    count, start_s = 0, time.thread_time()
    while time.thread_time() - start_s < seconds:
        extract(response)
        count += 1
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
    response = page()
    print(f"{len(response.body) / 1024:.0f} KiB")
    print(f"extract: {inline(response, seconds):.0f} pages/s of one core")
    print(f"one worker: {asyncio.run(pooled(response, seconds)):.0f} pages/s")


if __name__ == "__main__":
    main()
