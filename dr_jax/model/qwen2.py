"""Qwen2 forward pass: Flax NNX modules over a plain dict of stacked layers, scanned.

A module here is built from its slice of the params inside the scan, so parameters stay a plain nested dict outside, and
there is one source of shapes: `weights.TABLE`. Computation runs in the dtype of the params, norms, rotary embedding and
softmax in f32.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dr_jax.errors import ConfigError
from dr_jax.model import attention, joined
from dr_jax.model.attention import Attend
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, constrain, spec
from dr_jax.model.weights import Params

# What the backward pass finds stored, per layer, besides the layer's input. Less stored = less memory, more recomputed.
# For 7B in bf16, KiB a token and layer: 'full' 7, 'attention' 14 (its kernel does not run twice), 'projections' 30 (of
# products, only those of the MLP run twice), 'mlp' 88, 'products' 104 (none does).
_save = jax.checkpoint_policies.save_only_these_names
_MLP, _REST = ("gate_btf", "up_btf"), ("q_btnh", "k_btkh", "v_btkh", "middle_btd")
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "products": _save(attention.KEPT, *_MLP, *_REST),
    "mlp": _save(attention.KEPT, *_MLP),
    "projections": _save(attention.KEPT, *_REST),
    "attention": _save(attention.KEPT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class RmsNorm(nnx.Module):
    """x / rms(x) * scale, the division in f32."""

    def __init__(self, scale_d: jax.Array, eps: float):
        self.scale_d = nnx.Param(scale_d)
        self.eps = eps

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        x32_btd = x_btd.astype(jnp.float32)
        inverse_bt1 = jax.lax.rsqrt(jnp.mean(x32_btd * x32_btd, axis=-1, keepdims=True) + self.eps)
        return (x32_btd * inverse_bt1).astype(x_btd.dtype) * self.scale_d[...][None, None]


class Attention(nnx.Module):
    """Grouped-query attention with biased q, k, v and rotary positions. Where keys come from is `attend`'s business."""

    def __init__(self, params: Params, config: ModelConfig):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        self.config = config

    def __call__(self, x_btd, angles_bth, attend: Attend, layer: jax.Array, cache: Any, rules: Rules):
        q_btnh, k_btkh, v_btkh = self.heads(x_btd, rules)
        q_btnh = checkpoint_name(constrain(_rotate(q_btnh, angles_bth), "btnh", rules), "q_btnh")
        k_btkh = checkpoint_name(constrain(_rotate(k_btkh, angles_bth), "btkh", rules), "k_btkh")
        v_btkh = checkpoint_name(constrain(v_btkh, "btkh", rules), "v_btkh")
        o_btnh, cache = attend(layer, q_btnh, k_btkh, v_btkh, cache)
        return self.out(constrain(o_btnh, "btnh", rules), rules), cache

    def heads(self, x_btd: jax.Array, rules: Rules) -> tuple[jax.Array, jax.Array, jax.Array]:
        q_btnh = _times(x_btd, self.q[...], rules) + self.q_bias[...][None, None]
        k_btkh = _times(x_btd, self.k[...], rules) + self.k_bias[...][None, None]
        v_btkh = _times(x_btd, self.v[...], rules) + self.v_bias[...][None, None]
        return q_btnh, k_btkh, v_btkh

    def out(self, o_btnh: jax.Array, rules: Rules) -> jax.Array:
        return _times(o_btnh, self.o[...], rules, over=2)


class JoinedAttention(Attention):
    """The same with an engine's weights, see `joined`."""

    def heads(self, x_btd: jax.Array, rules: Rules) -> tuple[jax.Array, jax.Array, jax.Array]:
        return joined.split(_times(x_btd, self.qkv[...], rules) + self.qkv_bias[...][None, None], self.config)

    def out(self, o_btnh: jax.Array, rules: Rules) -> jax.Array:
        return _times(o_btnh.reshape(*o_btnh.shape[:2], -1), self.o[...], rules)


class Mlp(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, params: Params):
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))

    def __call__(self, x_btd: jax.Array, rules: Rules) -> jax.Array:
        gate_btf = checkpoint_name(constrain(_times(x_btd, self.gate[...], rules), "btf", rules), "gate_btf")
        up_btf = checkpoint_name(constrain(_times(x_btd, self.up[...], rules), "btf", rules), "up_btf")
        return _times(jax.nn.silu(gate_btf) * up_btf, self.down[...], rules)


class Block(nnx.Module):
    """One layer: pre-norm attention and pre-norm SwiGLU, each added to the residual stream."""

    def __init__(self, params: Params, config: ModelConfig):
        self.attn_norm = RmsNorm(params["attn_norm"], config.rms_eps)
        kind = JoinedAttention if "qkv" in params["attn"] else Attention
        self.attn = kind(params["attn"], config)
        self.mlp_norm = RmsNorm(params["mlp_norm"], config.rms_eps)
        self.mlp = Mlp(params["mlp"])

    def __call__(self, x_btd, angles_bth, attend: Attend, layer: jax.Array, cache: Any, rules: Rules):
        o_btd, cache = self.attn(self.attn_norm(x_btd), angles_bth, attend, layer, cache, rules)
        x_btd = checkpoint_name(constrain(x_btd + o_btd, "btd", rules), "middle_btd")
        x_btd = constrain(x_btd + self.mlp(self.mlp_norm(x_btd), rules), "btd", rules)
        return x_btd, cache


