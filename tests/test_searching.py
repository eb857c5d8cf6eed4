"""Which engine a run asks: the wire, the endpoint and the key that its config and the environment name."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest

from dr_jax import searching
from dr_jax.errors import ConfigError
from dr_jax.run_config import Web
from dr_jax.web.budget import Budget


@pytest.fixture
def web(run) -> Web:
    return run.web


def test_the_embedded_engine_speaks_a_real_wire_and_takes_any_key(web):
    assert searching.provider(web).name == searching.WORLD_PROVIDER
    assert searching.api_key(web)


def test_a_key_comes_from_the_variable_that_the_run_names(web, monkeypatch):
    serper = dataclasses.replace(web, provider="serper", key_variable="OUR_KEY")
    monkeypatch.setenv("OUR_KEY", "secret")
    assert searching.api_key(serper) == "secret"
    monkeypatch.delenv("OUR_KEY")
    with pytest.raises(ConfigError, match="export OUR_KEY="):
        searching.api_key(serper)
    assert searching.api_key(dataclasses.replace(serper, cache_mode="replay"))  # nobody is asked
    assert searching.api_key(dataclasses.replace(serper, provider="searxng")) == ""  # it asks for none


def test_an_endpoint_of_ones_own_is_dialled_where_the_run_says(web):
    own = dataclasses.replace(web, endpoint="http://searx.test/search", endpoint_address="10.0.0.5:8080")
    assert searching.own_endpoint(own) == {"searx.test": ("10.0.0.5", 8080)}
    assert searching.own_endpoint(dataclasses.replace(own, endpoint_address="")) == {}


async def test_a_host_that_gets_no_share_of_the_searches_is_told_so(web):
    few = dataclasses.replace(web, max_concurrent_searches=3)
    async with contextlib.AsyncExitStack() as stack:
        await searching.open_client(few, {}, Budget(), stack, index=2, count=4)
        with pytest.raises(ConfigError, match="raise config.web.max_concurrent_searches"):
            await searching.open_client(few, {}, Budget(), stack, index=3, count=4)
