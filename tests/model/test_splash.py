"""The kernel in Pallas's interpreter, against the attention that everything else is tested with."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.errors import ConfigError
from dr_jax.model import attention, letters, splash

RULES = letters.DEFAULT_RULES
# Segments that end inside, at and across blocks of 128, a row of one segment, and padding.
LENGTHS = [[(1, 128), (2, 100), (3, 20), (0, 8)], [(1, 256)]]
SEGMENT_BT = jnp.asarray([[segment for segment, n in row for _ in range(n)] for row in LENGTHS], jnp.int32)


@pytest.mark.parametrize("tensor", [1, 2])
def test_values_and_gradients_are_those_of_packed_attention(value_and_grads, tensor):
    want_btnh, want = value_and_grads(attention.packed, SEGMENT_BT)
    with jax.set_mesh(letters.make_mesh({"data": 1, "fsdp": 2, "tensor": tensor})):
        o_btnh, grads = value_and_grads(functools.partial(splash.packed, rules=RULES, interpret=True), SEGMENT_BT)
    real_bt = np.asarray(SEGMENT_BT > 0)
    np.testing.assert_allclose(np.asarray(o_btnh)[real_bt], np.asarray(want_btnh)[real_bt], atol=2e-5)
    assert np.isfinite(o_btnh).all()
    for grad, expected in zip(grads, want, strict=True):
        np.testing.assert_allclose(grad, expected, atol=5e-5)


def test_a_length_the_kernel_cannot_tile_is_a_clear_error():
    with pytest.raises(ConfigError, match="rows of 100 tokens; need a multiple of 128 .batch.row_tokens."):
        splash.packed(SEGMENT_BT[:, :100], RULES)
