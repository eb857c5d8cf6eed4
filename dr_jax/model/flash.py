"""Attention over packed rows as TPU kernels of our own: the values of `attention.packed`, faster than `splash`.

A row's keys and values stay in on-chip memory while its blocks of queries pass, so a block goes over just the blocks of
keys that it sees, from where its first segment begins: no step is taken to find out that there is nothing to do,
packed episodes do not pay for each other, and each block of padding goes over itself alone. Only blocks in which
something is hidden are masked. The backward pass is one kernel of five products, where splash has two with seven: the
gradients of keys and values stay on the chip as well, and are added up in f32. It asks for 12 bytes a token and channel
of a head, 48 MiB for 32,768 tokens: a v5e, v5p and v6e have it, a v4 has not. Scores are in base 2, whose exponential
the chip computes. Source: FlashAttention-2, arXiv:2307.08691.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dr_jax.model.attention import KEPT, MASKED, Attend
from dr_jax.model.letters import Rules
from dr_jax.model.splash import LANES, attend_by, block

COMPUTE = 512  # keys multiplied at a time
PRODUCTS = {"flash_fwd": 2, "flash_bwd": 5}  # of a pair of blocks: scores and sum; scores, dv, dp, dk and dq
_BLOCKS_BYTES = 24 * 2**20  # of on-chip memory, beside what stays there of a row
_LN2 = math.log(2)

_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_ROWS_BY_COLUMNS, _ROWS_BY_ROWS, _COLUMNS_BY_COLUMNS = ((((i,), (j,)), ((), ())) for i, j in ((1, 0), (1, 1), (0, 0)))


def packed(segment_bt: jax.Array, rules: Rules, *, interpret: bool = False) -> Attend:
    """As `splash.packed`. The tokens of a segment lie side by side, as `PackedBatch` has them."""

    def local(q_bkgth: jax.Array, k_bkth: jax.Array, v_bkth: jax.Array, segment_bt: jax.Array) -> jax.Array:
        return _attention(q_bkgth, k_bkth, v_bkth, _begins(segment_bt), interpret)

    return attend_by(local, segment_bt, rules, scale=1 / _LN2)


def _begins(segment_bt: jax.Array) -> jax.Array:
    """Where the segment of each token begins: what it sees lies between there and itself. Padding sees itself alone."""
    changes_bt = jnp.pad(segment_bt[:, 1:] != segment_bt[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts_bt = changes_bt | (segment_bt == 0)
    return jax.lax.cummax(jnp.where(starts_bt, jnp.arange(segment_bt.shape[1], dtype=jnp.int32)[None], 0), axis=1)


def _spans(begin_bt: jax.Array, side: int) -> jax.Array:
    """`[b, 2, blocks]`: the first block of keys that a block of queries sees, and from where it sees all of each block
    before its own."""
    first_bi, last_bi = begin_bt[:, ::side], begin_bt[:, side - 1 :: side]
    own_1i = jnp.arange(first_bi.shape[1], dtype=jnp.int32)[None]
    whole_bi = jnp.where(first_bi == last_bi, jnp.minimum(-(-first_bi // side), own_1i), own_1i)
    return jnp.stack([first_bi // side, whole_bi], axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_bkgth, k_bkth, v_bkth, begin_bt, interpret):
    return _forward(q_bkgth, k_bkth, v_bkth, begin_bt, interpret)[0]


def _forward(q_bkgth, k_bkth, v_bkth, begin_bt, interpret):
    b, k, g, t, h = q_bkgth.shape
    side = block(t)
    like_row, like_line = jax.ShapeDtypeStruct(q_bkgth.shape, q_bkgth.dtype), _f32(b, k, g, 1, t)
    begins = jnp.broadcast_to(begin_bt[..., None], (b, t, LANES))
    begin_spec = pl.BlockSpec((None, side, LANES), lambda b, k, g, i, *_: (b, i, 0))
    o_bkgth, lse_bkg1t = _call(
        "flash_fwd", _forward_block, (q_bkgth, k_bkth, v_bkth), (begins, begin_spec), (), (like_row, like_line),
        [(side, LANES), (side, LANES), (side, h)], begin_bt, interpret,
    )  # fmt: skip
    o_bkgth, lse_bkg1t = checkpoint_name(o_bkgth, KEPT), checkpoint_name(lse_bkg1t, KEPT)
    return o_bkgth, (q_bkgth, k_bkth, v_bkth, begin_bt, o_bkgth, lse_bkg1t)


def _backward(interpret, kept, do_bkgth):
    q_bkgth, k_bkth, v_bkth, begin_bt, o_bkgth, lse_bkg1t = kept
    t, h = q_bkgth.shape[3:]
    side = block(t)
    dot_bkg1t = (o_bkgth.astype(jnp.float32) * do_bkgth.astype(jnp.float32)).sum(-1)[..., None, :]
    like_row = jax.ShapeDtypeStruct(q_bkgth.shape, q_bkgth.dtype)
    begin_spec = pl.BlockSpec((None, 1, side), lambda b, k, g, i, *_: (b, 0, i))
    dq_bkgth, dk_bkth, dv_bkth = _call(
        "flash_bwd", _backward_block, (q_bkgth, k_bkth, v_bkth), (begin_bt[:, None], begin_spec),
        (do_bkgth, lse_bkg1t, dot_bkg1t), (like_row, _f32(*k_bkth.shape), _f32(*v_bkth.shape)),
        [(side, h)], begin_bt, interpret,
    )  # fmt: skip
    return dq_bkgth, (dk_bkth * _LN2).astype(k_bkth.dtype), dv_bkth.astype(v_bkth.dtype), None


_attention.defvjp(_forward, _backward)


def _call(name, kernel, qkv, begins, more, results, scratch, begin_bt, interpret) -> Any:
    """Runs `kernel` for each row, kv head, query head of it, and block of queries: q, k, v, begins, `more`."""
    b, k, g, t, h = qkv[0].shape
    side = block(t)
    tile = pl.BlockSpec((None, None, None, side, h), lambda b, k, g, i, *_: (b, k, g, i, 0))
    line = pl.BlockSpec((None, None, None, 1, side), lambda b, k, g, i, *_: (b, k, g, 0, i))
    whole = pl.BlockSpec((None, None, t, h), lambda b, k, *_: (b, k, 0, 0), pipeline_mode=pl.Buffered(1))

    def spec_of(x: Any) -> pl.BlockSpec:
        return whole if len(x.shape) == 4 else (line if x.shape[3] == 1 else tile)

    pairs = b * k * g * t * (t + side) / 2
    return pl.pallas_call(
        functools.partial(kernel, side=side, compute=math.gcd(side, COMPUTE)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, k, g, t // side),
            in_specs=[*map(spec_of, qkv), begins[1], *map(spec_of, more)],
            out_specs=[*map(spec_of, results)],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=results,
        # Where a chip has two cores, they share the kv heads; a single head would keep one of them busy.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=12 * t * h + _BLOCKS_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=int(PRODUCTS[name] * 2 * pairs * h),
            transcendentals=int(pairs),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*qkv, *more, *results)),
        ),
        interpret=interpret,
        name=name,
    )(_spans(begin_bt, side), *qkv, begins[0], *more)


def _forward_block(spans, q, k, v, begin, o, lse, top, total, added, *, side: int, compute: int) -> None:
    """Softmax attention of one block of queries, renormalised as the running maximum grows. Refs; `top` and `total`
    are the same in all lanes."""
    top[...] = jnp.full_like(top, MASKED)
    total[...], added[...] = jnp.zeros_like(total), jnp.zeros_like(added)
    i = pl.program_id(3)

    def add(start: jax.Array, hidden: bool) -> None:
        at = pl.ds(pl.multiple_of(start, compute), compute)
        score_ts = _dot(q[...], k[at, :], _ROWS_BY_ROWS)
        if hidden:
            s_ts = start - i * side + jax.lax.broadcasted_iota(jnp.int32, (side, compute), 1)
            begin_ts = jnp.tile(begin[...] - i * side, (1, compute // LANES))
            t_ts = jax.lax.broadcasted_iota(jnp.int32, (side, compute), 0)
            score_ts = jnp.where((begin_ts <= s_ts) & (s_ts <= t_ts), score_ts, MASKED)
        before = top[...]
        top[...] = jnp.maximum(before, score_ts.max(-1)[:, None])
        prob_ts = jnp.exp2(score_ts - jnp.tile(top[...], (1, compute // LANES)))
        shrink = jnp.exp2(before - top[...])
        total[...] = total[...] * shrink + prob_ts.sum(-1)[:, None]
        part_th = _dot(prob_ts.astype(v.dtype), v[at, :], _ROWS_BY_COLUMNS)
        added[...] = added[...] * _lanes(shrink, added.shape[1]) + part_th

    _go_over(spans, side, compute, add)
    o[...] = (added[...] / _lanes(total[...], added.shape[1])).astype(o.dtype)
    lse[...] = (top[...] + jnp.log2(total[...])).T[:1]


def _backward_block(spans, q, k, v, begin, do, lse, dot, dq, dk, dv, added, *, side: int, compute: int) -> None:
    """Gradients by one block of queries, whose own is done with it; dk and dv add up over the blocks of all its query
    heads. Scores lie with keys in rows here, so that what belongs to a query is one line. Refs."""
    i = pl.program_id(3)

    @pl.when((pl.program_id(2) == 0) & (i == 0))
    def _start() -> None:
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    added[...] = jnp.zeros_like(added)

    def add(start: jax.Array, hidden: bool) -> None:
        at = pl.ds(pl.multiple_of(start, compute), compute)
        score_st = _dot(k[at, :], q[...], _ROWS_BY_ROWS)
        if hidden:
            s_st = start - i * side + jax.lax.broadcasted_iota(jnp.int32, (compute, side), 0)
            t_st = jax.lax.broadcasted_iota(jnp.int32, (compute, side), 1)
            score_st = jnp.where((begin[...] - i * side <= s_st) & (s_st <= t_st), score_st, MASKED)
        prob_st = jnp.exp2(score_st - lse[...])
        dv[at, :] += _dot(prob_st.astype(v.dtype), do[...], _ROWS_BY_COLUMNS)
        dprob_st = _dot(v[at, :], do[...], _ROWS_BY_ROWS)
        dscore_st = (prob_st * (dprob_st - dot[...])).astype(q.dtype)
        dk[at, :] += _dot(dscore_st, q[...], _ROWS_BY_COLUMNS)
        added[...] += _dot(dscore_st, k[at, :], _COLUMNS_BY_COLUMNS)

    _go_over(spans, side, compute, add)
    dq[...] = (added[...] * _LN2).astype(dq.dtype)


def _go_over(spans, side: int, compute: int, add: Callable[[jax.Array, bool], None]) -> None:
    """`add(start, hidden)` for every stretch of keys that this block of queries sees; `hidden`: not all of it."""
    row, i = pl.program_id(0), pl.program_id(3)
    first, whole = spans[row, 0, i], spans[row, 1, i]
    before = whole - first

    def add_block(j: jax.Array, hidden: bool) -> None:
        for part in range(side // compute):
            add(j * side + part * compute, hidden)

    # The blocks in which its segments begin, and last its own.
    jax.lax.fori_loop(0, before + 1, lambda n, _: add_block(jnp.where(n == before, i, first + n), True), None)
    jax.lax.fori_loop(whole, i, lambda j, _: add_block(j, False), None)


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """`[t, LANES]` whose lanes are equal, `width` wide."""
    return jnp.tile(x, (1, -(-width // LANES)))[:, :width]


def _f32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
