"""The noise is JAX's own, to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.engine.noise import gumbel


def test_every_row_is_what_jax_draws_from_its_key():
    seed_b = jnp.array([0, 1, 7, 2**32 - 1], jnp.uint32)
    index_b = jnp.array([0, 3, 100_000, 2**31 - 1], jnp.int32)
    got_bv = jax.jit(gumbel, static_argnums=2)(seed_b, index_b, 5003)
    for row, seed, index in zip(got_bv, seed_b, index_b, strict=True):
        want_v = jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), (5003,))
        np.testing.assert_array_equal(row, want_v)
    assert np.isfinite(got_bv).all()
