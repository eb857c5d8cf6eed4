"""GRPO: log-probabilities of packed rows, and the clipped loss over the tokens the policy itself wrote.

Everything is aligned to the token: column t of every array speaks of token t. The shift by one between a token and the
logits that predict it lives in `token_logps`, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from dr_jax.batch import PackedBatch
from dr_jax.errors import ConfigError
from dr_jax.model import attention, flash, qwen2, splash
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, axes_of, constrain
from dr_jax.model.weights import Params

_MAX_LOG_RATIO = 20.0  # nats; beyond it exp() says nothing but overflow
_MAX_KL = 10.0  # nats per token, as the reference


# 'sampler': the log-probability with which the token was drawn, so the clip also bounds what a sampler that rounds
# differently, or that has older weights, can do. 'learner': the learner's own, as the reference recomputes it; with one
# update per batch the ratio is then exactly 1, and (but for `tis_cap`) nothing of the sampler reaches the parameters.
OLD_LOGPS = ("sampler", "learner")

# 'blocks': in XLA, anywhere. Nothing but a TPU runs the kernels: 'flash', ours, which a v4 has no room for, and JAX's
# 'splash'.
ATTENTION = {
    "blocks": lambda segment_bt, rules: attention.packed(segment_bt),
    "flash": flash.packed,
    "splash": splash.packed,
}


@dataclasses.dataclass(frozen=True)
class GrpoConfig:
    """What is optimised. `temperature` must be the sampling temperature, or the ratios are wrong."""

    clip_low: float = 0.2  # the ratio may fall to 1 - clip_low before its gradient stops
    clip_high: float = 0.2  # the ratio may rise to 1 + clip_high before its gradient stops
    kl_coef: float = 0.001  # 0 = no reference model is needed
    entropy_coef: float = 0.0  # a bonus: subtracted from the loss
    temperature: float = 1.0
    old_logp: str = "sampler"  # what the ratio is taken against: a row of OLD_LOGPS
    tis_cap: float = 0.0  # with old_logp 'learner': most a token drawn by other weights may count; 0 = all count 1

    def __post_init__(self) -> None:
        if self.old_logp not in OLD_LOGPS:
            raise ConfigError(f"old_logp: got {self.old_logp!r}, allowed are {', '.join(OLD_LOGPS)}")
        if not 0 < self.clip_low <= 1:
            raise ConfigError(f"clip_low: got {self.clip_low}, need 0 < clip_low <= 1 (the reference has 0.2)")
        if not self.clip_high > 0:
            raise ConfigError(f"clip_high: got {self.clip_high}, need > 0 (the reference has 0.2)")
        if not self.kl_coef >= 0:
            raise ConfigError(f"kl_coef: got {self.kl_coef}, need >= 0 (0 = no reference model)")
        if not self.temperature > 0:
            raise ConfigError(f"temperature: got {self.temperature}, need > 0; greedy rollouts cannot be trained on")
        if self.tis_cap and not self.tis_cap >= 1:
            raise ConfigError(f"tis_cap: got {self.tis_cap}, need 0 (off) or >= 1 (2.0 is usual)")
        if self.tis_cap and self.old_logp == "sampler":
            raise ConfigError(
                "tis_cap: old_logp='sampler' weighs each token already; set tis_cap 0, or old_logp 'learner'"
            )


class Terms(NamedTuple):
    """Sums over some rows, all f32 scalars. Rows may be split in any way: add `loss`, `sums` and `weight`, take the
    largest of `maxima`, and divide by `weight` once, at the end."""

    loss: jax.Array
    sums: dict[str, jax.Array]
    maxima: dict[str, jax.Array]  # none is negative
    weight: jax.Array


def token_logps(
    params: Params,
    config: ModelConfig,
    batch: PackedBatch,
    *,
    rules: Rules,
    temperature: float = 1.0,
    chunk: int = 512,
    remat: str = "none",
    kernel: str = "blocks",
    trained_only: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`logp_bt` of each token given all before it in its segment, and `entropy_bt` of the distribution it came from.

    Both f32, nats, of softmax(logits / temperature); 0 on the first token of a segment and on padding. Logits exist for
    `chunk` columns at a time and are computed again in the backward pass, so `[b, t, v]` never does. `kernel` names a
    row of `ATTENTION`. `trained_only`: chunks in which no row of a device trains anything, such as what a page said,
    are not computed where no device needs another for it; they give 0.
    """
    x_btd, _ = qwen2.forward(
        params, config, batch.token_bt, batch.position_bt,
        attend=ATTENTION[kernel](batch.segment_bt, rules), rules=rules, remat=remat,
    )  # fmt: skip
    next_token_bt = jnp.roll(batch.token_bt, -1, axis=1)  # the last column wraps around; its result is dropped
    wanted_bt = jnp.roll(batch.weight_bt > 0, -1, axis=1) if trained_only else jnp.ones_like(next_token_bt, bool)
    next_logp_bt, next_entropy_bt = _head(
        params, config, x_btd, next_token_bt, wanted_bt, rules=rules, temperature=temperature, chunk=chunk
    )
    previous_bt = _shift(batch.segment_bt)
    follows_bt = (batch.segment_bt == previous_bt) & (batch.segment_bt > 0)
    logp_bt = jnp.where(follows_bt, _shift(next_logp_bt), 0.0)
    entropy_bt = jnp.where(follows_bt, _shift(next_entropy_bt), 0.0)
    return logp_bt, entropy_bt


