from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.model.attention import packed


def plain(segment_bt):
    """The definition: one softmax over everything that may be seen."""

    def attend(layer, q_btnh, k_btkh, v_btkh, cache):
        group = q_btnh.shape[2] // k_btkh.shape[2]
        k_bsnh, v_bsnh = (jnp.repeat(x, group, axis=2) for x in (k_btkh, v_btkh))
        score_bnts = jnp.einsum("btnh,bsnh->bnts", q_btnh, k_bsnh) / np.float32(np.sqrt(q_btnh.shape[-1]))
        t = segment_bt.shape[1]
        seen_bts = (segment_bt[:, :, None] == segment_bt[:, None, :]) & np.tri(t, dtype=bool)[None]
        prob_bnts = jax.nn.softmax(jnp.where(seen_bts[:, None], score_bnts, -jnp.inf), axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", prob_bnts, v_bsnh), cache

    return attend


@jax.jit
def attention(segment_bt, q_btnh, k_btkh, v_btkh):
    return packed(segment_bt)(jnp.int32(0), q_btnh, k_btkh, v_btkh, None)[0]


def inputs(b, t, n, k, h, dtype=np.float32):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.normal(size=(b, t, heads, h)), dtype) for heads in (n, k, k))


def segments(*rows):
    """Rows given as runs: [(segment, length), ...]."""
    return jnp.asarray([[segment for segment, length in row for _ in range(length)] for row in rows], jnp.int32)


# 200 positions: four blocks of 64, the last one filled up; segments that start inside, at and across block borders.
SEGMENT_BT = segments([(1, 64), (2, 100), (3, 30), (0, 6)], [(1, 5), (2, 3), (0, 192)], [(1, 200)])


@pytest.fixture(scope="module")
def values_and_grads():
    """(output, gradients) of both ways, jitted once: the loss weighs every real output differently."""
    q_btnh, k_btkh, v_btkh = inputs(3, 200, 4, 2, 8)
    weight_btnh = jnp.asarray(np.random.default_rng(1).normal(size=q_btnh.shape), jnp.float32)
    weight_btnh *= (SEGMENT_BT > 0)[:, :, None, None]

    def run(make):
        def loss(qkv):
            o_btnh, _ = make(SEGMENT_BT)(jnp.int32(0), *qkv, None)
            return (o_btnh * weight_btnh).sum(), o_btnh

        (_, o_btnh), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))((q_btnh, k_btkh, v_btkh))
        return o_btnh, grads

    return run(packed), run(plain)


def test_values_are_the_definition(values_and_grads):
    (o_btnh, _), (want_btnh, _) = values_and_grads
    real_bt = np.asarray(SEGMENT_BT > 0)
    np.testing.assert_allclose(np.asarray(o_btnh)[real_bt], np.asarray(want_btnh)[real_bt], atol=1e-5)


def test_gradients_are_the_definition(values_and_grads):
    (_, grads), (_, want) = values_and_grads
    for grad, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(grad, expected, atol=2e-5)


def test_padding_is_finite_and_gives_no_gradient(values_and_grads):
    (o_btnh, grads), _ = values_and_grads
    padding_bt = np.asarray(SEGMENT_BT == 0)
    assert np.isfinite(o_btnh).all()
    for grad in grads:
        np.testing.assert_array_equal(np.asarray(grad)[padding_bt], 0)


def test_gradient_flows_only_back_and_only_within_the_segment():
    """d o[t] / d (q, k, v)[s] is exactly 0 unless s <= t in the same segment, and not 0 there."""
    b, t = 1, 150
    segment_bt = segments([(1, 70), (2, 60), (0, 20)])
    q_btnh, k_btkh, v_btkh = inputs(b, t, 2, 1, 4)

    @jax.jit
    def reach(at):
        def output(k_btkh, v_btkh):
            return attention(segment_bt, q_btnh, k_btkh, v_btkh)[:, at].sum()

        dk_btkh, dv_btkh = jax.grad(output, argnums=(0, 1))(k_btkh, v_btkh)
        return jnp.abs(dk_btkh).sum((0, 2, 3)), jnp.abs(dv_btkh).sum((0, 2, 3))

    for at, first in {0: 0, 40: 0, 69: 0, 70: 70, 100: 70, 129: 70}.items():
        may_s = (np.arange(t) >= first) & (np.arange(t) <= at)
        dk_s, dv_s = map(np.asarray, reach(at))
        assert (dv_s[may_s] > 0).all()
        np.testing.assert_array_equal(dv_s[~may_s], 0)
        np.testing.assert_array_equal(dk_s[~may_s], 0)


def test_segment_alone_equals_segment_in_a_row(values_and_grads):
    (o_btnh, _), _ = values_and_grads
    q_btnh, k_btkh, v_btkh = (x[:1, 64:164] for x in inputs(3, 200, 4, 2, 8))
    alone_btnh = attention(jnp.ones((1, 100), jnp.int32), q_btnh, k_btkh, v_btkh)
    np.testing.assert_allclose(alone_btnh, o_btnh[:1, 64:164], atol=1e-6)


def test_bfloat16_keeps_its_dtype_and_sums_in_f32():
    qkv = inputs(1, 256, 2, 1, 16, jnp.bfloat16)
    segment_bt = jnp.ones((1, 256), jnp.int32)
    o_btnh = attention(segment_bt, *qkv)
    want_btnh, _ = plain(segment_bt)(jnp.int32(0), *(x.astype(jnp.float32) for x in qkv), None)
    assert o_btnh.dtype == jnp.bfloat16
    np.testing.assert_allclose(o_btnh.astype(jnp.float32), want_btnh, atol=0.02)


def test_training_memory_is_a_fraction_of_one_score_matrix():
    b, t, n, h = 1, 1024, 8, 16
    qkv = [jax.ShapeDtypeStruct((b, t, n, h), jnp.float32)] * 3
    loss = lambda *qkv: packed(jnp.ones((b, t), jnp.int32))(jnp.int32(0), *qkv, None)[0].sum()  # noqa: E731
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*qkv).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * b * n * t * t / 4
