"""Attention over packed rows: causal, and only within a segment.

Visits pairs of blocks (queries i, keys j <= i) with an online softmax, so the future is skipped, not masked, and so is
a pair whose segments do not meet. The backward pass recomputes a pair's scores from the saved log of the softmax
denominator, so memory grows with t, never with t * t. Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

# attend(layer, q_btnh, k_btkh, v_btkh, cache) -> (o_btnh, cache). `layer` is an int32 scalar, `cache` any pytree.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

KEPT = "attention_residuals"  # what the backward pass needs of the forward pass, for `qwen2.REMAT`
_PADDING = np.iinfo(np.int32).max  # padding sorts after the segments of its row
MASKED = -1e30  # finite, so that no inf - inf arises; exp(MASKED - max) is exactly 0


def packed(segment_bt: jax.Array) -> Attend:
    """Attention of whole rows: each token to itself and to what came before it in its segment. Leaves `cache` alone.

    Softmax in f32. Outputs on padding (segment 0) are finite and mean nothing.
    """
    length = segment_bt.shape[1]
    block = min(max(length // 16, 64), 512)  # some 16 blocks a row: small enough to skip well, large enough to be fast
    segment_ibt = _cut(jnp.where(segment_bt == 0, _PADDING, segment_bt), block, fill=_PADDING)
    live_p = _live(segment_ibt)

    def attend(layer: jax.Array, q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, cache: Any):
        b, t, n, h = q_btnh.shape
        k = k_btkh.shape[2]
        q_ibkgth = _cut(q_btnh.reshape(b, t, k, n // k, h), block).transpose(0, 1, 3, 4, 2, 5)
        k_jbksh, v_jbksh = (_cut(x_btkh, block).transpose(0, 1, 3, 2, 4) for x_btkh in (k_btkh, v_btkh))
        o_ibkgth = _flash(q_ibkgth, k_jbksh, v_jbksh, segment_ibt, live_p)
        return o_ibkgth.transpose(1, 0, 4, 2, 3, 5).reshape(b, -1, n, h)[:, :t], cache

    return attend


def _cut(x_bt: jax.Array, block: int, fill: int = 0) -> jax.Array:
    """`[b, t, ...]` as blocks `[i, b, block, ...]`, the last one filled up."""
    b, t = x_bt.shape[:2]
    width = ((0, 0), (0, -t % block)) + ((0, 0),) * (x_bt.ndim - 2)
    x_bit = jnp.pad(x_bt, width, constant_values=fill).reshape(b, -1, block, *x_bt.shape[2:])
    return x_bit.swapaxes(0, 1)


def _pairs(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Block indices (i, j <= i). Each i starts at its diagonal, where every token sees itself: its maximum is real."""
    i_p, j_p = zip(*((i, j) for i in range(blocks) for j in range(i, -1, -1)), strict=True)
    return np.array(i_p, np.int32), np.array(j_p, np.int32)


def _live(segment_ibt: jax.Array) -> jax.Array:
    """Which pairs have work in any row: their segments meet. The diagonal always does, which keeps padding finite."""
    i_p, j_p = _pairs(len(segment_ibt))
    first_ib, last_ib = segment_ibt.min(-1), segment_ibt.max(-1)
    meet_pb = (first_ib[i_p] <= last_ib[j_p]) & (first_ib[j_p] <= last_ib[i_p]) & (first_ib[i_p] != _PADDING)
    return meet_pb.any(-1) | (i_p == j_p)


def _visit_live(visit: Callable, carry: Any, blocks: int, live_p: jax.Array) -> Any:
    """`carry` after `visit(carry, i, j)` of every live pair."""

    def step(carry, pair):
        i, j, live = pair
        return jax.lax.cond(live, lambda carry: visit(carry, i, j), lambda carry: carry, carry), None

    return jax.lax.scan(step, carry, (*_pairs(blocks), live_p))[0]


