"""An engine's form of attention's weights: the same network, each chip with the heads it had before."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.model import hf, joined, qwen2, weights
from dr_jax.model.attention import packed
from dr_jax.model.letters import DEFAULT_RULES, make_mesh, spec


def as_engines(params, mesh):
    join = joined.program(mesh, DEFAULT_RULES)
    return params | {"blocks": params["blocks"] | {"attn": join(params["blocks"]["attn"])}}


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("t", [1, 5])
def test_the_network_is_the_same(tiny, t, tensor):
    model, mesh = tiny(tied=False), make_mesh({"data": 1, "fsdp": 1, "tensor": tensor})
    loaded = hf.load(model.directory, model.config, dtype=jnp.float32)
    token_bt = np.arange(3 * t, dtype=np.int32).reshape(3, t)
    position_bt = np.broadcast_to(np.arange(t, dtype=np.int32), token_bt.shape)

    @jax.jit
    def logits(params):
        attend = packed(np.ones_like(token_bt))
        x_btd, _ = qwen2.forward(params, model.config, token_bt, position_bt, attend=attend, rules=DEFAULT_RULES)
        return qwen2.unembed(params, model.config, x_btd)

    with jax.set_mesh(mesh):
        params = jax.device_put(loaded, weights.shardings(model.config, mesh, DEFAULT_RULES))
        engines = as_engines(params, mesh)
        np.testing.assert_allclose(logits(engines), logits(params), atol=1e-5)
    for path, letters in joined.letters(model.config).items():
        leaf = engines
        for name in path.split("/"):
            leaf = leaf[name]
        assert leaf.ndim == len(letters)
        assert leaf.sharding.spec == spec(letters, DEFAULT_RULES.weights)
    assert len(joined.letters(model.config)) == len(jax.tree.leaves(engines))
