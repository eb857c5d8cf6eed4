"""What the TPU's kernel is told, against JAX's own plain version of it: the same values as the walk over blocks.

JAX 0.10 can interpret the kernel in neither of its ways, so the kernel itself runs on TPUs only; `tests/plan` compiles
the programs that call it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ref_ragged_paged_attention

from dr_jax.engine import cache as kv
from dr_jax.engine.ragged import arguments, slots, write

PAGES, SIZE, N, K, H = 24, 16, 4, 2, 8
TABLE = np.arange(1, 1 + PAGES, dtype=np.int32).reshape(3, 8)[:, ::-1].copy()
PAD = kv.PADDING


@pytest.mark.parametrize(
    "position_bt",
    [
        np.array([[3], [127], [64]]),  # decode
        np.array([np.arange(20, 44), np.arange(24), np.arange(104, 128)]),  # chunks, the last to the end of its pages
        np.array([[*range(5), *[PAD] * 19], [PAD] * 24, [*range(120, 128), *[PAD] * 16]]),  # short chunks, an empty row
        np.array([[7], [PAD], [0]]),
    ],
)
def test_the_kernel_is_told_what_the_walk_computes(position_bt):
    (b, t), there = position_bt.shape, position_bt != PAD
    table_bp, position_bt = jnp.asarray(TABLE), jnp.asarray(position_bt)
    first_page = PAGES + 1  # of layer 1
    key = jax.random.split(jax.random.key(0), 4)
    kv_pskh = jax.random.normal(key[0], (2 * first_page, SIZE, 2 * K, H))
    pool = kv.Pool(kv_pskh[:, :, ::2].transpose(0, 2, 3, 1), kv_pskh[:, :, 1::2].transpose(0, 2, 1, 3))
    q_btnh, k_btkh, v_btkh = (
        jax.random.normal(k, (b, t, heads, H)) for k, heads in zip(key[1:], (N, K, K), strict=True)
    )
    want_btnh, pool = kv.attend_blocks(table_bp, position_bt, first_page)(jnp.int32(1), q_btnh, k_btkh, v_btkh, pool)
    written = write(kv_pskh, slots(table_bp, position_bt, SIZE) + first_page * SIZE, k_btkh, v_btkh)
    np.testing.assert_array_equal(written[:, :, ::2].transpose(0, 2, 3, 1), pool.k_pkhs)
    np.testing.assert_array_equal(written[:, :, 1::2].transpose(0, 2, 1, 3), pool.v_pksh)
    told = arguments(table_bp, position_bt, SIZE)
    told = told._replace(table_bp=told.table_bp + first_page)
    got_qnh = ref_ragged_paged_attention(q_btnh.reshape(b * t, N, H), written, *told, sm_scale=H**-0.5)
    np.testing.assert_allclose(got_qnh.reshape(b, t, N, H)[there], want_btnh[there], atol=1e-5)
