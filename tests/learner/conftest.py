"""A model small enough to compile in seconds, and batches of it."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from dr_jax.batch import PackedBatch
from dr_jax.learner.grpo import GrpoConfig
from dr_jax.learner.optim import OptimConfig
from dr_jax.learner.state import init_state
from dr_jax.learner.step import make_train_step
from dr_jax.model import letters, weights
from dr_jax.model.config import ModelConfig

CONFIG = ModelConfig(
    vocab_size=96, num_layers=2, d_model=16, d_ff=24, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e4,
    rope_scaling=None, rms_eps=1e-6, tie_embeddings=True, max_positions=128,
)  # fmt: skip
# No clipping by norm, so that Adam's first moment after one step is (1 - beta1) x the gradient.
OPTIM = OptimConfig(learning_rate=1e-2, max_grad_norm=1e9)


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def rules() -> letters.Rules:
    return letters.DEFAULT_RULES


@pytest.fixture(scope="session")
def mesh():
    return letters.make_mesh({"data": 1, "fsdp": 1, "tensor": 1})


@pytest.fixture(scope="session")
def params():
    """Large weights: a distribution far from uniform, so that a mistake shows. Numpy, so that it fits any mesh."""
    rng = np.random.default_rng(1)

    def leaf(row: weights.Weight) -> np.ndarray:
        noise = 0.2 * rng.normal(size=weights.shape(row, CONFIG)).astype(np.float32)
        return noise + (1.0 if row.init == "ones" else 0.0)

    return weights.tree(CONFIG, leaf)


@pytest.fixture(scope="session")
def segments():
    """Eight rollouts of 5 to 13 tokens: (token, weight, logp, advantage) each, some tokens untrained."""
    rng = np.random.default_rng(0)
    made = []
    for i, length in enumerate((13, 9, 5, 11, 7, 12, 6, 8)):
        weight = (rng.random(length) < 0.7).astype(np.float32) * (1.0 if i % 2 else 0.5)
        weight[0] = 0.0
        logp = np.where(weight > 0, -rng.uniform(2.0, 6.0, length), 0.0).astype(np.float32)
        made.append((rng.integers(0, CONFIG.vocab_size, length), weight, logp, float(rng.normal())))
    return made


@pytest.fixture(scope="session")
def pack_rows():
    """`pack_rows(rows, total_rows, length)`: each row a list of segments, then empty rows."""

    def build(rows, total_rows: int = 8, length: int = 32) -> PackedBatch:
        batch = PackedBatch.empty(total_rows, length)
        for row, packed in enumerate(rows):
            start = 0
            for number, (token, weight, logp, advantage) in enumerate(packed, 1):
                at = (row, slice(start, start + len(token)))
                batch.token_bt[at], batch.weight_bt[at], batch.logp_bt[at] = token, weight, logp
                batch.segment_bt[at], batch.advantage_bt[at] = number, advantage
                batch.position_bt[at] = np.arange(len(token))
                start += len(token)
        batch.check()
        return batch

    return build


@pytest.fixture(scope="session")
def make_step(rules):
    """`make_step(mesh, micro_rows, **settings)`, compiled once a session for each combination."""
    return functools.cache(functools.partial(_make_step, rules=rules))


def _make_step(mesh, micro_rows: int, *, rules, kl_coef: float = 0.1, **settings):
    cfg = GrpoConfig(kl_coef=kl_coef, temperature=0.9)
    return make_train_step(CONFIG, cfg, mesh, rules, optim=OPTIM, micro_rows=micro_rows, chunk=8, **settings)


@pytest.fixture
def fresh(params, rules):
    """A new state on `mesh`: a step donates the one it is given."""
    return lambda mesh: init_state(params, CONFIG, OPTIM, mesh, rules)


@pytest.fixture(scope="session")
def ref_params(params):
    """The params with other noise: a reference model that has been left behind."""
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), params)
