"""The pool: attention over pages equals plain attention, whatever the neighbours; a copied page is exact."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.engine import cache as kv
from dr_jax.engine import decode
from dr_jax.model.attention import packed
from dr_jax.model.letters import DEFAULT_RULES

L, PAGES, SIZE, N, K, H = 2, 24, 16, 4, 2, 8
TABLE = np.arange(1, 1 + PAGES, dtype=np.int32).reshape(3, 8)[:, ::-1].copy()  # three rows of eight pages, backwards
PAD = kv.PADDING


@pytest.fixture
def empty(config, mesh):
    return kv.make(
        decode.abstract_pool(
            config, pages=PAGES, page_tokens=SIZE, attention="blocks", dtype=jnp.float32, mesh=mesh,
            rules=DEFAULT_RULES,
        )
    )  # fmt: skip


def random(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@jax.jit
def extend(pool, table_bp, position_bt, q_btnh, k_btkh, v_btkh):
    """Layer 1's attention."""
    return kv.attend_blocks(table_bp, position_bt, PAGES + 1)(jnp.int32(1), q_btnh, k_btkh, v_btkh, pool)


def test_the_sink_comes_on_top(empty):
    assert empty.k_pkhs.shape == (L * (PAGES + 1), K, H, SIZE)
    assert empty.v_pksh.shape == (L * (PAGES + 1), K, SIZE, H)


def test_attending_in_chunks_equals_plain_attention(empty):
    q_btnh, k_btkh, v_btkh = random(0, 2, 120, N, H), random(1, 2, 120, K, H), random(2, 2, 120, K, H)
    want_btnh, _ = packed(jnp.ones((2, 120), jnp.int32))(jnp.int32(0), q_btnh, k_btkh, v_btkh, None)
    pool, outs = empty, []
    for start in range(0, 120, 40):
        part = slice(start, start + 40)
        position_bt = jnp.broadcast_to(jnp.arange(start, start + 40), (2, 40))
        out, pool = extend(pool, TABLE[[2, 0]], position_bt, q_btnh[:, part], k_btkh[:, part], v_btkh[:, part])
        outs.append(out)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want_btnh, atol=2e-6)
    for pages in pool:
        assert not pages[: PAGES + 1].any(), "another layer was written"
        assert not pages[PAGES + 1 + TABLE[1]].any(), "another row's pages were written"


def test_parts_of_one_sequence_may_be_rows_of_one_call(empty):
    q_btnh, k_btkh, v_btkh = random(0, 1, 120, N, H), random(1, 1, 120, K, H), random(2, 1, 120, K, H)
    want_btnh, _ = packed(jnp.ones((1, 120), jnp.int32))(jnp.int32(0), q_btnh, k_btkh, v_btkh, None)
    parts = [x.reshape(3, 40, *x.shape[2:]) for x in (q_btnh, k_btkh, v_btkh)]
    out, _ = extend(empty, TABLE[[1, 1, 1]], jnp.arange(120).reshape(3, 40), *parts)
    np.testing.assert_allclose(out.reshape(want_btnh.shape), want_btnh, atol=2e-6)


def test_a_row_is_the_same_bits_beside_longer_rows_and_padding(empty):
    pool = jax.tree.map(lambda pages: random(3, *pages.shape), empty)
    q_btnh, k_btkh, v_btkh = random(5, 3, 1, N, H), random(6, 3, 1, K, H), random(7, 3, 1, K, H)
    alone, _ = extend(pool, TABLE, jnp.array([[PAD], [40], [PAD]]), q_btnh, k_btkh, v_btkh)
    beside, _ = extend(pool, TABLE, jnp.array([[127], [40], [70]]), q_btnh, k_btkh, v_btkh)
    np.testing.assert_array_equal(alone[1], beside[1])
    assert np.isfinite(alone).all()


def test_padding_is_written_to_the_sink(empty):
    ones = jnp.ones((3, 1, K, H))
    _, pool = extend(empty, TABLE, jnp.array([[3], [PAD], [PAD]]), jnp.ones((3, 1, N, H)), ones, ones)
    sink = PAGES + 1
    assert sum(pages.at[sink].set(0).sum() for pages in pool) == 2 * K * H
    assert (pool.k_pkhs[sink + TABLE[0, 0], :, :, 3] == 1).all()
    assert (pool.v_pksh[sink + TABLE[0, 0], :, 3] == 1).all()


def test_what_is_not_finite_is_not_stored(empty):
    q_btnh, clean = jnp.ones((3, 1, N, H)), random(8, 3, 1, K, H)
    broken = clean.at[0].set(jnp.nan)
    _, pool = extend(empty, TABLE, jnp.array([[7], [7], [7]]), q_btnh, broken, broken)
    out, _ = extend(pool, TABLE, jnp.array([[0], [0], [0]]), q_btnh, clean, clean)
    np.testing.assert_allclose(out, jnp.repeat(clean, N // K, axis=2), rtol=1e-6)


def test_pages_are_copied_in_order_in_all_layers(empty):
    pool = jax.tree.map(lambda pages: random(3, *pages.shape), empty)
    source_c, target_c = np.array([4, 2, 9], np.int32), np.array([2, 5, 1], np.int32)
    copied = jax.jit(kv.copy_pages, static_argnames="layers")(pool, source_c, target_c, 2, layers=L)
    others = np.array([0, 1, 3, 4, *range(6, PAGES + 1)])
    for before, after in zip(pool, copied, strict=True):
        for first in (0, PAGES + 1):
            for page in (2, 5):  # 5 has what 2 had just got
                np.testing.assert_array_equal(after[first + page], before[first + 4])
            np.testing.assert_array_equal(after[first + others], before[first + others])
