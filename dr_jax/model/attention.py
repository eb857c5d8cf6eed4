"""Attention over packed rows: causal, and only within a segment.

Future blocks are skipped, not masked: a block of queries reads keys up to its own end. Each block is recomputed in the
backward pass, so no `[b, n, t, t]` array outlives its block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# attend(layer, q_btnh, k_btkh, v_btkh, cache) -> (o_btnh, cache). `layer` is an int32 scalar, `cache` any pytree.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

_BLOCK = 128  # queries per block


def packed(segment_bt: jax.Array) -> Attend:
    """Attention of whole rows, each token to itself and to what came before it in its segment. Leaves `cache` alone.

    Padding (segment 0) attends to padding, so its rows are finite. Softmax in f32.
    """

    def attend(layer: jax.Array, q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, cache: Any):
        outs = []
        for start in range(0, q_btnh.shape[1], _BLOCK):
            end = min(start + _BLOCK, q_btnh.shape[1])
            mask_bts = segment_bt[:, start:end, None] == segment_bt[:, None, :end]
            mask_bts &= (jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :])[None]
            outs.append(_block(q_btnh[:, start:end], k_btkh[:, :end], v_btkh[:, :end], mask_bts))
        return jnp.concatenate(outs, axis=1), cache

    return attend


@jax.checkpoint
def _block(q_btnh: jax.Array, k_bskh: jax.Array, v_bskh: jax.Array, mask_bts: jax.Array) -> jax.Array:
    b, t, n, h = q_btnh.shape
    k = k_bskh.shape[2]
    q_btkgh = q_btnh.reshape(b, t, k, n // k, h)
    score_bkgts = jnp.einsum("btkgh,bskh->bkgts", q_btkgh, k_bskh, preferred_element_type=jnp.float32) * h**-0.5
    score_bkgts = jnp.where(mask_bts[:, None, None], score_bkgts, -jnp.inf)
    prob_bkgts = jax.nn.softmax(score_bkgts, axis=-1).astype(v_bskh.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", prob_bkgts, v_bskh).reshape(b, t, n, h)
