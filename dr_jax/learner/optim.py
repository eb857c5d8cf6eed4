"""AdamW as the recipes of this field use it: decoupled decay on matrices only, gradient clipped by its global norm."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from dr_jax.errors import ConfigError
from dr_jax.model import weights
from dr_jax.model.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer's numbers; the defaults are the reference's."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0  # linear, then constant
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    momentum_dtype: str = "float32"  # of the first moment; the second spans too many orders of magnitude for bfloat16

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, need > 0")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"{name}: got {getattr(self, name)}, need >= 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, need 0 <= {name} < 1")


def adamw(optim: OptimConfig, config: ModelConfig) -> optax.GradientTransformation:
    """Gradient -> step of AdamW, before the learning rate: the caller multiplies by `-learning_rate(...)`."""
    return optax.chain(
        optax.clip_by_global_norm(optim.max_grad_norm),
        optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps, mu_dtype=optim.momentum_dtype),
        optax.add_decayed_weights(optim.weight_decay, weights.decay_mask(config)),
    )


def learning_rate(optim: OptimConfig, step: jax.Array) -> jax.Array:
    """f32 rate of step number `step`, counted from 0; the warm-up starts at 1 / warmup_steps, so step 0 moves too."""
    warm = jnp.minimum((step + 1) / max(optim.warmup_steps, 1), 1.0)
    return (optim.learning_rate * warm).astype(jnp.float32)
