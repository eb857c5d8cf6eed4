"""The engine gets the learner's very weights, in its own layout; with two hosts: tests/test_hosts.py."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from dr_jax.errors import ConfigError
from dr_jax.learner import handover
from dr_jax.model import letters, weights


def test_engines_stand_side_by_side_and_the_first_is_this_hosts():
    mesh = handover.engines(2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()
    here = handover.here(mesh)
    assert dict(here.shape) == {"data": 1, "fsdp": 1, "tensor": 2}
    assert list(here.devices.flat) == jax.devices()[:2]


def test_an_engine_that_does_not_divide_a_host_is_refused():
    with pytest.raises(ConfigError, match="config.engine.tensor: 3 does not divide the 8 devices of host 0"):
        handover.engines(3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_whatever_the_order_of_the_learners_devices(params, config, rules, dtype):
    turned = np.array(jax.devices()).reshape(2, 4).T.reshape(1, 4, 2)
    for devices in (np.array(jax.devices()).reshape(1, 4, 2), turned):
        learner = jax.sharding.Mesh(devices, ("data", "fsdp", "tensor"))
        placed = jax.device_put(params, weights.shardings(config, learner, rules))
        side_by_side = handover.engines(2)
        got = handover.across_hosts(config, side_by_side, dtype)(placed)
        wanted = weights.shardings(config, handover.here(side_by_side), letters.DEFAULT_RULES)
        jax.tree.map(lambda leaf, to: leaf.sharding == to or pytest.fail(f"{leaf.sharding} != {to}"), got, wanted)
        jax.tree.map(lambda leaf, x: np.testing.assert_array_equal(leaf, x.astype(leaf.dtype)), got, params)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(got)} == {dtype}
