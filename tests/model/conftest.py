"""Tiny random `Qwen2ForCausalLM`s on disk, and strict dtype promotion for everything in `model/`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.model.config import ModelConfig

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@dataclasses.dataclass(frozen=True)
class Tiny:
    """One transformers model (f32, eval) with the directory it was saved to and our config of it."""

    directory: pathlib.Path
    config: ModelConfig
    torch_model: object


@pytest.fixture(autouse=True)
def _strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(tied=..., yarn=...)` -> Tiny. Every weight is perturbed, so that no norm is 1 and no bias 0."""
    import torch
    import transformers

    @functools.cache
    def make(*, tied: bool, yarn: bool = False) -> Tiny:
        hf_config = transformers.Qwen2Config(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rope_theta=10_000.0,
            rope_scaling=dict(YARN) if yarn else None,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(hf_config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2).add_(0.05 * torch.randn_like(weight))
        directory = tmp_path_factory.mktemp("tiny")
        model.save_pretrained(directory)
        return Tiny(directory, ModelConfig.from_hf(directory), model)

    return make


@pytest.fixture(scope="session")
def value_and_grads():
    """`f(make, segment_bt)`: (output, gradients) of the attention `make(segment_bt)` for random q, k and v of 4
    and 2 heads, by a loss that weighs every real output differently."""

    def of(make, segment_bt):
        rng = np.random.default_rng(0)
        b, t = segment_bt.shape
        qkv = tuple(jnp.asarray(rng.normal(size=(b, t, heads, 128)), jnp.float32) for heads in (4, 2, 2))
        weight_btnh = jnp.asarray(rng.normal(size=(b, t, 4, 128)), jnp.float32)
        weight_btnh = jnp.where((segment_bt > 0)[:, :, None, None], weight_btnh, 0.0)

        def loss(qkv):
            o_btnh, cache = make(segment_bt)(jnp.int32(0), *qkv, "untouched")
            assert cache == "untouched"
            return (o_btnh * weight_btnh).sum(), o_btnh

        (_, o_btnh), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
        return o_btnh, grads

    return of
