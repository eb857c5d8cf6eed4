"""Parity with transformers on torch CPU, and what must hold of the forward pass whatever the numbers are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.errors import ConfigError
from dr_jax.model import hf, qwen2, weights
from dr_jax.model.attention import packed
from dr_jax.model.config import QWEN2_5, ModelConfig
from dr_jax.model.letters import DEFAULT_RULES, make_mesh

T = 80  # two attention blocks, past YaRN's original 32 positions


@pytest.fixture(autouse=True)
def _one_device_mesh():
    with jax.set_mesh(make_mesh({"data": 1, "fsdp": 1, "tensor": 1})):
        yield


def run(params, config, token_bt, segment_bt, position_bt, remat="none"):
    attend = packed(segment_bt)
    x_btd, _ = qwen2.forward(params, config, token_bt, position_bt, attend=attend, rules=DEFAULT_RULES, remat=remat)
    return qwen2.unembed(params, config, x_btd)


logits = jax.jit(run, static_argnames=("config", "remat"))


def pack(lengths_b, *, t=T):
    """Random tokens in rows of segments of the given lengths: token, segment, position."""
    rng = np.random.default_rng(0)
    token_bt, segment_bt, position_bt = np.zeros((3, len(lengths_b), t), np.int32)
    for row, lengths in enumerate(lengths_b):
        start = 0
        for segment, length in enumerate(lengths, 1):
            cut = slice(start, start + length)
            token_bt[row, cut] = rng.integers(0, 256, length)
            segment_bt[row, cut] = segment
            position_bt[row, cut] = np.arange(length)
            start += length
    return token_bt, segment_bt, position_bt


def theirs(tiny_model, token_bt, mask_bt=None):
    import torch

    mask = None if mask_bt is None else torch.from_numpy(mask_bt)
    with torch.no_grad():
        return tiny_model.torch_model(torch.from_numpy(token_bt).long(), attention_mask=mask).logits.numpy()


BATCH = pack([[80], [47], [30, 1, 40], [10, 70]])
VARIANTS = [dict(tied=True), dict(tied=False), dict(tied=True, yarn=True), dict(tied=False, yarn=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers_alone_padded_and_packed(tiny, variant):
    model = tiny(**variant)
    params = hf.load(model.directory, model.config, dtype=jnp.float32)
    token_bt, segment_bt, position_bt = BATCH
    got_btv = np.asarray(logits(params, model.config, *BATCH))
    assert got_btv.dtype == np.float32
    assert np.abs(got_btv[0]).max() > 2  # large enough for 1e-4 to mean something

    # Row 0 is full, row 1 padded on the right: transformers gets them as one padded batch.
    want_btv = theirs(model, token_bt[:2], (segment_bt[:2] > 0).astype(np.int64))
    np.testing.assert_allclose(got_btv[0], want_btv[0], atol=1e-4)
    np.testing.assert_allclose(got_btv[1, :47], want_btv[1, :47], atol=1e-4)
    # Row 2 packs three sequences: transformers gets each alone.
    for cut in (slice(0, 30), slice(30, 31), slice(31, 71)):
        np.testing.assert_allclose(got_btv[2, cut], theirs(model, token_bt[2:, cut])[0], atol=1e-4)


YARNS = [
    {"rope_type": "default"},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 512, "truncate": False},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 8, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7, "mscale_all_dim": 0.5},
    {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
]


@pytest.mark.parametrize("rope", YARNS)
@pytest.mark.parametrize("theta", [1e4, 1e6])
def test_rope_frequencies_are_those_of_transformers(rope, theta):
    import transformers
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    hf_config = transformers.Qwen2Config(
        hidden_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        rope_parameters=rope | {"rope_theta": theta},
        num_hidden_layers=1,
    )
    want = Qwen2RotaryEmbedding(hf_config)
    frequency, factor = qwen2.rope_frequencies(ModelConfig.from_hf(hf_config.to_dict()))
    assert frequency.dtype == np.float32
    np.testing.assert_allclose(frequency, want.inv_freq.numpy(), rtol=3e-7)
    assert factor == pytest.approx(want.attention_scaling, rel=1e-12)


@pytest.fixture(scope="module")
def small(tiny):
    model = tiny(tied=False)
    return model.config, hf.load(model.directory, model.config, dtype=jnp.float32)


def test_a_token_reaches_only_what_follows_in_its_segment(small):
    """Bitwise: nothing before it and nothing in another segment moves (gradients: test_attention.py)."""
    config, params = small
    token_bt, segment_bt, position_bt = BATCH
    changed_bt = token_bt.copy()
    changed_bt[3, 20] += 1  # row 3 holds segments 0..9 and 10..79
    before_btv, after_btv = (np.asarray(logits(params, config, tokens, segment_bt, position_bt))
                             for tokens in (token_bt, changed_bt))  # fmt: skip
    moved_bt = (before_btv != after_btv).any(-1)
    assert moved_bt[3, 20:].all()
    assert moved_bt.sum() == 60


def test_remat_policies_store_less_and_less(small):
    """Bytes that the backward pass finds stored, read off the traced program."""
    config, params = small

    def stored_bytes(remat):
        pullback = jax.eval_shape(lambda params: jax.vjp(lambda p: run(p, config, *BATCH, remat), params)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))

    none, products, mlp, projections, attention, full = map(
        stored_bytes, ("none", "products", "mlp", "projections", "attention", "full")
    )
    positions = 4 * BATCH[0].size * config.num_layers  # f32
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    assert none > products > mlp > projections > attention > full
    assert mlp == attention + 2 * positions * config.d_ff  # gate and up of every layer
    biases = 4 * heads * config.num_layers  # are not read again where q, k and v are there
    assert projections == attention - biases + positions * (heads + config.d_model)  # and the sum after attention
    assert products == mlp + projections - attention


def test_unknown_remat_lists_the_names(small):
    config, params = small
    with pytest.raises(
        ConfigError, match="remat: got 'some', allowed are none, dots, products, mlp, projections, attention, full"
    ):
        run(params, config, *BATCH, remat="some")


def test_sharded_equals_unsharded(small):
    config, params = small
    want_btv = logits(params, config, *BATCH)
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    with jax.set_mesh(mesh):
        got_btv = logits(jax.device_put(params, weights.shardings(config, mesh, DEFAULT_RULES)), config, *BATCH)
    assert got_btv.sharding.shard_shape(got_btv.shape) == (2, T, 128)
    np.testing.assert_allclose(got_btv, want_btv, atol=2e-5)


def test_cache_is_carried_through_every_layer(small):
    """A cache written layer by layer holds what `attend` saw, and comes back whole."""
    config, params = small
    token_bt, segment_bt, position_bt = BATCH

    def attend(layer, q_btnh, k_btkh, v_btkh, cache_k_lbskh):
        o_btnh, _ = packed(segment_bt)(layer, q_btnh, k_btkh, v_btkh, None)
        return o_btnh, cache_k_lbskh.at[layer].set(k_btkh)

    empty = jnp.zeros((config.num_layers, 4, T, config.num_kv_heads, config.head_dim))
    forward = jax.jit(lambda cache: qwen2.forward(
        params, config, token_bt, position_bt, attend=attend, rules=DEFAULT_RULES, cache=cache
    ))  # fmt: skip
    x_btd, cache_k_lbskh = forward(empty)
    assert (np.abs(cache_k_lbskh).sum((1, 2, 3, 4)) > 0).all()
    np.testing.assert_allclose(qwen2.unembed(params, config, x_btd), logits(params, config, *BATCH), atol=2e-5)


def test_computes_in_the_dtype_of_the_params(small):
    config, params = small
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got_btv, want_btv = logits(half, config, *BATCH), logits(params, config, *BATCH)
    assert got_btv.dtype == jnp.float32
    hidden = jax.eval_shape(
        lambda p: qwen2.forward(p, config, *BATCH[::2], attend=packed(BATCH[1]), rules=DEFAULT_RULES), half
    )
    assert hidden[0].dtype == jnp.bfloat16
    assert np.abs(got_btv - want_btv).mean() < 0.02 * np.abs(want_btv).max()


def test_seven_billion_forward_traces():
    config = QWEN2_5["7B"]
    token_bt = jax.ShapeDtypeStruct((2, 1024), jnp.int32)
    out = jax.eval_shape(
        lambda params, token_bt: run(params, config, token_bt, token_bt, token_bt, "full"),
        weights.abstract(config, jnp.bfloat16), token_bt,
    )  # fmt: skip
    assert out.shape == (2, 1024, 152064)
