from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dr_jax.learner.optim import OptimConfig
from dr_jax.learner.state import abstract_state, init_state
from dr_jax.model import letters


def test_every_leaf_is_placed_on_the_whole_mesh(config, rules, params):
    mesh = letters.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    state = init_state(params, config, OptimConfig(), mesh, rules, seed=5)
    abstract = abstract_state(config, OptimConfig(), mesh, rules)

    def check(leaf, expected):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.sharding == expected.sharding
        assert leaf.sharding.mesh == mesh

    jax.tree.map(check, state, abstract)
    q = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor", None))
    adam = state.opt_state[1]
    assert state.params["blocks"]["attn"]["q"].sharding == q
    assert adam.mu["blocks"]["attn"]["q"].sharding == adam.nu["blocks"]["attn"]["q"].sharding == q
    assert adam.count.sharding == NamedSharding(mesh, PartitionSpec())
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(jax.random.key(5)))


def test_params_are_copied_to_f32(config, rules, mesh, params):
    given = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    state = init_state(given, config, OptimConfig(), mesh, rules)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    same = init_state(state.params, config, OptimConfig(), mesh, rules)
    jax.tree.map(lambda leaf: leaf.delete(), same.params)  # what donation does
    np.testing.assert_array_equal(state.params["embed"], np.asarray(given["embed"], np.float32))
