"""Keys and values in pages, one pool for all layers, donated to each program and updated in place.

The pages of layer l begin at l * (pages + 1), so no layer is ever cut out of the pool (a slice would be copied); page 0
of each is the sink, which nobody reads. How a page lies depends on what reads it: `Pool` here, one array of both in
`ragged.py`. What a page holds is the host's business (`pages.py`): whatever lies beyond is garbage that is overwritten
before it is attended to.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dr_jax.engine.pages import SINK
from dr_jax.model.attention import Attend

PAGE = 128  # tokens of a page; what the TPU's kernel reads at a time are several
PADDING = -1  # the position of a token that is none: nothing is written for it, and it attends to nothing
COPIES = 16  # pages copied by one call
_GROUP = 16  # rows attended to at a time: enough work for one operation to be worth several cores


class Pool(NamedTuple):
    """What `attend_blocks` reads. Positions are last in keys and channels in values, so that both products of
    attention find what they add up side by side and nothing is transposed."""

    k_pkhs: jax.Array
    v_pksh: jax.Array


LETTERS = Pool("pkhs", "pksh")


def enough(slots: int, context: int, page_tokens: int = PAGE) -> int:
    """Pages for `slots` sequences of the whole context."""
    return slots * -(-context // page_tokens)


def make(abstract: Any) -> Any:
    """An empty pool like `abstract` (`decode.abstract_pool`), built where it lies."""
    where = jax.tree.map(lambda array: array.sharding, abstract)
    return jax.jit(lambda: jax.tree.map(jnp.zeros_like, abstract), out_shardings=where)()


def places(table_bp: jax.Array, position_bt: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """(page of the first layer, position within it) of each token; padding goes to the sink."""
    page_bt = jnp.take_along_axis(table_bp, jnp.maximum(position_bt, 0) // size, axis=1)
    return jnp.where(position_bt == PADDING, SINK, page_bt), position_bt % size


def write(pool: Pool, first_page: jax.Array, table_bp, position_bt, k_btkh, v_btkh) -> Pool:
    """The pool with the tokens' keys and values, of the layer that begins at `first_page`."""
    page_bt, at_bt = places(table_bp, position_bt, pool.v_pksh.shape[2])
    page_bt += first_page
    # Only finite values are stored: a masked position has probability 0, and 0 * nan would spoil the next user.
    k_btkh, v_btkh = jnp.nan_to_num(k_btkh), jnp.nan_to_num(v_btkh)
    return Pool(
        pool.k_pkhs.at[page_bt, :, :, at_bt].set(k_btkh, mode="promise_in_bounds"),
        pool.v_pksh.at[page_bt, :, at_bt].set(v_btkh, mode="promise_in_bounds"),
    )


def attend_blocks(table_bp: jax.Array, position_bt: jax.Array, layer_pages: int) -> Attend:
    """Attention of row b's tokens, at `position_bt`, to everything in its pages up to and including themselves.

    Writes the tokens' keys and values first, so rows may be parts of one sequence. Rows are taken in order of length,
    a group at a time, and a group walks over its own live pages only. A page beyond a row's end adds exactly nothing
    to it, so neither the other rows nor how they are grouped can change its result.
    """
    b = table_bp.shape[0]
    live_b = position_bt.max(axis=1) + 1
    order_rg = jnp.argsort(live_b).reshape(-1, math.gcd(b, _GROUP))  # group r, member g

    def attend(layer: jax.Array, q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, pool: Pool):
        _, t, n, h = q_btnh.shape
        k, size = k_btkh.shape[2], pool.v_pksh.shape[2]
        pool = write(pool, layer * layer_pages, table_bp, position_bt, k_btkh, v_btkh)
        # The g query heads of a kv head are folded into t, so that scores come out of one product with s innermost.
        q_bkth = q_btnh.reshape(b, t, k, n // k, h).transpose(0, 2, 3, 1, 4).reshape(b, k, n // k * t, h)
        folded_bt = jnp.tile(position_bt, (1, n // k))
        blocks_r = (live_b[order_rg].max(axis=1) + size - 1) // size

        def attend_group(group: tuple[jax.Array, jax.Array]) -> jax.Array:
            row_b, blocks = group
            pages_bp = table_bp[row_b] + layer * layer_pages
            return _attend_pages(pool, pages_bp, q_bkth[row_b], folded_bt[row_b], blocks)

        o_rbkth = jax.lax.map(attend_group, (order_rg, blocks_r))
        o_bkgth = o_rbkth.reshape(b, k, n // k, t, h)[jnp.argsort(order_rg.reshape(b))]
        return o_bkgth.transpose(0, 3, 1, 2, 4).reshape(b, t, n, h).astype(q_btnh.dtype), pool

    return attend


def _attend_pages(pool: Pool, pages_bp, q_bkth, position_bt, blocks: jax.Array) -> jax.Array:
    """Softmax attention over the first `blocks` pages of each row, renormalised as the running maximum grows; f32."""
    b, k, t, h = q_bkth.shape
    size = pool.v_pksh.shape[2]

    def add_page(j: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]):
        top_bkt, total_bkt, o_bkth = state
        k_bkhs, v_bksh = (pages.at[pages_bp[:, j]].get(mode="promise_in_bounds") for pages in pool)
        score_bkts = jnp.einsum("bkth,bkhs->bkts", q_bkth, k_bkhs, preferred_element_type=jnp.float32) * h**-0.5
        seen_bts = (j * size + jnp.arange(size))[None, None, :] <= position_bt[:, :, None]
        score_bkts = jnp.where(seen_bts[:, None], score_bkts, -jnp.inf)
        new_top_bkt = jnp.maximum(top_bkt, score_bkts.max(-1))
        shrink_bkt = jnp.exp(top_bkt - new_top_bkt)
        prob_bkts = jnp.exp(score_bkts - new_top_bkt[..., None])
        part_bkth = jnp.einsum(
            "bkts,bksh->bkth", prob_bkts.astype(v_bksh.dtype), v_bksh, preferred_element_type=jnp.float32
        )
        total_bkt = total_bkt * shrink_bkt + prob_bkts.sum(-1)
        return new_top_bkt, total_bkt, o_bkth * shrink_bkt[..., None] + part_bkth

    # A finite floor: an inert row sees no page at all, and must still divide by something.
    state = (jnp.full((b, k, t), -1e30), jnp.full((b, k, t), 1e-30), jnp.zeros((b, k, t, h)))
    _, total_bkt, o_bkth = jax.lax.fori_loop(0, blocks, add_page, state)
    return o_bkth / total_bkt[..., None]


def copy_pages(pool: Any, source_c: jax.Array, target_c: jax.Array, count: jax.Array, *, layers: int) -> Any:
    """The pool with the first `count` pages of `source_c` also at `target_c`, in all layers, one after another."""

    def copied(pages: jax.Array) -> jax.Array:
        by_layer = pages.reshape(layers, -1, *pages.shape[1:])

        def copy(i: jax.Array, by_layer: jax.Array) -> jax.Array:
            page = jax.lax.dynamic_slice_in_dim(by_layer, source_c[i], 1, axis=1)
            return jax.lax.dynamic_update_slice_in_dim(by_layer, page, target_c[i], axis=1)

        return jax.lax.fori_loop(0, count, copy, by_layer).reshape(pages.shape)

    return jax.tree.map(copied, pool)
