"""The programs: compiled once, the cache in place, the same tokens on one device and on two."""

from __future__ import annotations

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.engine import cache as kv
from dr_jax.engine import decode
from dr_jax.errors import ConfigError
from dr_jax.model.letters import DEFAULT_RULES, make_mesh
from dr_jax.records import Sampling


def test_the_pool_is_updated_in_place(config, params, mesh):
    programs = decode.build(config, mesh=mesh, rules=DEFAULT_RULES, steps=2)
    abstract = decode.abstract_pool(
        config, pages=48, page_tokens=128, attention="blocks", dtype=jnp.float32, mesh=mesh, rules=DEFAULT_RULES
    )
    pool = kv.make(abstract)
    size = sum(array.nbytes for array in pool)
    table_bp, token_bt, copies_c = np.zeros((2, 8), np.int32), np.zeros((2, 4), np.int32), np.zeros(16, np.int32)
    with jax.set_mesh(mesh):
        lowered = [
            programs.extend.lower(params, pool, table_bp, token_bt, token_bt),
            programs.score.lower(params, pool, table_bp, token_bt, token_bt, token_bt),
            programs.generate.lower(params, pool, decode.inert(6, 8)),
            programs.copy.lower(pool, copies_c, copies_c, np.int32(3)),
        ]
    for program in lowered:
        memory = program.compile().memory_analysis()
        assert memory.alias_size_in_bytes == size
        assert memory.temp_size_in_bytes < size / 4, "a program holds a second copy of the pool"


def test_attention_that_cannot_be_is_named(config, mesh):
    with pytest.raises(ConfigError, match="engine.attention: got 'paged', allowed are blocks, ragged"):
        decode.build(config, mesh=mesh, rules=DEFAULT_RULES, steps=2, attention="paged")
    with pytest.raises(ConfigError, match="engine.attention: 'ragged' needs heads of a multiple of 128 channels"):
        decode.build(config, mesh=mesh, rules=DEFAULT_RULES, steps=2, attention="ragged")
    sizes = dict(pages=4, page_tokens=128, dtype=jnp.float32)
    with pytest.raises(ConfigError, match="engine.attention: got 'paged'"):
        decode.abstract_pool(config, mesh=mesh, rules=DEFAULT_RULES, attention="paged", **sizes)


async def test_nothing_compiles_after_warm_up(engine, other_params, params):
    await engine.generate([1], Sampling(1))  # the engine is warm once it has answered
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
    )
    rng = np.random.default_rng(0)
    mixed = [
        Sampling(budget, temperature=temperature, top_p=top_p, top_k=top_k, stop_ids=stop_ids, seed=budget)
        for budget, temperature, top_p, top_k, stop_ids in [
            (1, 0.0, 1.0, 0, ()), (37, 1.0, 1.0, 0, (1, 2, 3)), (9, 0.7, 0.9, 5, (4,)), (500, 1.3, 1.0, 3, ()),
        ]
    ]  # fmt: skip
    prompts = [rng.integers(0, 96, length) for length in (1, 2, 17, 100, 300)]
    await asyncio.gather(*(engine.generate(prompt, sampling) for prompt in prompts for sampling in mixed))
    await asyncio.gather(*(engine.score(prompt, [5, 6, 7]) for prompt in prompts))
    await asyncio.to_thread(engine.set_weights, other_params, 1)
    await asyncio.gather(*(engine.generate(prompt, mixed[1]) for prompt in prompts))
    await asyncio.to_thread(engine.set_weights, params, 2)
    assert compiled == []
    jax.jit(lambda x: x * 3)(jnp.ones(3)).block_until_ready()
    assert compiled, "this test does not see compilations"


async def test_one_device_and_two_draw_the_same_tokens(engine, make_engine):
    prompts = [np.random.default_rng(i).integers(0, 96, 20 + 40 * i) for i in range(4)]
    greedy = Sampling(20, temperature=0)
    one = await asyncio.gather(*(engine.generate(prompt, greedy) for prompt in prompts))
    async with make_engine(mesh=make_mesh({"data": 1, "fsdp": 1, "tensor": 2})) as spread:
        two = await asyncio.gather(*(spread.generate(prompt, greedy) for prompt in prompts))
        scores = await spread.score(prompts[1], one[1].tokens)
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logps, b.logps, atol=1e-4)
    np.testing.assert_allclose(scores, one[1].logps, atol=1e-4)
