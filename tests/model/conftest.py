"""Tiny random `Qwen2ForCausalLM`s on disk, and strict dtype promotion for everything in `model/`."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
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
