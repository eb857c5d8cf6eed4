"""GRPO: log-probabilities of packed rows, and the clipped loss over the tokens the policy itself wrote.

Everything is aligned to the token: column t of every array speaks of token t. The shift by one between a token and the
logits that predict it lives in `_ahead`, and is undone in `token_logps`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from dr_jax.batch import PackedBatch
from dr_jax.errors import ConfigError
from dr_jax.learner.head import Head, LossOf, Terms, gradients, logps
from dr_jax.model import attention, flash, qwen2, splash
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


def token_logps(
    head: Head, params: Params, batch: PackedBatch, *, remat: str = "none", kernel: str = "blocks"
) -> tuple[jax.Array, jax.Array]:
    """`logp_bt` of each trained token given all before it in its segment, and `entropy_bt` of what it was drawn from.

    Both f32, nats; 0 on tokens without weight. `kernel` names a row of `ATTENTION`.
    """
    ahead = _ahead(batch)
    x_btd = _hidden(params, head, batch, remat, kernel)
    logp_bt, entropy_bt = logps(head, params, x_btd, ahead.token_bt, ahead.weight_bt > 0)
    return jnp.roll(logp_bt, 1, axis=1), jnp.roll(entropy_bt, 1, axis=1)


def loss_gradients(
    head: Head,
    params: Params,
    batch: PackedBatch,
    ref_logp_bt: jax.Array | None,
    loss_of: LossOf,
    *,
    remat: str = "none",
    kernel: str = "blocks",
) -> tuple[Terms, Params]:
    """Terms of `loss_of` at the log-probabilities that `token_logps` speaks of, and the gradient of their loss."""
    x_btd, backward = jax.vjp(lambda params: _hidden(params, head, batch, remat, kernel), params)
    ref_logp_bt = None if ref_logp_bt is None else jnp.roll(ref_logp_bt, -1, axis=1)
    terms, by_weights, by_x_btd = gradients(head, params, x_btd, _ahead(batch), ref_logp_bt, loss_of)
    (grads,) = backward(by_x_btd)
    return terms, grads | {name: grads[name] + by_weight for name, by_weight in by_weights.items()}


def _hidden(params: Params, head: Head, batch: PackedBatch, remat: str, kernel: str) -> jax.Array:
    attend = ATTENTION[kernel](batch.segment_bt, head.rules)
    return qwen2.forward(
        params, head.config, batch.token_bt, batch.position_bt, attend=attend, rules=head.rules, remat=remat
    )[0]


def _ahead(batch: PackedBatch) -> PackedBatch:
    """What each column predicts: the column after it. Column 0 comes round to the end, where it has no weight."""
    return PackedBatch(*(jnp.roll(x_bt, -1, axis=1) for x_bt in batch))


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
    # exp() - 1 would round to less than 0 where delta is small, which is nearly everywhere.
    return jnp.clip(jnp.expm1(delta_bt) - delta_bt, 0.0, _MAX_KL)
