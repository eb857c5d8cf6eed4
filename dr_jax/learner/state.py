"""`TrainState`: everything a step changes. Every leaf has an explicit sharding.

Without one, XLA leaves Adam's counters and even its moments on device 0: a fresh run works, a restored one dies of
"incompatible devices".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dr_jax.learner.optim import OptimConfig, adamw
from dr_jax.model import weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules
from dr_jax.model.weights import Params


class TrainState(NamedTuple):
    """Parameters and optimizer in f32, whatever the step computes in: at lr 1e-6 bf16 would round every update away."""

    params: Params
    opt_state: Any
    step: jax.Array  # int32: batches seen, skipped ones included
    rng: jax.Array  # the run's key, never changed: whoever draws folds in the step


def init_state(
    params: Params, config: ModelConfig, optim: OptimConfig, mesh: Mesh, rules: Rules, *, seed: int = 0
) -> TrainState:
    """A fresh state from `params`, which are copied: the caller's stay valid, e.g. as the reference model."""
    placed = jax.device_put(params, weights.shardings(config, mesh, rules))
    build = jax.jit(_builder(config, optim, seed), out_shardings=state_shardings(config, optim, mesh, rules))
    return build(placed)


def state_shardings(config: ModelConfig, optim: OptimConfig, mesh: Mesh, rules: Rules) -> TrainState:
    """`NamedSharding` of every leaf: Adam's moments as the parameters they belong to, scalars everywhere."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_weight = weights.shardings(config, mesh, rules)
    shapes = _shapes(config, optim)
    opt_state = optax.tree_map_params(
        adamw(optim, config),
        lambda _, sharding: sharding,
        shapes.opt_state,
        by_weight,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(by_weight, opt_state, step=everywhere, rng=everywhere)


def abstract_state(config: ModelConfig, optim: OptimConfig, mesh: Mesh, rules: Rules) -> TrainState:
    """Shape, dtype and sharding of every leaf: what `Checkpoints.restore` needs to place a state on this mesh."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        _shapes(config, optim),
        state_shardings(config, optim, mesh, rules),
    )


def _shapes(config: ModelConfig, optim: OptimConfig) -> TrainState:
    return jax.eval_shape(_builder(config, optim, seed=0), weights.abstract(config, jnp.float32))


def _builder(config: ModelConfig, optim: OptimConfig, seed: int):
    def build(params: Params) -> TrainState:
        params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params)
        opt_state = adamw(optim, config).init(params)
        return TrainState(params, opt_state, step=jnp.zeros((), jnp.int32), rng=jax.random.key(seed))

    return build
