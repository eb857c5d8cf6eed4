"""Keys and values of every slot, in one dense array per kind that is donated to each program and updated in place.

A slot is a row of `context` positions that belongs to one sequence at a time. What a slot holds is valid up to a length
that the host knows (`slots.py`); whatever lies beyond is garbage that is overwritten before it is ever attended to.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from dr_jax.model.attention import Attend
from dr_jax.model.config import ModelConfig

BLOCK = 256  # positions attended to, or copied, at a time; a sequence costs its own length, rounded up to this
_GROUP = 8  # rows attended to at a time: enough work for one operation to be worth several cores


class Cache(NamedTuple):
    """`b` is the slot here, `s` the position; kv heads come before positions so that a block of a head is
    contiguous."""

    k_lbksh: jax.Array
    v_lbksh: jax.Array

    @property
    def positions(self) -> int:
        """Positions of a slot. A token said to be at this position is padding: nothing is written for it."""
        return self.k_lbksh.shape[3]


def make(config: ModelConfig, *, slots: int, context: int, dtype: Any, sharding: NamedSharding) -> Cache:
    """An empty cache, built where it lies."""
    positions = -(-context // BLOCK) * BLOCK
    dims = (config.num_layers, slots, config.num_kv_heads, positions, config.head_dim)
    zeros = jax.jit(lambda: Cache(jnp.zeros(dims, dtype), jnp.zeros(dims, dtype)), out_shardings=sharding)
    return zeros()


def attend_slots(slot_b: jax.Array, position_bt: jax.Array, positions: int) -> Attend:
    """Attention of row b's tokens, at `position_bt`, to everything in slot `slot_b` up to and including themselves.

    Writes the tokens' keys and values first. Rows are taken in order of length, a group at a time, and a group walks
    over its own live blocks only. A block beyond a row's end adds exactly nothing to it, so neither the other rows
    nor how they are grouped can change its result.
    """
    b = slot_b.shape[0]
    live_b = jnp.where(position_bt < positions, position_bt + 1, 0).max(axis=1)
    order_rg = jnp.argsort(live_b).reshape(-1, math.gcd(b, _GROUP))  # group r, member g
    blocks_r = (live_b[order_rg].max(axis=1) + BLOCK - 1) // BLOCK

    def attend(layer: jax.Array, q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, cache: Cache):
        _, t, n, h = q_btnh.shape
        k = k_btkh.shape[2]
        # Only finite values are stored: a masked position has probability 0, and 0 * nan would spoil
        # the slot's next user.
        cache = Cache(
            cache.k_lbksh.at[layer, slot_b[:, None], :, position_bt].set(jnp.nan_to_num(k_btkh)),
            cache.v_lbksh.at[layer, slot_b[:, None], :, position_bt].set(jnp.nan_to_num(v_btkh)),
        )
        # The g query heads of a kv head are folded into t, so that scores come out of one product with s innermost.
        q_bkth = q_btnh.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, n // k * t, h)
        folded_bt = jnp.tile(position_bt, (1, n // k))

        def attend_group(group: tuple[jax.Array, jax.Array]) -> jax.Array:
            row_b, blocks = group
            return _attend_blocks(cache, layer, q_bkth[row_b], slot_b[row_b], folded_bt[row_b], blocks)

        o_rbkth = jax.lax.map(attend_group, (order_rg, blocks_r))
        o_bkgth = o_rbkth.reshape(b, k, n // k, t, h)[jnp.argsort(order_rg.reshape(b))]
        return o_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(q_btnh.dtype), cache

    return attend


def _attend_blocks(cache: Cache, layer, q_bkth, slot_b, position_bt, blocks: jax.Array) -> jax.Array:
    """Softmax attention over the first `blocks` blocks of the slots, renormalised as the running maximum grows; f32."""
    b, k, t, h = q_bkth.shape

    def block_of(x_lbksh: jax.Array, j: jax.Array) -> jax.Array:
        starts = [(layer, slot_b[row], 0, j * BLOCK, 0) for row in range(b)]
        return jnp.concatenate([jax.lax.dynamic_slice(x_lbksh, s, (1, 1, k, BLOCK, h))[0] for s in starts])

    def add_block(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        top_bkt, total_bkt, o_bkth = state
        k_bksh, v_bksh = block_of(cache.k_lbksh, j), block_of(cache.v_lbksh, j)
        score_bkts = jnp.einsum("bkth,bksh->bkts", q_bkth, k_bksh, preferred_element_type=jnp.float32) * h**-0.5
        seen_bts = (j * BLOCK + jnp.arange(BLOCK))[None, None, :] <= position_bt[:, :, None]
        score_bkts = jnp.where(seen_bts[:, None], score_bkts, -jnp.inf)
        new_top_bkt = jnp.maximum(top_bkt, score_bkts.max(-1))
        shrink_bkt = jnp.exp(top_bkt - new_top_bkt)
        prob_bkts = jnp.exp(score_bkts - new_top_bkt[..., None])
        part_bkth = jnp.einsum(
            "bkts,bksh->bkth", prob_bkts.astype(v_bksh.dtype), v_bksh, preferred_element_type=jnp.float32
        )
        total_bkt = total_bkt * shrink_bkt + prob_bkts.sum(-1)
        return new_top_bkt, total_bkt, o_bkth * shrink_bkt[..., None] + part_bkth

    # A finite floor: an inert row sees no block at all, and must still divide by something.
    state = (jnp.full((b, k, t), -1e30), jnp.full((b, k, t), 1e-30), jnp.zeros((b, k, t, h)))
    _, total_bkt, o_bkth = jax.lax.fori_loop(0, blocks, add_block, state)
    return o_bkth / total_bkt[..., None]


def copy_prefix(cache: Cache, source: jax.Array, target: jax.Array, length: jax.Array) -> Cache:
    """`cache` with the first `length` positions of slot `source` (rounded up to whole blocks) also in slot `target`."""

    def copy_block(j: jax.Array, x_lbksh: jax.Array) -> jax.Array:
        l, _, k, _, h = x_lbksh.shape
        block = jax.lax.dynamic_slice(x_lbksh, (0, source, 0, j * BLOCK, 0), (l, 1, k, BLOCK, h))
        return jax.lax.dynamic_update_slice(x_lbksh, block, (0, target, 0, j * BLOCK, 0))

    def copy(x_lbksh: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, (length + BLOCK - 1) // BLOCK, copy_block, x_lbksh)

    return Cache(copy(cache.k_lbksh), copy(cache.v_lbksh))
