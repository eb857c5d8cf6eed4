"""A request's sequences where the sampler fails under way: one clear end, and nobody left drawing."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import jax
import jax.numpy as jnp
import pytest

from dr_jax import assemble, serve
from dr_jax.endpoint import server
from dr_jax.model import weights
from dr_jax.model.config import ModelConfig


@pytest.fixture
def loaded():
    engine, model = serve.load("world", slots=4)
    yield engine, model
    engine.close()


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engine_that_breaks_under_way_ends_the_answer(loaded, eventually, stream):
    engine, model = loaded
    body = {"prompt": [5, 6, 7], "max_tokens": 2000, "temperature": 2, "ignore_eos": True, "n": 3, "stream": stream}
    async with server.serve(model) as url, aiohttp.ClientSession() as session:
        sent = asyncio.create_task(session.post(url + "/completions", json=body))
        await eventually(lambda: engine.stats()["tokens_drawn"] > 0)
        broken = weights.init(ModelConfig.from_hf(assemble.CHECKPOINT), jax.random.key(0), jnp.float32)
        broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), broken)
        await asyncio.to_thread(engine.set_weights, broken, 1)
        async with await sent as response:
            text = await response.text()
    error = json.loads(text.split("data: ")[-1] if stream else text)["error"]
    assert (error["type"], error["message"]) == ("server_error", "engine: the network gave logits that are not finite")
    assert response.status == (200 if stream else 500)
    assert "[DONE]" not in text
    assert engine.stats()["serving"] == 0