def grpo_terms(
    logp_bt: jax.Array, entropy_bt: jax.Array, ref_logp_bt: jax.Array | None, batch: PackedBatch, cfg: GrpoConfig
) -> Terms:
    """Numerators of the clipped policy-gradient loss with a KL penalty, and their one denominator.

        ratio = exp(logp - old_logp)                                              (old_logp: see `OLD_LOGPS`)
        A     = advantage * min(exp(logp' - sampler_logp), tis_cap)        (logp' has no gradient; tis_cap 0: advantage)
        kl    = exp(ref_logp - logp) - (ref_logp - logp) - 1                                 (k3, never negative)
        loss  = sum(weight * (-min(ratio * A, clip(ratio) * A) + kl_coef * kl - entropy_coef * entropy)) / sum(weight)

    Differs from the paper: (1) token mean over the global batch, not a mean of per-answer means, so long answers are
    not discounted; (2) two clip bounds instead of one. `ref_logp_bt` may be None where kl_coef is 0.
    `tis_cap` is truncated importance sampling: the gradient of a token that older weights drew, as the weights that
    learn would have drawn it, with a bounded variance. It weighs the policy gradient alone, not KL and entropy.
    Source: GRPO, arXiv:2402.03300, eq. 3; (1) and (2) are DAPO, arXiv:2503.14476; k3: joschu.net/blog/kl-approx.html;
    tis_cap: Ionides, "Truncated Importance Sampling", 2008, with a constant cap.
    """
    weight_bt, advantage_bt = batch.weight_bt, batch.advantage_bt
    trained_bt = weight_bt > 0
    # Untrained columns are replaced before exp(): weight 0 times inf would be NaN, and so would its gradient.
    delta_bt = jnp.where(trained_bt, logp_bt - batch.logp_bt, 0.0)
    drift_bt = jnp.exp(jnp.clip(jax.lax.stop_gradient(delta_bt), -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    if cfg.tis_cap:
        advantage_bt = advantage_bt * jnp.minimum(drift_bt, cfg.tis_cap)
    moved_bt = delta_bt if cfg.old_logp == "sampler" else logp_bt - jax.lax.stop_gradient(logp_bt)
    ratio_bt = jnp.exp(jnp.clip(moved_bt, -_MAX_LOG_RATIO, _MAX_LOG_RATIO))
    low_bt = (advantage_bt < 0) & (ratio_bt < 1.0 - cfg.clip_low)
    high_bt = (advantage_bt > 0) & (ratio_bt > 1.0 + cfg.clip_high)
    bounded_bt = jnp.where(low_bt, 1.0 - cfg.clip_low, jnp.where(high_bt, 1.0 + cfg.clip_high, ratio_bt))
    loss_bt = -bounded_bt * advantage_bt

    def total(x_bt: jax.Array) -> jax.Array:
        return (weight_bt * jnp.where(trained_bt, x_bt, 0.0)).sum()

    sums = {
        "clip_ratio/low_mean": total(low_bt),
        "clip_ratio/high_mean": total(high_bt),
        "entropy": total(entropy_bt),
        "sampler/logp_diff_mean": total(jnp.abs(delta_bt)),
        "sampler/k3": total(k3(delta_bt)),
    }
    if cfg.tis_cap:
        sums["sampler/truncated_mean"] = total(drift_bt > cfg.tis_cap)
    if ref_logp_bt is not None:
        kl_bt = k3(jnp.where(trained_bt, ref_logp_bt - logp_bt, 0.0))
        loss_bt = loss_bt + cfg.kl_coef * kl_bt
        sums["kl"] = total(kl_bt)
    if cfg.entropy_coef:
        loss_bt = loss_bt - cfg.entropy_coef * entropy_bt
    maxima = {"sampler/logp_diff_max": jnp.abs(delta_bt).max()}
    return Terms(total(loss_bt), sums, maxima, weight_bt.sum())


def k3(delta_bt: jax.Array) -> jax.Array:
    """exp(delta) - delta - 1, at most 10 nats: an unbiased KL(p || q) for delta = q_logp - p_logp of what p drew."""
    delta_bt = jnp.clip(delta_bt, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    return jnp.minimum(jnp.exp(delta_bt) - delta_bt - 1.0, _MAX_KL)


def _shift(x_bt: jax.Array) -> jax.Array:
    """What was said of the next token, moved to the token itself; column 0 becomes 0."""
    return jnp.pad(x_bt[:, :-1], ((0, 0), (1, 0)))


def _head(
    params: Params,
    config: ModelConfig,
    x_btd: jax.Array,
    target_bt: jax.Array,
    wanted_bt: jax.Array,
    *,
    rules: Rules,
    temperature: float,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    length = target_bt.shape[1]
    chunk = min(chunk, length)
    if length % chunk:
        raise ConfigError(f"chunk: {chunk} does not divide rows of {length} tokens. Set learner.chunk to a divisor.")

    # Rows stay on their chips: gathered once, summed once, the weight is never sent inside the loop over chunks.
    rows_axes = axes_of(rules.activations["b"])
    local_rules = dataclasses.replace(rules, activations={**rules.activations, "b": None})
    weight = "embed" if config.tie_embeddings else "unembed"
    mesh = jax.sharding.get_abstract_mesh()
    alone = math.prod(mesh.shape[axis] for axis in axes_of(rules.activations["v"])) == 1  # no collective in a branch

    @functools.partial(
        jax.shard_map,
        axis_names=set(rows_axes),
        in_specs=(PartitionSpec(), *(PartitionSpec(rows_axes),) * 3),
        out_specs=PartitionSpec(rows_axes),
        check_vma=False,
    )
    def local(weights: Params, x_btd: jax.Array, target_bt: jax.Array, wanted_bt: jax.Array):
        def pick(x_bcd: jax.Array, target_bc: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits_bcv = constrain(qwen2.unembed(weights, config, x_bcd), "btv", local_rules)
            return _pick(logits_bcv / temperature, target_bc)

        def nothing(x_bcd: jax.Array, target_bc: jax.Array) -> tuple[jax.Array, jax.Array]:
            zero_bc = jnp.zeros(target_bc.shape, jnp.float32)
            return zero_bc, zero_bc

        # Only two numbers per token outlive the forward pass; the backward pass multiplies for the logits again. Around
        # the branch, not in it: what a branch keeps, the weight too, a scan would keep for each chunk.
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_KEPT))
        def one_chunk(_, inputs):
            x_bcd, target_bc, wanted_bc = inputs
            picked = jax.lax.cond(wanted_bc.any(), pick, nothing, x_bcd, target_bc) if alone else pick(x_bcd, target_bc)
            return None, picked

        def split(array):
            return jnp.moveaxis(array.reshape(-1, length // chunk, chunk, *array.shape[2:]), 1, 0)

        _, results = jax.lax.scan(one_chunk, None, tuple(map(split, (x_btd, target_bt, wanted_bt))))
        return tuple(jnp.moveaxis(result, 0, 1).reshape(-1, length) for result in results)

    return local({weight: params[weight]}, x_btd, target_bt, wanted_bt)


_KEPT = "normaliser"


@jax.custom_vjp
def _pick(logits_bcv: jax.Array, target_bc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(log-probability of the target, entropy) of softmax(logits); the derivative is one pass over the logits."""
    return _pick_forward(logits_bcv, target_bc)[0]


def _pick_forward(logits_bcv, target_bc):
    max_bc1 = logits_bcv.max(-1, keepdims=True)
    exp_bcv = jnp.exp(logits_bcv - max_bc1)
    sum_bc = exp_bcv.sum(-1)
    normaliser_bc = checkpoint_name(max_bc1[..., 0] + jnp.log(sum_bc), _KEPT)
    entropy_bc = checkpoint_name(normaliser_bc - (exp_bcv * logits_bcv).sum(-1) / sum_bc, _KEPT)
    # A masked sum, not a gather: it stays local where the vocabulary is sharded.
    logp_bc = jnp.where(_one_hot(logits_bcv, target_bc), logits_bcv, 0.0).sum(-1) - normaliser_bc
    return (logp_bc, entropy_bc), (logits_bcv, target_bc, normaliser_bc, entropy_bc)


def _pick_backward(kept, gradients):
    logits_bcv, target_bc, normaliser_bc, entropy_bc = kept
    by_logp_bc1, by_entropy_bc1 = (gradient[..., None] for gradient in gradients)
    logp_bcv = logits_bcv - normaliser_bc[..., None]
    slope_bcv = by_logp_bc1 + by_entropy_bc1 * (logp_bcv + entropy_bc[..., None])
    return jnp.where(_one_hot(logits_bcv, target_bc), by_logp_bc1, 0.0) - jnp.exp(logp_bcv) * slope_bcv, None


def _one_hot(logits_bcv, target_bc):
    return jax.lax.broadcasted_iota(jnp.int32, logits_bcv.shape, 2) == target_bc[..., None]


_pick.defvjp(_pick_forward, _pick_backward)
