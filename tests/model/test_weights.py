from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dr_jax.model import weights
from dr_jax.model.config import QWEN2_5
from dr_jax.model.letters import DEFAULT_RULES, make_mesh, sizes

# The published parameter counts.
COUNT = {
    "0.5B": 494_032_768,
    "1.5B": 1_543_714_304,
    "3B": 3_085_938_688,
    "7B": 7_615_616_512,
    "14B": 14_770_033_664,
    "32B": 32_763_876_352,
    "72B": 72_706_203_648,
}


@pytest.mark.parametrize("size", COUNT)
def test_count_and_abstract_init(size):
    config = QWEN2_5[size]
    abstract = jax.eval_shape(lambda: weights.init(config, jax.random.key(0), jnp.bfloat16))
    assert weights.count(config) == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == COUNT[size]
    assert abstract == weights.abstract(config, jnp.bfloat16)


def test_seven_billion_tree():
    shapes = weights.shapes(QWEN2_5["7B"])
    assert len(shapes) == 15
    assert shapes["blocks/attn/q"] == (28, 3584, 28, 128)
    assert shapes["blocks/attn/v_bias"] == (28, 4, 128)
    assert shapes["blocks/mlp/down"] == (28, 18944, 3584)
    assert shapes["unembed"] == (3584, 152064)
    assert "unembed" not in weights.shapes(QWEN2_5["3B"])


@pytest.mark.parametrize("tied", [True, False])
def test_names_and_shapes_are_those_of_transformers(tiny, tied):
    model = tiny(tied=tied)
    size = sizes(model.config)
    ours = {}
    for row in weights.rows(model.config):
        for layer in range(model.config.num_layers if row.stacked else 1):
            ours[row.hf_name.format(l=layer)] = tuple(
                math.prod(size[letter] for letter in merged) for merged in row.hf_layout.split()
            )
    theirs = {name: tuple(weight.shape) for name, weight in model.torch_model.named_parameters()}
    assert ours == theirs


def test_layout_holds_the_letters_of_the_row():
    for row in weights.TABLE:
        assert sorted(row.hf_layout.replace(" ", "")) == sorted(row.letters.removeprefix("l"))


def test_init_values_dtype_and_placement(tiny):
    config, mesh = tiny(tied=False).config, make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    placed = weights.shardings(config, mesh, DEFAULT_RULES)
    build = lambda rng: weights.init(config, rng, jnp.bfloat16)  # noqa: E731
    params = jax.jit(build, out_shardings=placed)(jax.random.key(0, impl="rbg"))  # rbg: compiles in half the time
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert params["blocks"]["attn"]["o"].sharding.spec == PartitionSpec(None, "tensor", None, "fsdp")
    assert float(params["embed"].astype(jnp.float32).std()) == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(params["blocks"]["mlp"]["gate"], params["blocks"]["mlp"]["up"])
    np.testing.assert_array_equal(params["final_norm"], np.ones(64))
    np.testing.assert_array_equal(params["blocks"]["attn"]["q_bias"], np.zeros((3, 4, 16)))


def test_decay_spares_norms_and_biases():
    spared = {row.path for row in weights.TABLE if not row.decays}
    assert spared == {
        "blocks/attn_norm", "blocks/mlp_norm", "final_norm",
        "blocks/attn/q_bias", "blocks/attn/k_bias", "blocks/attn/v_bias",
    }  # fmt: skip
    mask = weights.decay_mask(QWEN2_5["7B"])
    assert mask["blocks"]["attn"]["q"] is True
    assert mask["final_norm"] is False
