"""Serves the world for a person: `python -m dr_jax.world --port 8000`, then open the address it prints."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys

from dr_jax.errors import DrJaxError
from dr_jax.world.lore import make_world
from dr_jax.world.site import serve


async def _serve(seed: int, port: int) -> None:
    stop = asyncio.Event()
    # Set by us: a process that a script starts in the background inherits a SIGINT that is ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with serve(make_world(seed), port=port) as site:
        print(f"http://127.0.0.1:{site.port}/   (Ctrl-C stops it)", flush=True)
        await stop.wait()


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(prog="python -m dr_jax.world", description="Serve the embedded encyclopedia.")
    parser.add_argument("--seed", type=int, default=0, help="which world (default 0)")
    parser.add_argument("--port", type=int, default=8000, help="port on 127.0.0.1; 0 takes any free one (default 8000)")
    options = parser.parse_args()
    try:
        asyncio.run(_serve(options.seed, options.port))
    except (DrJaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
