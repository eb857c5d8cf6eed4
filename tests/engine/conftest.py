"""One tiny network and one engine for the room: programs compile once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.engine.service import Engine
from dr_jax.model import attention, qwen2, weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import DEFAULT_RULES, make_mesh

TINY = ModelConfig(
    vocab_size=96,
    num_layers=2,
    d_model=32,
    d_ff=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1e4,
    rope_scaling=None,
    rms_eps=1e-6,
    tie_embeddings=True,
    max_positions=1024,
)
SIZES = dict(slots=4, context=320, pages=90, page_tokens=16, prefill_rows=2, prefill_chunk=16, decode_steps=4)


def make_params(seed: int) -> weights.Params:
    """Weights ten times larger than at initialisation, so that a token's probabilities depend on all before it."""
    params = weights.init(TINY, jax.random.key(seed), jnp.float32)
    return jax.tree.map(lambda x: x * 10 if x.std() > 0 else x, params)


@pytest.fixture(scope="session")
def config():
    return TINY


@pytest.fixture(scope="session")
def params():
    return make_params(0)


@pytest.fixture(scope="session")
def other_params():
    return make_params(1)


@pytest.fixture(scope="session")
def mesh():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1})


@pytest.fixture(scope="session")
def make_engine(config, params, mesh, share_compilations):
    """Makes an engine of the room's sizes; the caller closes it."""

    def make(**changes) -> Engine:
        return Engine(config, params, **(dict(mesh=mesh, rules=DEFAULT_RULES, decode_text=text_of) | SIZES | changes))

    return make


@pytest.fixture(scope="session")
def engine(make_engine):
    engine = make_engine()
    yield engine
    engine.close()


def text_of(tokens) -> str:
    """The tests' alphabet: token i is the i-th printable ASCII character."""
    return "".join(chr(32 + int(token)) for token in tokens)


@pytest.fixture(scope="session")
def full_logits(config, mesh):
    """logits [t, v] of one sequence by the plain forward pass, without a cache."""

    @jax.jit
    def padded(params, token_bt, length):
        position_bt = jnp.arange(token_bt.shape[1])[None]
        segment_bt = (position_bt < length).astype(jnp.int32)
        attend = attention.packed(segment_bt)
        x_btd, _ = qwen2.forward(params, config, token_bt, position_bt, attend=attend, rules=DEFAULT_RULES)
        return qwen2.unembed(params, config, x_btd)[0]

    def logits(params, tokens) -> np.ndarray:
        token_bt = np.zeros((1, SIZES["context"]), np.int32)
        token_bt[0, : len(tokens)] = tokens
        with jax.set_mesh(mesh):
            return np.asarray(padded(params, token_bt, np.int32(len(tokens))))[: len(tokens)]

    return logits
