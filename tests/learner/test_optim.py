from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.errors import ConfigError
from dr_jax.learner.optim import OptimConfig, adamw, learning_rate
from dr_jax.model import weights


def test_warm_up_is_linear_then_constant():
    optim = OptimConfig(learning_rate=1e-3, warmup_steps=4)
    rates = [float(learning_rate(optim, jnp.int32(step))) for step in (0, 1, 3, 4, 1000)]
    np.testing.assert_allclose(rates, [0.25e-3, 0.5e-3, 1e-3, 1e-3, 1e-3], rtol=1e-6)
    assert float(learning_rate(OptimConfig(learning_rate=1e-6), jnp.int32(0))) == np.float32(1e-6)


def test_first_step_by_hand(config):
    # All gradients are g = 3: the global norm is 3 * sqrt(count), clipped to 1. Adam's first direction is g / |g| = 1
    # (less eps = 1e-8), whatever the clip; decay adds 0.1 * weight to matrices alone.
    optim = OptimConfig(weight_decay=0.1, max_grad_norm=1.0)
    params = weights.tree(config, lambda row: np.full(weights.shape(row, config), 2.0, np.float32))
    grads = weights.tree(config, lambda row: np.full(weights.shape(row, config), 3.0, np.float32))
    transform = adamw(optim, config)
    directions, state = jax.jit(lambda: transform.update(grads, transform.init(params), params))()
    clipped = 1 / np.sqrt(weights.count(config))
    adam = clipped / (clipped + 1e-8)
    np.testing.assert_allclose(directions["blocks"]["attn"]["q"], adam + 0.2, rtol=1e-5)
    np.testing.assert_allclose(directions["embed"], adam + 0.2, rtol=1e-5)
    np.testing.assert_allclose(directions["blocks"]["attn"]["q_bias"], adam, rtol=1e-5)
    np.testing.assert_allclose(directions["final_norm"], adam, rtol=1e-5)
    np.testing.assert_allclose(state[1].mu["embed"], 0.1 * clipped, rtol=1e-5)
    np.testing.assert_allclose(state[1].nu["embed"], 0.001 * clipped**2, rtol=1e-4)


@pytest.mark.parametrize("bad", [{"learning_rate": 0.0}, {"beta2": 1.0}, {"warmup_steps": -1}, {"max_grad_norm": 0.0}])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        OptimConfig(**bad)


def test_the_first_moment_can_be_half_as_large_and_the_second_cannot(config):
    params = weights.tree(config, lambda row: np.ones(weights.shape(row, config), np.float32))
    moments = jax.eval_shape(adamw(OptimConfig(momentum_dtype="bfloat16"), config).init, params)[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moments.mu)} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(moments.nu)} == {"float32"}
