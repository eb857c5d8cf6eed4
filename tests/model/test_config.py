from __future__ import annotations

import dataclasses
import json
import math

import pytest

from dr_jax.errors import ConfigError
from dr_jax.model.config import QWEN2_5, ModelConfig, Yarn

# What differs between the published config.json files, in their own words (Qwen/Qwen2.5-*-Instruct).
COMMON = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
}
PUBLISHED = {
    "0.5B": dict(hidden_size=896, intermediate_size=4864, max_window_layers=21, num_attention_heads=14,
                 num_hidden_layers=24, num_key_value_heads=2, sliding_window=32768, tie_word_embeddings=True,
                 vocab_size=151936),
    "1.5B": dict(hidden_size=1536, intermediate_size=8960, max_window_layers=21, num_attention_heads=12,
                 num_hidden_layers=28, num_key_value_heads=2, sliding_window=32768, tie_word_embeddings=True,
                 vocab_size=151936),
    "3B": dict(hidden_size=2048, intermediate_size=11008, max_window_layers=70, num_attention_heads=16,
               num_hidden_layers=36, num_key_value_heads=2, sliding_window=32768, tie_word_embeddings=True,
               vocab_size=151936),
    "7B": dict(hidden_size=3584, intermediate_size=18944, max_window_layers=28, num_attention_heads=28,
               num_hidden_layers=28, num_key_value_heads=4, sliding_window=131072, tie_word_embeddings=False,
               vocab_size=152064),
    "14B": dict(hidden_size=5120, intermediate_size=13824, max_window_layers=70, num_attention_heads=40,
                num_hidden_layers=48, num_key_value_heads=8, sliding_window=131072, tie_word_embeddings=False,
                vocab_size=152064),
    "32B": dict(hidden_size=5120, intermediate_size=27648, max_window_layers=70, num_attention_heads=40,
                num_hidden_layers=64, num_key_value_heads=8, sliding_window=131072, tie_word_embeddings=False,
                vocab_size=152064),
    "72B": dict(hidden_size=8192, intermediate_size=29568, max_window_layers=70, num_attention_heads=64,
                num_hidden_layers=80, num_key_value_heads=8, sliding_window=131072, tie_word_embeddings=False,
                vocab_size=152064),
}  # fmt: skip


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_config_json_is_the_table_row(size):
    config = ModelConfig.from_hf(COMMON | PUBLISHED[size])
    assert config == QWEN2_5[size]
    assert config.head_dim == (64 if size == "0.5B" else 128)


def test_table_has_every_published_size():
    assert list(QWEN2_5) == list(PUBLISHED)


def hf_7b(**changes):
    hf = COMMON | PUBLISHED["7B"] | changes
    return {key: value for key, value in hf.items() if value is not None}


def test_both_spellings_of_rope_theta():
    new = hf_7b(rope_theta=None) | {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
    assert ModelConfig.from_hf(new) == QWEN2_5["7B"]
    assert ModelConfig.from_hf(hf_7b(rope_theta=5e5)).rope_theta == 5e5


def test_both_spellings_of_yarn():
    old = hf_7b(rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"})
    parameters = {"factor": 4.0, "original_max_position_embeddings": 32768, "rope_type": "yarn", "rope_theta": 1e6}
    new = hf_7b(rope_theta=None, rope_parameters=parameters)
    yarn = Yarn(factor=4.0, original_max_positions=32768, attention_factor=0.1 * math.log(4.0) + 1)
    assert ModelConfig.from_hf(old).rope_scaling == ModelConfig.from_hf(new).rope_scaling == yarn


def test_yarn_options():
    scaling = {"type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "truncate": False, "mscale": 0.7}
    yarn = ModelConfig.from_hf(hf_7b(rope_scaling=scaling | {"mscale_all_dim": 0.5})).rope_scaling
    expected = (0.07 * math.log(8.0) + 1) / (0.05 * math.log(8.0) + 1)
    assert yarn == Yarn(8.0, 32768, pytest.approx(expected), beta_fast=16, beta_slow=2, truncate=False)
    assert (
        ModelConfig.from_hf(hf_7b(rope_scaling=scaling | {"attention_factor": 1.5})).rope_scaling.attention_factor
        == 1.5
    )


def test_reads_a_directory_and_a_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf_7b()))
    assert ModelConfig.from_hf(tmp_path) == ModelConfig.from_hf(str(tmp_path / "config.json")) == QWEN2_5["7B"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "config.json model_type: got 'llama', only 'qwen2' is supported"),
        ({"model_type": None}, "config.json model_type: got None, only 'qwen2' is supported"),
        ({"use_sliding_window": True}, "config.json use_sliding_window: got True, only False is supported"),
        ({"hidden_act": "gelu"}, "config.json hidden_act: got 'gelu', only 'silu' is supported"),
        ({"hidden_size": None}, "config.json: the key 'hidden_size' is missing"),
        ({"rope_theta": None}, "config.json: the key 'rope_theta' is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "got 'linear', allowed are 'default' and 'yarn'"),
        ({"num_key_value_heads": 3}, "28 query heads are not a multiple of 3 kv heads"),
        ({"num_hidden_layers": 0}, "model.num_layers: got 0, must be positive"),
        ({"head_dim": 3}, "model.head_dim: got 3"),
    ],
)
def test_refuses(changes, sentence):
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(hf_7b(**changes))
    assert sentence in str(error.value)


def test_unreadable_file_names_its_path(tmp_path):
    with pytest.raises(ConfigError, match="no_such_dir"):
        ModelConfig.from_hf(tmp_path / "no_such_dir")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json: not a readable"):
        ModelConfig.from_hf(tmp_path)


def test_is_hashable():
    assert hash(QWEN2_5["7B"]) == hash(dataclasses.replace(QWEN2_5["7B"]))
