"""A request's sequences where the sampler fails under way: one clear end, and nobody left drawing."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import jax
import jax.numpy as jnp
import pytest

from dr_jax import assemble
from dr_jax.model import hf
from dr_jax.model.config import ModelConfig


@pytest.fixture
def break_engine(engine):
    """Gives the engine weights that are not numbers; the test's end gives it its own back."""
    config = ModelConfig.from_hf(assemble.CHECKPOINT)
    good = hf.load(assemble.CHECKPOINT, config, dtype="float32")
    yield lambda: engine.set_weights(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), good), 1)
    engine.set_weights(good, 2)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_sampler_that_fails_under_way_ends_the_answer(engine, url, break_engine, eventually, stream):
    body = {"prompt": [5, 6, 7], "max_tokens": 2000, "temperature": 2, "ignore_eos": True, "n": 3, "stream": stream}
    before = engine.stats()["tokens_drawn"]
    async with aiohttp.ClientSession() as session:
        sent = asyncio.create_task(session.post(url + "/completions", json=body))
        await eventually(lambda: engine.stats()["tokens_drawn"] > before)
        await asyncio.to_thread(break_engine)
        async with await sent as response:
            text = await response.text()
    error = json.loads(text.split("data: ")[-1] if stream else text)["error"]
    assert (error["type"], error["message"]) == ("server_error", "engine: the network gave logits that are not finite")
    assert response.status == (200 if stream else 500)
    assert "[DONE]" not in text
    await eventually(lambda: not engine.stats()["serving"])