def _scores(q_bkgth: jax.Array, k_bksh: jax.Array, segment_ibt: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
    score_bkgts = jnp.einsum("bkgth,bksh->bkgts", q_bkgth, k_bksh, preferred_element_type=jnp.float32)
    block = segment_ibt.shape[2]
    causal_ts = (i > j) | np.tri(block, dtype=bool)
    seen_bts = (segment_ibt[i][:, :, None] == segment_ibt[j][:, None, :]) & causal_ts[None]
    return jnp.where(seen_bts[:, None, None], score_bkgts * q_bkgth.shape[-1] ** -0.5, MASKED)


@jax.custom_vjp
def _flash(q_ibkgth, k_jbksh, v_jbksh, segment_ibt, live_p):
    return _flash_forward(q_ibkgth, k_jbksh, v_jbksh, segment_ibt, live_p)[0]


def _flash_forward(q_ibkgth, k_jbksh, v_jbksh, segment_ibt, live_p):
    def visit(carry, i, j):
        o_ibkgth, max_ibkgt, sum_ibkgt = carry
        score_bkgts = _scores(q_ibkgth[i], k_jbksh[j], segment_ibt, i, j)
        max_bkgt = jnp.maximum(max_ibkgt[i], score_bkgts.max(-1))
        weight_bkgts = jnp.exp(score_bkgts - max_bkgt[..., None])
        shrink_bkgt = jnp.exp(max_ibkgt[i] - max_bkgt)
        sum_bkgt = sum_ibkgt[i] * shrink_bkgt + weight_bkgts.sum(-1)
        o_bkgth = o_ibkgth[i] * shrink_bkgt[..., None] + _product("bkgts,bksh->bkgth", weight_bkgts, v_jbksh[j])
        return o_ibkgth.at[i].set(o_bkgth), max_ibkgt.at[i].set(max_bkgt), sum_ibkgt.at[i].set(sum_bkgt)

    zero_ibkgt = jnp.zeros(q_ibkgth.shape[:-1], jnp.float32)
    start = (jnp.zeros(q_ibkgth.shape, jnp.float32), zero_ibkgt + MASKED, zero_ibkgt)
    o_ibkgth, max_ibkgt, sum_ibkgt = _visit_live(visit, start, len(q_ibkgth), live_p)
    o_ibkgth = checkpoint_name((o_ibkgth / sum_ibkgt[..., None]).astype(q_ibkgth.dtype), KEPT)
    logsum_ibkgt = checkpoint_name(max_ibkgt + jnp.log(sum_ibkgt), KEPT)
    return o_ibkgth, (q_ibkgth, k_jbksh, v_jbksh, segment_ibt, live_p, o_ibkgth, logsum_ibkgt)


def _flash_backward(saved, do_ibkgth):
    q_ibkgth, k_jbksh, v_jbksh, segment_ibt, live_p, o_ibkgth, logsum_ibkgt = saved
    mean_ibkgt = (do_ibkgth.astype(jnp.float32) * o_ibkgth.astype(jnp.float32)).sum(-1)
    scale = q_ibkgth.shape[-1] ** -0.5

    def visit(carry, i, j):
        dq_ibkgth, dk_jbksh, dv_jbksh = carry
        q_bkgth, do_bkgth, k_bksh, v_bksh = q_ibkgth[i], do_ibkgth[i], k_jbksh[j], v_jbksh[j]
        prob_bkgts = jnp.exp(_scores(q_bkgth, k_bksh, segment_ibt, i, j) - logsum_ibkgt[i][..., None])
        dprob_bkgts = jnp.einsum("bkgth,bksh->bkgts", do_bkgth, v_bksh, preferred_element_type=jnp.float32)
        dscore_bkgts = prob_bkgts * (dprob_bkgts - mean_ibkgt[i][..., None]) * scale
        return (
            dq_ibkgth.at[i].add(_product("bkgts,bksh->bkgth", dscore_bkgts, k_bksh)),
            dk_jbksh.at[j].add(_product("bkgts,bkgth->bksh", dscore_bkgts, q_bkgth)),
            dv_jbksh.at[j].add(_product("bkgts,bkgth->bksh", prob_bkgts, do_bkgth)),
        )

    inputs = (q_ibkgth, k_jbksh, v_jbksh)
    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in inputs)
    grads = _visit_live(visit, start, len(q_ibkgth), live_p)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, inputs, strict=True)), None, None


def _product(letters: str, weight_bkgts: jax.Array, x: jax.Array) -> jax.Array:
    """The einsum in the dtype of `x`, summed in f32."""
    return jnp.einsum(letters, weight_bkgts.astype(x.dtype), x, preferred_element_type=jnp.float32)


_flash.defvjp(_flash_forward, _flash_backward)
