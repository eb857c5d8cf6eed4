"""One token per row, drawn on device: token i of a request depends on its seed and on i, never on the batch.

Drawing is `argmax(logp + Gumbel noise)`, so a row needs no other row and no sum that could be split differently;
truncation masks tokens before the argmax. Both truncations keep every token at or above a threshold, found by
bisecting the bits of its f32 value: 32 passes over the logits, where sorting the vocabulary costs several times as
much.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from dr_jax.engine.noise import gumbel


class Draw(NamedTuple):
    """How each row is drawn; arrays [b]."""

    temperature_b: jax.Array  # f32, 0 = greedy
    top_p_b: jax.Array  # f32, 1 = off
    top_k_b: jax.Array  # int32, 0 = off
    seed_b: jax.Array  # uint32
    index_b: jax.Array  # int32, number of tokens this request has drawn before


def draw(logits_bv: jax.Array, how: Draw) -> tuple[jax.Array, jax.Array]:
    """(tokens int32, logps f32 nats). A logp is log softmax(logits / temperature), before truncation; greedy counts
    as 1.

    Truncation is top-k, then top-p of what is left. *Differs from others*: tokens that tie at the threshold are all
    kept.
    """
    greedy_b = how.temperature_b == 0
    logp_bv = jax.nn.log_softmax(logits_bv / jnp.where(greedy_b, 1.0, how.temperature_b)[:, None])
    truncated = jnp.any((how.top_k_b > 0) | (how.top_p_b < 1))
    kept_bv = jax.lax.cond(truncated, lambda x_bv: truncate(x_bv, how.top_p_b, how.top_k_b), lambda x_bv: x_bv, logp_bv)
    noisy_bv = jax.lax.cond(
        jnp.all(greedy_b),
        lambda x_bv: x_bv,
        lambda x_bv: jnp.where(greedy_b[:, None], x_bv, x_bv + gumbel(how.seed_b, how.index_b, x_bv.shape[1])),
        kept_bv,
    )
    token_b = _argmax(noisy_bv)
    return token_b, jnp.take_along_axis(logp_bv, token_b[:, None], axis=-1)[:, 0]


def _argmax(x_bv: jax.Array) -> jax.Array:
    """int32, the first of the greatest of each row. Two reductions, which a CPU does ten times as fast as `argmax`."""
    v = x_bv.shape[1]
    greatest_bv = x_bv == x_bv.max(axis=-1, keepdims=True)
    return jnp.where(greatest_bv, jnp.arange(v, dtype=jnp.int32)[None], v - 1).min(axis=-1)


def truncate(logp_bv: jax.Array, top_p_b: jax.Array, top_k_b: jax.Array) -> jax.Array:
    """`logp_bv` with -inf for every token outside the k likeliest, and outside the smallest set of mass `top_p` of
    those."""
    v = logp_bv.shape[1]
    order_bv = _ordered(logp_bv)
    k_b = jnp.where(top_k_b > 0, jnp.minimum(top_k_b, v), v)
    threshold_b = _bisect(
        (top_k_b > 0).any(), lambda cut_b: (order_bv >= cut_b[:, None]).sum(-1) >= k_b, logp_bv.shape[0]
    )
    prob_bv = jnp.where(order_bv >= threshold_b[:, None], jnp.exp(logp_bv), 0.0)
    # Infinite where top-p is off: no cut reaches it, so the threshold stays at the bottom.
    mass_b = jnp.where(top_p_b < 1, top_p_b * prob_bv.sum(-1), jnp.inf)
    nucleus_b = _bisect(
        (top_p_b < 1).any(),
        lambda cut_b: jnp.where(order_bv >= cut_b[:, None], prob_bv, 0.0).sum(-1) >= mass_b,
        logp_bv.shape[0],
    )
    return jnp.where(order_bv >= jnp.maximum(threshold_b, nucleus_b)[:, None], logp_bv, -jnp.inf)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of the f32 values."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _bisect(wanted: jax.Array, reached: Callable[[jax.Array], jax.Array], b: int) -> jax.Array:
    """The largest uint32 cut of each row for which `reached` (true at 0, false from some cut on) still holds; 0 where
    it is not `wanted`."""

    def try_bit(i: jax.Array, cut_b: jax.Array) -> jax.Array:
        higher_b = cut_b | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(reached(higher_b), higher_b, cut_b)

    bottom_b = jnp.zeros(b, jnp.uint32)
    return jax.lax.cond(wanted, lambda: jax.lax.fori_loop(0, 32, try_bit, bottom_b), lambda: bottom_b)
