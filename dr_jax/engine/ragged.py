"""Attention over pages as a TPU kernel: the same values as `cache.attend_blocks`, at the bandwidth of the memory.

The kernel is JAX's ragged paged attention (Pallas). It sees one chip's heads, so it runs under `shard_map`, together
with the write into the pool that comes before it. It asks for heads of 128 channels (all sizes of Qwen2.5 but 0.5B)
and kv heads that fill its tiles (1, 2, 4 or multiples of 8 a chip). JAX 0.10 cannot interpret it, so its arguments
are what a CPU can test.

Its pool is one array, `kv_pskh`: the key of kv head k lies at 2k, its value at 2k + 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from dr_jax.engine.cache import PADDING, places
from dr_jax.engine.pages import SINK
from dr_jax.model.attention import Attend
from dr_jax.model.letters import Rules, spec

LETTERS = "pskh"
LANES = 128  # a head is a multiple of so many channels
READ = 2048  # positions that the kernel fetches at a time, whatever of them is live
_QUERIES = 32  # tokens at a time
_SCRATCH_BYTES = 64 * 2**20  # of on-chip memory


def fetched(rows: int, tokens: int, positions: int) -> int:
    """Positions whose keys and values the kernel reads in all, for `rows` of `tokens` queries that end at `positions`:
    whole fetches, once for each of a row's blocks of queries."""
    return rows * -(-tokens // _QUERIES) * -(-positions // READ) * READ


class Arguments(NamedTuple):
    """What the kernel is told beside queries and pool. Sequence i has the queries from `start_i[i]` to
    `start_i[i + 1]`, which are the last ones of `length_b[i]` positions."""

    length_b: jax.Array
    table_bp: jax.Array
    start_i: jax.Array
    sequences_1: jax.Array


def arguments(table_bp: jax.Array, position_bt: jax.Array, size: int) -> Arguments:
    """Those of the first layer. Every token of every row is a query: one that is padding stands behind the row's last
    token, reads garbage there or in the sink, and nobody reads what comes of it."""
    b, t = position_bt.shape
    first_b = jnp.where(position_bt[:, 0] == PADDING, 0, position_bt[:, 0])
    beyond = -(-t // size) if t > 1 else 0
    wider_bp = jnp.pad(table_bp, ((0, 0), (0, beyond)), constant_values=SINK)
    return Arguments(
        (first_b + t).astype(jnp.int32),
        wider_bp.astype(jnp.int32),
        jnp.arange(b + 1, dtype=jnp.int32) * t,
        jnp.full(1, b, jnp.int32),
    )


def slots(table_bp: jax.Array, position_bt: jax.Array, size: int) -> jax.Array:
    """`bt`, where each token goes in the first layer, counted in tokens."""
    page_bt, at_bt = places(table_bp, position_bt, size)
    return page_bt * size + at_bt


def write(kv_pskh: jax.Array, slot_bt: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array) -> jax.Array:
    """As `cache.write`."""
    b, t, k, h = k_btkh.shape
    new_btkh = jnp.nan_to_num(jnp.stack([k_btkh, v_btkh], axis=3).reshape(b, t, 2 * k, h))
    by_slot = kv_pskh.reshape(-1, *kv_pskh.shape[2:])
    return by_slot.at[slot_bt].set(new_btkh, mode="promise_in_bounds").reshape(kv_pskh.shape)


def attend_ragged(table_bp: jax.Array, position_bt: jax.Array, layer_pages: int, size: int, rules: Rules) -> Attend:
    """As `cache.attend_blocks`, for pages of `size` tokens. Needs a mesh in scope, and a TPU."""
    heads, kv_heads = spec("btnh", rules.activations), spec("btkh", rules.activations)
    pool, whole = spec(LETTERS, rules.activations), jax.sharding.PartitionSpec()
    # Once, and not once a layer: a TPU takes more than a microsecond for an operation, on however few numbers.
    slot_bt, told = slots(table_bp, position_bt, size), arguments(table_bp, position_bt, size)

    def local(first_page, q_btnh, k_btkh, v_btkh, kv_pskh, slot_bt, told):
        b, t, n, h = q_btnh.shape
        kv_pskh = write(kv_pskh, slot_bt + first_page * size, k_btkh, v_btkh)
        told = told._replace(table_bp=told.table_bp + first_page)
        o_qnh = ragged_paged_attention(
            q_btnh.reshape(b * t, n, h), kv_pskh, *told, sm_scale=h**-0.5,
            num_kv_pages_per_block=min(max(READ // size, 1), told.table_bp.shape[1]),
            num_queries_per_block=min(_QUERIES, b * t), vmem_limit_bytes=_SCRATCH_BYTES,
        )  # fmt: skip
        return o_qnh.reshape(b, t, n, h), kv_pskh

    sharded = jax.shard_map(
        local,
        in_specs=(whole, heads, kv_heads, kv_heads, pool, whole, whole),
        out_specs=(heads, pool),
        check_vma=False,
    )

    def attend(layer: jax.Array, q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, kv_pskh: jax.Array):
        return sharded(layer * layer_pages, q_btnh, k_btkh, v_btkh, kv_pskh, slot_bt, told)

    return attend
