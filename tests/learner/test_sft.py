from __future__ import annotations

import jax
import numpy as np

from dr_jax.learner.grpo import GrpoConfig, token_logps
from dr_jax.learner.head import Head
from dr_jax.learner.sft import sft_terms
from dr_jax.learner.step import put_batch


def test_loss_by_hand(pack_rows):
    # Two segments; weights 1, 0.5 and 2 on logp -1, -4 and -0.25: (1 + 2 + 0.5) / 3.5 = 1. Other columns do not count.
    none = np.zeros(3, np.float32)
    batch = pack_rows([[(np.arange(3), np.array([0, 1, 0.5]), none, 0), (np.arange(2), np.array([0, 2]), none[:2], 0)]])
    logp_bt = np.full((8, 32), -7.0, np.float32)
    logp_bt[0, [1, 2, 4]] = -1.0, -4.0, -0.25
    terms = sft_terms(logp_bt, np.ones_like(logp_bt), None, batch, GrpoConfig())
    assert terms.weight == 3.5
    assert terms.loss / terms.weight == 1.0
    assert terms.sums["entropy"] == 3.5


def test_training_lowers_the_loss(config, make_step, fresh, params, segments, pack_rows, mesh, rules):
    batch = pack_rows([segments[:3], segments[3:5], segments[5:8]])
    step, state, losses = make_step(mesh, 2, loss="sft"), fresh(mesh), []
    for _ in range(8):
        state, metrics = step(state, None, put_batch(batch, mesh, rules))
        losses.append(float(metrics["loss"]))
    with jax.set_mesh(mesh):
        logp_bt, _ = jax.jit(lambda params: token_logps(Head(config, rules, 0.9), params, batch))(params)
    np.testing.assert_allclose(losses[0], -(batch.weight_bt * logp_bt).sum() / batch.weight_bt.sum(), rtol=1e-5)
    assert losses[-1] < losses[0] - 1
