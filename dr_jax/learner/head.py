"""The products with the head's weight, and the loss's gradient through them, over chunks of trained tokens.

A loss is a sum over tokens, so its slope by a chunk's logits is known as soon as they are: the gradient is made there
and then, by two more products. Nothing as large as `[b, t, v]` exists, and no logit is multiplied twice. Tokens that
train nothing are left out: each device sorts its trained tokens to the front, and all go on until the last is done.
Source: the gradient in the forward pass is that of Liger Kernel's fused linear cross-entropy, arXiv:2410.10989.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dr_jax.batch import PackedBatch
from dr_jax.errors import ConfigError
from dr_jax.model import qwen2
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, axes_of, constrain
from dr_jax.model.weights import Params


class Terms(NamedTuple):
    """Sums over some tokens, all f32 scalars. They may be split in any way: add the parts with `plus`, and divide by
    `weight` once, at the end."""

    loss: jax.Array
    sums: dict[str, jax.Array]
    maxima: dict[str, jax.Array]  # the largest of all parts; none is negative
    weight: jax.Array

    def plus(self, other: Terms) -> Terms:
        """The terms of both."""
        maxima = jax.tree.map(jnp.maximum, self.maxima, other.maxima)
        return jax.tree.map(jnp.add, self, other)._replace(maxima=maxima)


# (logp_bt, entropy_bt, ref_logp_bt, batch) -> Terms, to which each token adds what its own column says.
LossOf = Callable[[jax.Array, jax.Array, jax.Array | None, PackedBatch], Terms]


@dataclasses.dataclass(frozen=True)
class Head:
    """How log-probabilities are made: of softmax(logits / temperature), for `chunk` tokens of a device at a time."""

    config: ModelConfig
    rules: Rules
    temperature: float = 1.0
    chunk: int = 512

    @property
    def weight(self) -> str:
        """The name of its weight among the params."""
        return "embed" if self.config.tie_embeddings else "unembed"

    def logits(self, weights: Params, x_td: jax.Array) -> jax.Array:
        """Of tokens that lie on one device, `logits_tv`, f32."""
        here = dataclasses.replace(self.rules, activations={**self.rules.activations, "t": None})
        return constrain(qwen2.unembed(weights, self.config, x_td), "tv", here) / self.temperature


def logps(
    head: Head, params: Params, x_btd: jax.Array, target_bt: jax.Array, wanted_bt: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(log-probability of the target, entropy) where wanted, f32, nats; 0 elsewhere."""

    def local(weights: Params, x_btd: jax.Array, target_bt: jax.Array, wanted_bt: jax.Array):
        def visit(_, tokens):
            x_td, target_t = tokens
            return None, _pick(head.logits(weights, x_td), target_t)

        _, picked = _in_chunks(head, visit, None, (x_btd, target_bt), wanted_bt)
        return tuple(jnp.where(wanted_bt, picked_bt, 0.0) for picked_bt in picked)

    rows = _rows(head)
    return _on_each_device(head, local, (PartitionSpec(), rows, rows, rows), rows)(
        {head.weight: params[head.weight]}, x_btd, target_bt, wanted_bt
    )


def gradients(
    head: Head, params: Params, x_btd: jax.Array, batch: PackedBatch, ref_logp_bt: jax.Array | None, loss_of: LossOf
) -> tuple[Terms, Params, jax.Array]:
    """(terms, gradient of their loss by the head's weight, by `x_btd`); both in the dtype of what they are by.

    Column t of `batch` and `ref_logp_bt` speaks of the token that `x_btd` at t predicts.
    """

    def local(weights: Params, x_btd: jax.Array, batch: PackedBatch, ref_logp_bt: jax.Array | None):
        def visit(so_far, tokens):
            x_td, *of_loss = tokens

            def numerator(weights: Params, x_td: jax.Array) -> tuple[jax.Array, Terms]:
                picked = _pick(head.logits(weights, x_td), of_loss[0].token_bt)
                (logp_bt, entropy_bt), (chunk, ref_logp_bt) = jax.tree.map(lambda x_t: x_t[None], (picked, of_loss))
                terms = loss_of(logp_bt, entropy_bt, ref_logp_bt, chunk)
                return terms.loss, terms

            (_, terms), (by_weights, by_x_td) = jax.value_and_grad(numerator, (0, 1), has_aux=True)(weights, x_td)
            return (so_far[0].plus(terms), jax.tree.map(jnp.add, so_far[1], by_weights)), by_x_td

        spoken_bt = jax.ShapeDtypeStruct(batch.weight_bt.shape, jnp.float32)
        shapes = jax.eval_shape(loss_of, spoken_bt, spoken_bt, ref_logp_bt, batch)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, weights))
        (terms, by_weights), by_x_btd = _in_chunks(head, visit, zeros, (x_btd, batch, ref_logp_bt), batch.weight_bt > 0)
        axes = _shared(head)
        terms = jax.lax.psum(terms, axes)._replace(maxima=jax.lax.pmax(terms.maxima, axes))
        return terms, jax.lax.psum(by_weights, axes), by_x_btd

    rows, whole = _rows(head), PartitionSpec()
    return _on_each_device(head, local, (whole, rows, rows, rows), (whole, whole, rows))(
        {head.weight: params[head.weight]}, x_btd, batch, ref_logp_bt
    )


