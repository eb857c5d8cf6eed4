"""Attention over packed rows as a TPU kernel: the same values as `attention.packed`, whose scores never leave the chip.

The kernel is JAX's splash attention (Pallas). It sees one chip's rows and heads, so it runs under `shard_map`, and is
told the placement by the same letters as everything else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dr_jax.errors import ConfigError
from dr_jax.model.attention import KEPT, Attend
from dr_jax.model.letters import Rules, spec

LANES = 128  # a row's length must be a multiple of it, and a head at least so wide
_BLOCK = 1024  # queries or keys at a time; larger ones overflow the scratch memory of a v5p
_COMPUTE = 512  # keys multiplied at a time


def packed(segment_bt: jax.Array, rules: Rules, *, interpret: bool = False) -> Attend:
    """Attention of whole rows: each token to itself and to what came before it in its segment. Leaves `cache` alone.

    Needs a mesh in scope, and a TPU unless `interpret`. Outputs on padding (segment 0) are finite and mean nothing.
    """

    def local(q_bkgth: jax.Array, k_bkth: jax.Array, v_bkth: jax.Array, segment_bt: jax.Array) -> jax.Array:
        length = segment_bt.shape[1]
        causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * q_bkgth.shape[2])
        kernel = kernels.make_splash_mqa(
            causal, head_shards=1, q_seq_shards=1, block_sizes=_blocks(length), residual_checkpoint_name=KEPT,
            interpret=interpret,
        )  # fmt: skip
        # Mapped over kv heads, not told of them: only a mapped axis is shared by the two cores of a v4 or v5p in the
        # backward pass.
        of_row = jax.vmap(kernel, in_axes=(0, 0, 0, None))
        return jax.vmap(of_row)(q_bkgth, k_bkth, v_bkth, kernels.SegmentIds(segment_bt, segment_bt))

    return attend_by(local, segment_bt, rules)


def attend_by(local: Callable[..., jax.Array], segment_bt: jax.Array, rules: Rules, *, scale: float = 1.0) -> Attend:
    """Attention by a kernel that is given a chip's share: `local(q_bkgth, k_bkth, v_bkth, segment_bt)`, queries divided
    by the root of a head's width and multiplied by `scale`. Raises `ConfigError` for a row that has no whole tiles."""
    length = segment_bt.shape[1]
    if length % LANES:
        raise ConfigError(
            f"the attention kernels: rows of {length} tokens; need a multiple of {LANES} (batch.row_tokens)"
        )
    q_spec, k_spec = spec("bnth", rules.activations), spec("bkth", rules.activations)

    def by_kv_head(q_bnth: jax.Array, k_bkth: jax.Array, v_bkth: jax.Array, segment_bt: jax.Array) -> jax.Array:
        b, n, t, h = q_bnth.shape
        q_bkgth = q_bnth.reshape(b, k_bkth.shape[1], -1, t, h)
        return local(q_bkgth, k_bkth, v_bkth, segment_bt).reshape(b, n, t, h)

    sharded = jax.shard_map(
        by_kv_head,
        in_specs=(q_spec, k_spec, k_spec, spec("bt", rules.activations)),
        out_specs=q_spec,
        check_vma=False,
    )

    def attend(layer: jax.Array, q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, cache: Any):
        scaled_btnh = q_btnh * jnp.asarray(scale * q_btnh.shape[-1] ** -0.5, q_btnh.dtype)
        o_bnth = sharded(*(x.swapaxes(1, 2) for x in (scaled_btnh, k_btkh, v_btkh)), segment_bt)
        return o_bnth.swapaxes(1, 2), cache

    return attend


def block(length: int) -> int:
    """Queries, or keys, that the kernel takes at a time."""
    return math.gcd(length, _BLOCK)


def _blocks(length: int) -> kernels.BlockSizes:
    side, compute = block(length), math.gcd(length, _COMPUTE)
    return kernels.BlockSizes(
        block_q=side, block_kv=side, block_kv_compute=compute,
        block_q_dkv=side, block_kv_dkv=side, block_kv_dkv_compute=compute,
        block_q_dq=side, block_kv_dq=side,
    )  # fmt: skip
