"""Attention's weights as an engine reads them: q, k and v of a layer in one matrix, o in two axes instead of three.

A product of few rows takes as long as its weights take to arrive, and the first piece of them arrives while nothing
else happens: one wait instead of three. On TPUs a matrix moreover lies as the products want it, while an axis of few
heads between two of hundreds would be copied to another layout at every call.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dr_jax.model import weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, spec
from dr_jax.model.weights import Params

# In place of q, k, v, o and their biases. A merged axis goes by its first letter, which also says how it is spread: of
# each kv head the channels of its query heads, of its key and of its value; in o, of each query head.
_ATTENTION = {"qkv": "ldk", "qkv_bias": "lk", "o": "lnd"}
_FOLDER = "blocks/attn/"


def program(mesh: Mesh, rules: Rules) -> Any:
    """The jitted function from `blocks/attn` of the learner's weights to an engine's."""
    return jax.jit(
        _join,
        out_shardings={name: NamedSharding(mesh, spec(row, rules.weights)) for name, row in _ATTENTION.items()},
    )


def _join(attn: Params) -> Params:
    layers, d, n, h = attn["q"].shape
    k = attn["k"].shape[2]

    def merged(name: str) -> jax.Array:
        queries, keys, values = (attn[each + name] for each in "qkv")
        queries = queries.reshape(*queries.shape[:-2], k, n // k, h)
        heads = jnp.concatenate([queries, keys[..., None, :], values[..., None, :]], axis=-2)
        return heads.reshape(*heads.shape[:-3], -1)

    return {"qkv": merged(""), "qkv_bias": merged("_bias"), "o": attn["o"].reshape(layers, n * h, d)}


def split(qkv_bti: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(`q_btnh`, `k_btkh`, `v_btkh`) of the i channels that a product with `qkv` gave."""
    b, t, _ = qkv_bti.shape
    heads_btkgh = qkv_bti.reshape(b, t, config.num_kv_heads, -1, config.head_dim)
    q_btnh = heads_btkgh[..., :-2, :].reshape(b, t, config.num_heads, config.head_dim)
    return q_btnh, heads_btkgh[..., -2, :], heads_btkgh[..., -1, :]


def letters(config: ModelConfig) -> dict[str, str]:
    """The letters of every weight of an engine, by path."""
    found: dict[str, str] = {}
    for row in weights.rows(config):
        if row.path.startswith(_FOLDER):
            found |= {_FOLDER + name: joined for name, joined in _ATTENTION.items()}
        else:
            found[row.path] = row.letters
    return found
