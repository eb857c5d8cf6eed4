"""The kernels in Pallas's interpreter, against the attention that everything else is tested with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.model import attention, flash, letters

RULES = letters.DEFAULT_RULES
# Segments that begin and end inside, at and across blocks, a block without one of its own, and padding.
LENGTHS = [
    [(1, 128), (2, 100), (3, 20), (4, 264)],
    [(1, 512)],
    [(1, 200), (2, 3), (0, 309)],
    [(1, 140), (2, 244), (3, 128)],
]
SEGMENT_BT = jnp.asarray([[segment for segment, n in row for _ in range(n)] for row in LENGTHS], jnp.int32)


def in_blocks_of(side, compute, monkeypatch):
    """Fewer tokens than a TPU's blocks have, so that a short row has several."""
    monkeypatch.setattr(flash, "block", lambda length: side)
    monkeypatch.setattr(flash, "COMPUTE", compute)


@pytest.mark.parametrize(("side", "compute", "tensor"), [(128, 128, 2), (256, 128, 1), (512, 256, 1)])
def test_values_and_gradients_are_those_of_packed_attention(value_and_grads, side, compute, tensor, monkeypatch):
    in_blocks_of(side, compute, monkeypatch)
    want_btnh, want = value_and_grads(attention.packed, SEGMENT_BT)
    with jax.set_mesh(letters.make_mesh({"data": 1, "fsdp": 2, "tensor": tensor})):
        o_btnh, grads = value_and_grads(functools.partial(flash.packed, rules=RULES, interpret=True), SEGMENT_BT)
    real_bt = np.asarray(SEGMENT_BT > 0)
    np.testing.assert_allclose(np.asarray(o_btnh)[real_bt], np.asarray(want_btnh)[real_bt], atol=2e-5)
    assert np.isfinite(o_btnh).all()
    for grad, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(grad, expected, atol=5e-5)


def test_a_block_goes_over_what_its_segments_may_see_and_masks_only_where_something_is_hidden():
    spans = np.asarray(flash._spans(flash._begins(SEGMENT_BT), 128))
    first, whole = spans[:, 0].tolist(), spans[:, 1].tolist()
    assert first == [[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 2, 3], [0, 0, 1, 3]]
    # Row 0: the last block lies in one segment, which begins inside block 1; row 3: the last one sees itself alone, as
    # does each block of padding (row 2).
    assert whole == [[0, 1, 2, 2], [0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 2, 3]]


def test_a_head_may_be_narrower_than_a_tile():
    wide = jnp.ones((1, 128), jnp.int32)
    x_btnh = jnp.asarray(np.random.default_rng(0).normal(size=(1, 128, 2, 64)), jnp.float32)
    want_btnh, _ = attention.packed(wide)(jnp.int32(0), x_btnh, x_btnh, x_btnh, None)
    with jax.set_mesh(letters.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})):
        o_btnh, _ = jax.jit(lambda x: flash.packed(wide, RULES, interpret=True)(jnp.int32(0), x, x, x, None))(x_btnh)
    np.testing.assert_allclose(o_btnh, want_btnh, atol=2e-5)