def _axes(head: Head) -> tuple[str, ...]:
    """The mesh axes that tokens are spread over."""
    return tuple(axis for letter in "bt" for axis in axes_of(head.rules.activations[letter]))


def _shared(head: Head) -> tuple[str, ...]:
    """Those of them with more than one device: XLA fails to sum over others where the vocabulary is spread."""
    return tuple(axis for axis in _axes(head) if jax.sharding.get_abstract_mesh().shape[axis] > 1)


def _rows(head: Head) -> PartitionSpec:
    return PartitionSpec(*(axes_of(head.rules.activations[letter]) or None for letter in "bt"))


def _on_each_device(head: Head, local: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`local` over the tokens of a device. What it is given whole is gathered once, not in the loop over chunks."""
    axes = set(_axes(head))
    return jax.shard_map(local, axis_names=axes, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _in_chunks(head: Head, visit: Callable, carry: Any, tokens: Any, wanted_bt: jax.Array) -> tuple[Any, Any]:
    """`carry` and outputs of `visit(carry, tokens_t) -> (carry, out_t)`, called with chunks of the wanted tokens.

    The last of them is filled up with others. Outputs come back as `[b, t, ...]`, 0 for tokens that were not visited.
    """
    shape, total = wanted_bt.shape, wanted_bt.size
    chunk = min(head.chunk, total)
    if total % chunk:
        raise ConfigError(f"chunk: {chunk} does not divide the {total} tokens of a device. Set a divisor of them.")
    order_n = jnp.argsort(~wanted_bt.reshape(-1), stable=True)
    # The same on every device: a collective in the branch, where the vocabulary is spread, needs all of them.
    used = jax.lax.pmax((wanted_bt.sum() + chunk - 1) // chunk, _shared(head))
    tokens = jax.tree.map(lambda x_bt: x_bt.reshape(total, *x_bt.shape[2:]), tokens)

    def step(carry, numbered):
        i, order_t = numbered

        def work(carry):
            return visit(carry, jax.tree.map(lambda x_n: _take(x_n, order_t), tokens))

        def rest(carry):
            out = jax.eval_shape(work, carry)[1]
            return carry, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), out)

        return jax.lax.cond(i < used, work, rest, carry)

    numbered = (jnp.arange(total // chunk), order_n.reshape(-1, chunk))
    carry, out = jax.lax.scan(step, carry, numbered)
    place_n = jnp.argsort(order_n)

    def put_back(x_mt: jax.Array) -> jax.Array:  # m: chunks
        return _take(x_mt.reshape(total, *x_mt.shape[2:]), place_n).reshape(*shape, *x_mt.shape[2:])

    return carry, jax.tree.map(put_back, out)


def _take(x_n: jax.Array, at: jax.Array) -> jax.Array:
    return x_n.at[at].get(mode="promise_in_bounds", unique_indices=True)


@jax.custom_vjp
def _pick(logits_tv: jax.Array, target_t: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of the target, entropy) of softmax(logits); the derivative is one pass over the logits."""
    return _pick_forward(logits_tv, target_t)[0]


def _pick_forward(logits_tv, target_t):
    max_t1 = logits_tv.max(-1, keepdims=True)
    exp_tv = jnp.exp(logits_tv - max_t1)
    sum_t = exp_tv.sum(-1)
    normaliser_t = max_t1[..., 0] + jnp.log(sum_t)
    entropy_t = normaliser_t - (exp_tv * logits_tv).sum(-1) / sum_t
    # A masked sum, not a gather: it stays local where the vocabulary is sharded.
    logp_t = jnp.where(_one_hot(logits_tv, target_t), logits_tv, 0.0).sum(-1) - normaliser_t
    return (logp_t, entropy_t), (logits_tv, target_t, normaliser_t, entropy_t)


def _pick_backward(kept, gradients):
    logits_tv, target_t, normaliser_t, entropy_t = kept
    by_logp_t1, by_entropy_t1 = (gradient[..., None] for gradient in gradients)
    logp_tv = logits_tv - normaliser_t[..., None]
    slope_tv = by_logp_t1 + by_entropy_t1 * (logp_tv + entropy_t[..., None])
    return jnp.where(_one_hot(logits_tv, target_t), by_logp_t1, 0.0) - jnp.exp(logp_tv) * slope_tv, None


def _one_hot(logits_tv, target_t):
    return jax.lax.broadcasted_iota(jnp.int32, logits_tv.shape, 1) == target_t[..., None]


_pick.defvjp(_pick_forward, _pick_backward)
