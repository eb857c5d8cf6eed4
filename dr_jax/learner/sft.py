"""Supervised fine-tuning: next-token loss over the tokens that carry weight, through the same log-probabilities."""

from __future__ import annotations

import jax

from dr_jax.batch import PackedBatch
from dr_jax.learner.grpo import GrpoConfig
from dr_jax.learner.head import Terms


def sft_terms(
    logp_bt: jax.Array, entropy_bt: jax.Array, ref_logp_bt: None, batch: PackedBatch, cfg: GrpoConfig
) -> Terms:
    """Numerators of `-sum(weight * logp) / sum(weight)`; reads nothing of the batch but tokens and weights."""
    del ref_logp_bt, cfg  # the row of `step.LOSSES` that needs neither
    weight_bt = batch.weight_bt
    return Terms(-(weight_bt * logp_bt).sum(), {"entropy": (weight_bt * entropy_bt).sum()}, {}, weight_bt.sum())
