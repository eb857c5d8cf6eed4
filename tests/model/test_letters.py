from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from dr_jax.errors import ConfigError
from dr_jax.model.config import QWEN2_5
from dr_jax.model.letters import DEFAULT_RULES, Rules, check_mesh, constrain, make_mesh, spec


def test_spec_of_default_rules():
    assert spec("ldnh", DEFAULT_RULES.weights) == PartitionSpec(None, "fsdp", "tensor", None)
    assert spec("btd", DEFAULT_RULES.activations) == PartitionSpec(("data", "fsdp"), None, None)


def test_unlisted_letter_raises():
    with pytest.raises(ConfigError, match="letter 'b' of 'bd' is not in the table"):
        spec("bd", DEFAULT_RULES.weights)


def test_letter_outside_the_alphabet_raises():
    with pytest.raises(ConfigError, match=r"rules.weights: unknown letter 'heads'"):
        Rules(weights={"heads": "tensor"}, activations={})


def test_axis_used_twice_raises():
    with pytest.raises(ConfigError, match="mesh axis 'tensor' would be used twice in an array 'df'"):
        spec("df", {"d": "tensor", "f": "tensor"})
    with pytest.raises(ConfigError, match="'fsdp' would be used twice"):
        spec("bd", {"b": ("data", "fsdp"), "d": "fsdp"})


def mesh(data=1, fsdp=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def test_impossible_mesh_sentence():
    with pytest.raises(ConfigError) as error:
        check_mesh(QWEN2_5["7B"], mesh(tensor=8), DEFAULT_RULES)
    assert str(error.value) == (
        "mesh.tensor: 28 query heads do not divide over tensor=8. "
        "Qwen2.5-7B allows tensor = 1, 2 or 4. Set config.mesh.tensor."
    )


@pytest.mark.parametrize(
    ("size", "tensors"),
    [
        ("0.5B", {1, 2}),
        ("1.5B", {1, 2}),
        ("3B", {1, 2}),
        ("7B", {1, 2, 4}),
        ("14B", {1, 2, 4, 8}),
        ("72B", {1, 2, 4, 8}),
    ],
)
def test_tensor_sizes_that_divide(size, tensors):
    def allowed(tensor):
        try:
            check_mesh(QWEN2_5[size], mesh(tensor=tensor), DEFAULT_RULES)
        except ConfigError:
            return False
        return True

    assert {tensor for tensor in range(1, 65) if allowed(tensor)} == tensors


def test_other_impossible_meshes():
    with pytest.raises(ConfigError, match=r"mesh.fsdp: 3584 channels do not divide over fsdp=3"):
        check_mesh(QWEN2_5["7B"], mesh(fsdp=3), DEFAULT_RULES)
    with pytest.raises(ConfigError, match="'v' uses mesh axis 'tensor', the mesh has data"):
        check_mesh(QWEN2_5["7B"], {"data": 1}, DEFAULT_RULES)
    both = dataclasses.replace(DEFAULT_RULES, weights={**DEFAULT_RULES.weights, "d": ("data", "fsdp")})
    with pytest.raises(
        ConfigError, match=r"mesh.fsdp: 3584 channels do not divide over data=2 x fsdp=512.*allows fsdp = 1"
    ):
        check_mesh(QWEN2_5["7B"], mesh(data=2, fsdp=512), both)


def test_mesh_larger_than_the_machine():
    with pytest.raises(ConfigError, match="mesh: data=2 x fsdp=8 needs 16 devices, this run has 8"):
        make_mesh({"data": 2, "fsdp": 8})
    with pytest.raises(ConfigError, match="data=0"):
        make_mesh({"data": 0})


def test_constrain_places_the_array():
    with jax.set_mesh(make_mesh(mesh(fsdp=2, tensor=2))):
        x_btf = jax.jit(lambda x: constrain(x, "btf", DEFAULT_RULES))(jnp.zeros((4, 3, 8)))
    assert x_btf.sharding.shard_shape(x_btf.shape) == (2, 3, 4)


def test_constrain_raises_without_a_mesh_or_with_wrong_letters():
    with pytest.raises(ConfigError, match="no mesh in scope"):
        constrain(jnp.zeros((4, 3, 8)), "btf", DEFAULT_RULES)
    with pytest.raises(ConfigError, match="'bt' does not name the axes"):
        constrain(jnp.zeros((4, 3, 8)), "bt", DEFAULT_RULES)


def test_constrain_raises_where_rows_do_not_divide():
    with (
        jax.set_mesh(make_mesh(mesh(fsdp=4))),
        pytest.raises(ConfigError, match="3 of 'b' in 'btf' do not divide over data=1 x fsdp=4"),
    ):
        jax.jit(lambda x: constrain(x, "btf", DEFAULT_RULES))(jnp.zeros((3, 3, 8)))
