"""From settings to the reader of pages: none, the policy itself, or a model behind an API, with its caps and its costs.

`assemble` asks; what it gets for 'policy' is None, for such a reader belongs to an episode (`agent.episode.run`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from dr_jax.agent import model_reader
from dr_jax.agent.model_reader import ModelReader, ReadingLimits, ask_endpoint
from dr_jax.agent.presets import Preset
from dr_jax.agent.reader import ExtractiveReader
from dr_jax.errors import ConfigError
from dr_jax.interfaces import Reader
from dr_jax.run_config import RunConfig
from dr_jax.web.budget import Budget, reader_usd, share
from dr_jax.web.cache import Cache, CachedReader
from dr_jax.web.completions import ChatClient, Endpoint
from dr_jax.web.http import open_session, own_host


def check(run: RunConfig, preset: Preset, meter: Budget) -> None:
    """Raises `ConfigError` for every mistake that can be known before anything is opened."""
    caps = limits(run, preset)
    if run.reading.train and run.web.reader != "policy":
        raise ConfigError(
            f"config.reading.train: web.reader is {run.web.reader!r}, which has nothing to train; set it to False, or "
            "config.web.reader='policy'"
        )
    if run.web.reader == "policy" and 2 * caps.max_tokens > preset.context_tokens:
        raise ConfigError(
            f"config.reading.max_tokens: {caps.max_tokens} is more than half of the {preset.context_tokens} tokens of "
            f"preset {preset.name!r}, and leaves no room for a page. Lower it."
        )
    if run.web.reader == "endpoint":
        endpoint(run)
        own_endpoint(run)
        page_usd(run, preset, meter.price_usd)


def limits(run: RunConfig, preset: Preset) -> ReadingLimits:
    """What one page may cost."""
    most = ReadingLimits().max_notes_chars
    return ReadingLimits(
        max_segments=run.reading.max_segments,
        max_tokens=run.reading.max_tokens,
        patience=run.reading.patience,
        # The policy has its context for all of it: about a quarter of that for what is known.
        max_notes_chars=min(most, preset.context_tokens) if run.web.reader == "policy" else most,
    )


def endpoint(run: RunConfig) -> Endpoint:
    """The model behind an API; ConfigError where it cannot be asked."""
    reading = run.reading
    key = os.environ.get(reading.key_variable, "") if reading.key_variable else None
    if key == "" and run.web.cache_mode != "replay":
        raise ConfigError(
            f"config.reading.key_variable: the endpoint that reads needs a key; export {reading.key_variable}=..., or "
            "set config.web.reader='policy' to do without one"
        )
    return Endpoint(
        base_url=reading.endpoint,
        model=reading.model,
        api_key="replay" if key == "" else key,
        max_tokens=reading.max_tokens,
        parameters=reading.parameters,
    )


def own_endpoint(run: RunConfig) -> dict[str, tuple[str, int]]:
    """The endpoint's name and the (ip, port) to dial for it, where the run names one."""
    return own_host("config.reading.endpoint_address", run.reading.endpoint, run.reading.endpoint_address)


async def open_reader(
    run: RunConfig,
    preset: Preset,
    cache: Cache,
    meter: Budget,
    stack: contextlib.AsyncExitStack,
    *,
    index: int,
    count: int,
) -> Reader | None:
    """The reader that all episodes share; what it opens closes with `stack`. None where the policy reads.

    Host `index` of `count` takes its share of what all of them may ask at once."""
    if run.web.reader == "extractive":
        return ExtractiveReader()
    if run.web.reader == "policy":
        return None
    asked, caps = endpoint(run), limits(run, preset)
    at_once = share(run.reading.max_concurrent, index, count)
    if at_once < 1:
        raise ConfigError(
            f"config.reading.max_concurrent: {run.reading.max_concurrent} at once leave none to some of {count} "
            f"hosts; give {count} or more"
        )
    # Only this session may go to an address of one's own, never the fetcher.
    session = await stack.enter_async_context(open_session(hosts=own_endpoint(run), contact=run.web.contact))
    client = ChatClient(session, asked, max_concurrent=at_once, budget=meter)
    identity = {**client.identity, "version": model_reader.VERSION, "limits": repr(caps)}
    return CachedReader(ModelReader(ask_endpoint(client), caps), cache, identity=identity)


def page_usd(run: RunConfig, preset: Preset, price_usd: Callable[[str], float]) -> float:
    """What an endpoint's reading of one page costs at most, at no more than one token a character."""
    if run.web.reader != "endpoint":
        return 0.0
    caps, asked = limits(run, preset), endpoint(run)
    tokens_in = model_reader.max_prompt_chars(caps, run.web.segment_chars)
    return caps.max_segments * reader_usd(price_usd, tokens_in, asked.most_tokens)
