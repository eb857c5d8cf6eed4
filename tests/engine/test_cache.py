"""The cache: attention over it equals plain attention, whatever the neighbours; a copied prefix is exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dr_jax.engine import cache as kv
from dr_jax.model.attention import packed

L, SLOTS, N, K, H = 2, 6, 4, 2, 8


@pytest.fixture
def empty(config, mesh):
    sharding = NamedSharding(mesh, PartitionSpec())
    return kv.make(config, slots=SLOTS, context=600, dtype=jnp.float32, sharding=sharding)


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@jax.jit
def extend(cache, slot_b, position_bt, q_btnh, k_btkh, v_btkh):
    return kv.attend_slots(slot_b, position_bt, cache.positions)(jnp.int32(1), q_btnh, k_btkh, v_btkh, cache)


def test_positions_are_whole_blocks(empty):
    assert empty.positions == 3 * kv.BLOCK


def test_attending_in_chunks_equals_plain_attention(empty):
    q_btnh, k_btkh, v_btkh = random(0, 2, 300, N, H), random(1, 2, 300, K, H), random(2, 2, 300, K, H)
    want_btnh, _ = packed(jnp.ones((2, 300), jnp.int32))(jnp.int32(0), q_btnh, k_btkh, v_btkh, None)
    cache, outs = empty, []
    for start in range(0, 300, 100):
        part = slice(start, start + 100)
        position_bt = jnp.broadcast_to(jnp.arange(start, start + 100), (2, 100))
        out, cache = extend(cache, jnp.array([4, 1]), position_bt, q_btnh[:, part], k_btkh[:, part], v_btkh[:, part])
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want_btnh, atol=2e-6)
    assert not cache.k_lbksh[0].any(), "another layer was written"
    assert not cache.k_lbksh[1, jnp.array([0, 2, 3, 5])].any(), "another slot was written"


def test_a_row_is_the_same_bits_beside_longer_rows_and_padding(empty):
    cache = kv.Cache(random(3, *empty.k_lbksh.shape), random(4, *empty.v_lbksh.shape))
    q_btnh, k_btkh, v_btkh = random(5, 3, 1, N, H), random(6, 3, 1, K, H), random(7, 3, 1, K, H)
    slot_b = jnp.array([2, 0, 5])
    padding = cache.positions
    alone, _ = extend(cache, slot_b, jnp.array([[padding], [40], [padding]]), q_btnh, k_btkh, v_btkh)
    beside, _ = extend(cache, slot_b, jnp.array([[599], [40], [300]]), q_btnh, k_btkh, v_btkh)
    np.testing.assert_array_equal(alone[1], beside[1])
    assert np.isfinite(alone).all()


def test_padding_is_not_written(empty):
    position_bt = jnp.array([[3], [empty.positions], [empty.positions]])
    ones = jnp.ones((3, 1, K, H))
    _, cache = extend(empty, jnp.array([1, 2, 3]), position_bt, jnp.ones((3, 1, N, H)), ones, ones)
    assert cache.k_lbksh.sum() == K * H
    assert (cache.k_lbksh[1, 1, :, 3] == 1).all()


def test_what_is_not_finite_is_not_stored(empty):
    slot_b, q_btnh, clean = jnp.array([1, 2, 3]), jnp.ones((3, 1, N, H)), random(8, 3, 1, K, H)
    broken = clean.at[0].set(jnp.nan)
    _, cache = extend(empty, slot_b, jnp.array([[7], [7], [7]]), q_btnh, broken, broken)
    out, _ = extend(cache, slot_b, jnp.array([[0], [0], [0]]), q_btnh, clean, clean)
    np.testing.assert_allclose(out, jnp.repeat(clean, N // K, axis=2), rtol=1e-6)


def test_copy_prefix(empty):
    cache = kv.Cache(random(3, *empty.k_lbksh.shape), random(4, *empty.v_lbksh.shape))
    copied = jax.jit(kv.copy_prefix)(cache, 4, 2, 300)
    for before, after in zip(cache, copied, strict=True):
        np.testing.assert_array_equal(after[:, 2, :, :300], before[:, 4, :, :300])
        np.testing.assert_array_equal(after[:, 2, :, 512:], before[:, 2, :, 512:])
        others = jnp.array([0, 1, 3, 4, 5])
        np.testing.assert_array_equal(after[:, others], before[:, others])
