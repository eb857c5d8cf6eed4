"""Which search engine a run asks, and with what key: the part of `assemble` that stands between config and web."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping

from dr_jax.errors import ConfigError
from dr_jax.run_config import WORLD, Web
from dr_jax.web.budget import Budget, share
from dr_jax.web.http import open_session, own_host
from dr_jax.web.search import SearchClient, find_provider
from dr_jax.web.search_wire import Provider
from dr_jax.world import site

WORLD_PROVIDER = "serper"  # whose JSON the embedded search engine speaks


def provider(web: Web) -> Provider:
    """The wire of the search API that the run asks; ConfigError where there is none of this name."""
    wire = {"endpoint": web.endpoint, **web.wire} if web.provider == "json" else {}
    return find_provider(WORLD_PROVIDER if web.provider == WORLD else web.provider, wire)


def own_endpoint(web: Web) -> dict[str, tuple[str, int]]:
    """The endpoint's name and the (ip, port) to dial for it, where the run names one."""
    return own_host("config.web.endpoint_address", web.endpoint, web.endpoint_address)


def api_key(web: Web) -> str:
    """What the provider is to be given; ConfigError where the run needs a key and the environment holds none."""
    if web.provider == WORLD:
        return "embedded"  # the embedded engine takes any
    if not provider(web).key_header:
        return ""
    key = os.environ.get(web.key_variable, "")
    if not key and web.cache_mode != "replay":
        raise ConfigError(
            f"config.web.provider: {web.provider} needs a key; export {web.key_variable}=..., or set "
            "config.web.provider='world' to try everything without one"
        )
    return key or "replay"


async def open_client(
    web: Web,
    hosts: Mapping[str, tuple[str, int]],
    meter: Budget,
    stack: contextlib.AsyncExitStack,
    *,
    index: int,
    count: int,
) -> SearchClient:
    """The client of the run's engine, open until `stack` is left; `hosts` are those of the embedded web.

    Host `index` of `count` takes its share of what all of them may ask at once and in a second."""
    # An engine of the user's own may be at a private address; only this session may go there, never the fetcher.
    session = await stack.enter_async_context(open_session(hosts={**hosts, **own_endpoint(web)}, contact=web.contact))
    return SearchClient(
        session,
        provider(web),
        api_key=api_key(web),
        endpoint=f"http://{site.SEARCH_HOST}/search" if web.provider == WORLD else web.endpoint,
        region=web.region,
        language=web.language,
        max_concurrent=share(web.max_concurrent_searches, index, count),
        max_per_s=web.max_searches_per_s / count or math.inf,
        budget=meter,
    )
