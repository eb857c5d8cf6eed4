"""The weight table: 15 rows that give shapes, placement, initialisation, decay, count and Hugging Face names.

Parameters are a plain nested dict; `blocks/...` leaves are stacked over layers, so `params['blocks']['attn']['q']` is
an `ldnh` array.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, sizes, spec

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row. `hf_layout` gives the axes of the Hugging Face tensor; letters written together are one merged axis."""

    path: str
    letters: str
    hf_name: str
    hf_layout: str
    init: str

    @property
    def stacked(self) -> bool:
        return self.letters[0] == "l"

    @property
    def decays(self) -> bool:
        """Weight decay pulls matrices towards 0; norms and biases stay out of it."""
        return self.init == "normal"


_LAYER = "model.layers.{l}."
TABLE = (
    Weight("embed", "vd", "model.embed_tokens.weight", "v d", "normal"),
    Weight("blocks/attn_norm", "ld", _LAYER + "input_layernorm.weight", "d", "ones"),
    Weight("blocks/attn/q", "ldnh", _LAYER + "self_attn.q_proj.weight", "nh d", "normal"),
    Weight("blocks/attn/q_bias", "lnh", _LAYER + "self_attn.q_proj.bias", "nh", "zeros"),
    Weight("blocks/attn/k", "ldkh", _LAYER + "self_attn.k_proj.weight", "kh d", "normal"),
    Weight("blocks/attn/k_bias", "lkh", _LAYER + "self_attn.k_proj.bias", "kh", "zeros"),
    Weight("blocks/attn/v", "ldkh", _LAYER + "self_attn.v_proj.weight", "kh d", "normal"),
    Weight("blocks/attn/v_bias", "lkh", _LAYER + "self_attn.v_proj.bias", "kh", "zeros"),
    Weight("blocks/attn/o", "lnhd", _LAYER + "self_attn.o_proj.weight", "d nh", "normal"),
    Weight("blocks/mlp_norm", "ld", _LAYER + "post_attention_layernorm.weight", "d", "ones"),
    Weight("blocks/mlp/gate", "ldf", _LAYER + "mlp.gate_proj.weight", "f d", "normal"),
    Weight("blocks/mlp/up", "ldf", _LAYER + "mlp.up_proj.weight", "f d", "normal"),
    Weight("blocks/mlp/down", "lfd", _LAYER + "mlp.down_proj.weight", "d f", "normal"),
    Weight("final_norm", "d", "model.norm.weight", "d", "ones"),
    Weight("unembed", "dv", "lm_head.weight", "v d", "normal"),  # untied models only
)

_INIT = {
    "normal": lambda rng, shape: 0.02 * jax.random.normal(rng, shape),
    "ones": lambda rng, shape: jnp.ones(shape),
    "zeros": lambda rng, shape: jnp.zeros(shape),
}


def rows(config: ModelConfig) -> tuple[Weight, ...]:
    """The rows that this model has: a tied model has no `unembed`."""
    return tuple(row for row in TABLE if not (config.tie_embeddings and row.path == "unembed"))


def shape(row: Weight, config: ModelConfig) -> tuple[int, ...]:
    """Shape of one weight, layers included."""
    return tuple(sizes(config)[letter] for letter in row.letters)


def tree(config: ModelConfig, leaf: Callable[[Weight], Any]) -> Params:
    """Nested dict with `leaf(row)` at each row's path."""
    nested: Params = {}
    for row in rows(config):
        *folders, name = row.path.split("/")
        node = nested
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf(row)
    return nested


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every weight, by path."""
    return {row.path: shape(row, config) for row in rows(config)}


def count(config: ModelConfig) -> int:
    """Number of parameters; a tied embedding counts once."""
    return sum(math.prod(dims) for dims in shapes(config).values())


def abstract(config: ModelConfig, dtype: Any) -> Params:
    """The parameters as `jax.ShapeDtypeStruct`s."""
    return tree(config, lambda row: jax.ShapeDtypeStruct(shape(row, config), dtype))


def init(config: ModelConfig, rng: jax.Array, dtype: Any = jnp.float32) -> Params:
    """Fresh parameters: matrices normal(0, 0.02), norms 1, biases 0. Jit with `out_shardings` to build in place."""

    def leaf(row: Weight) -> jax.Array:
        return _INIT[row.init](jax.random.fold_in(rng, TABLE.index(row)), shape(row, config)).astype(dtype)

    return tree(config, leaf)


def shardings(config: ModelConfig, mesh: Mesh, rules: Rules) -> Params:
    """`NamedSharding` of every weight."""
    return tree(config, lambda row: NamedSharding(mesh, spec(row.letters, rules.weights)))


def decay_mask(config: ModelConfig) -> Params:
    """True where weight decay applies."""
    return tree(config, lambda row: row.decays)
