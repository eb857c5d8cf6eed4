"""One engine with the embedded checkpoint for the room, and servers over it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from dr_jax import serve
from dr_jax.endpoint import server
from dr_jax.records import Sampling


@pytest.fixture(scope="session")
def loaded(share_compilations):
    engine, model = serve.load("world", slots=4)
    asyncio.run(engine.generate([0], Sampling(max_new_tokens=1)))  # its programs are compiled
    yield engine, model
    engine.close()


@pytest.fixture(scope="session")
def engine(loaded):
    return loaded[0]


@pytest.fixture(scope="session")
def model(loaded):
    return loaded[1]


@pytest.fixture
async def url(model):
    async with server.serve(model) as url:
        yield url


async def until(condition: Callable[[], bool]) -> None:
    """Returns once `condition` holds, which another thread brings about."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
def eventually():
    return until