def forward(
    params: Params,
    config: ModelConfig,
    token_bt: jax.Array,
    position_bt: jax.Array,
    *,
    attend: Attend,
    rules: Rules,
    cache: Any = None,
    remat: str = "none",
) -> tuple[jax.Array, Any]:
    """Hidden states `x_btd` after the final norm, and the cache as `attend` left it.

    `attend(layer, q_btnh, k_btkh, v_btkh, cache) -> (o_btnh, cache)` is called once per layer with rotary positions
    already applied; `cache` is carried whole through the scan over layers, so it is updated in place. `remat` names a
    row of `REMAT`. Needs a mesh in scope.
    """
    if remat not in REMAT:
        raise ConfigError(f"remat: got {remat!r}, allowed are {', '.join(REMAT)}")
    angles_bth = _angles(config, position_bt)

    def body(carry, scanned):
        (x_btd, cache), (layer, block_params) = carry, scanned
        block = Block(block_params, config)
        return block(x_btd, angles_bth, attend, layer, cache, rules), None

    body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    # Whole channels, gathered over fsdp: XLA would replicate the rows looked up.
    whole = PartitionSpec(*spec("v", rules.activations), None)
    x_btd = constrain(jax.lax.with_sharding_constraint(params["embed"], whole)[token_bt], "btd", rules)
    layers = jnp.arange(config.num_layers, dtype=jnp.int32)
    (x_btd, cache), _ = jax.lax.scan(body, (x_btd, cache), (layers, params["blocks"]))
    return RmsNorm(params["final_norm"], config.rms_eps)(x_btd), cache


def unembed(params: Params, config: ModelConfig, x_td: jax.Array) -> jax.Array:
    """Logits `[..., v]` of hidden states `[..., d]`, f32."""
    if config.tie_embeddings:
        return jnp.einsum("...d,vd->...v", x_td, params["embed"], preferred_element_type=jnp.float32)
    return jnp.einsum("...d,dv->...v", x_td, params["unembed"], preferred_element_type=jnp.float32)


def _times(x: jax.Array, weight: jax.Array, rules: Rules, over: int = 1) -> jax.Array:
    """`[b, t, ...]` multiplied over its last `over` axes, which are the first of `weight`.

    One axis of tokens instead of two: on CPUs the gradient then takes a third less time. Where positions are spread
    over chips the two axes stay apart, or the reshaping would gather them.
    """
    if rules.activations["t"] is not None:
        return jnp.tensordot(x, weight, axes=over)
    b, t = x.shape[:2]
    inner = math.prod(weight.shape[:over])
    alone = _alone if t == 1 else lambda x: x
    product = alone(alone(x.reshape(b * t, inner)) @ weight.reshape(inner, -1))
    return product.reshape(b, t, *weight.shape[over:])


def _alone(x: jax.Array) -> jax.Array:
    """`x`, with which a TPU fuses nothing. It would run what comes before a product of few rows anew for each piece of
    the weights, and bring the weights into whatever layout suits what comes after."""
    return jax.lax.platform_dependent(x, tpu=jax.lax.optimization_barrier, default=lambda x: x)


def rope_frequencies(config: ModelConfig) -> tuple[np.ndarray, float]:
    """(radians per position of each pair of head channels, factor on cos and sin).

    Pair i of a head of width h turns by theta^(-2i/h) per position. YaRN divides the slow pairs by `factor`, leaves the
    fast ones, and ramps in between. Source: arXiv:2309.00071, section 3.2.
    """
    h, theta, yarn = config.head_dim, config.rope_theta, config.rope_scaling
    period = np.power(theta, np.arange(0, h, 2, dtype=np.float32) / np.float32(h), dtype=np.float32)
    if yarn is None:
        return 1 / period, 1.0

    def pair_at(turns: float) -> float:  # the pair that makes `turns` turns over the original context
        return h * math.log(yarn.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_at(yarn.beta_fast), pair_at(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, h - 1)
    high = high + 0.001 if low == high else high
    slow = np.clip((np.arange(h // 2, dtype=np.float32) - low) / (high - low), 0, 1).astype(np.float32)
    return 1 / (yarn.factor * period) * slow + 1 / period * (1 - slow), yarn.attention_factor


def _angles(config: ModelConfig, position_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    frequency, factor = rope_frequencies(config)
    angle_bth = position_bt.astype(jnp.float32)[..., None] * frequency[None, None]
    return jnp.cos(angle_bth) * factor, jnp.sin(angle_bth) * factor


def _rotate(x_btnh: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos_bt1h, sin_bt1h = (angle_bth[:, :, None] for angle_bth in angles)
    first, second = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos_bt1h - second * sin_bt1h, second * cos_bt1h + first * sin_bt1h], axis=-1)
    return turned.astype(x_btnh.dtype)
