"""What a Qwen2-architecture network is: the numbers of its `config.json`, validated."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from dr_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension. Source: arXiv:2309.00071."""

    factor: float
    original_max_positions: int
    attention_factor: float  # multiplies cos and sin
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ramp's ends to whole frequencies


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one network. Hashable, so it can be a static argument of a jitted function."""

    vocab_size: int
    num_layers: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: Yarn | None
    rms_eps: float
    tie_embeddings: bool
    max_positions: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "float") and not value > 0:
                raise ConfigError(f"model.{field.name}: got {value}, must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_heads: {self.num_heads} query heads are not a multiple of {self.num_kv_heads} kv heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim: got {self.head_dim}, rotary embedding needs an even head width")

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | pathlib.Path) -> ModelConfig:
        """Config from the contents of a Hugging Face `config.json`, its path, or the directory that holds it.

        Reads both spellings of rope: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`.
        """
        hf = source if isinstance(source, Mapping) else _read_json(pathlib.Path(source))
        for key, want in {"model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False}.items():
            if hf.get(key, want if key != "model_type" else None) != want:
                raise ConfigError(f"config.json {key}: got {hf.get(key)!r}, only {want!r} is supported")
        try:
            num_heads, d_model = hf["num_attention_heads"], hf["hidden_size"]
            theta, scaling = _rope(hf)
            return cls(
                vocab_size=hf["vocab_size"],
                num_layers=hf["num_hidden_layers"],
                d_model=d_model,
                d_ff=hf["intermediate_size"],
                num_heads=num_heads,
                num_kv_heads=hf.get("num_key_value_heads") or num_heads,
                head_dim=hf.get("head_dim") or d_model // num_heads,
                rope_theta=theta,
                rope_scaling=scaling,
                rms_eps=hf.get("rms_norm_eps", 1e-6),
                tie_embeddings=hf.get("tie_word_embeddings", False),
                max_positions=hf["max_position_embeddings"],
            )
        except KeyError as missing:
            raise ConfigError(f"config.json: the key {missing} is missing") from None


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable config.json ({error})") from None


def _rope(hf: Mapping[str, Any]) -> tuple[float, Yarn | None]:
    rope = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    theta = float(rope["rope_theta"] if "rope_theta" in rope else hf["rope_theta"])
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise ConfigError(f"config.json rope type: got {kind!r}, allowed are 'default' and 'yarn'")
    factor = float(rope["factor"])
    return theta, Yarn(
        factor=factor,
        original_max_positions=rope.get("original_max_position_embeddings") or hf["max_position_embeddings"],
        attention_factor=rope.get("attention_factor") or _attention_factor(factor, rope),
        beta_fast=rope.get("beta_fast") or 32.0,
        beta_slow=rope.get("beta_slow") or 1.0,
        truncate=rope.get("truncate", True),
    )


def _attention_factor(factor: float, rope: Mapping[str, Any]) -> float:
    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, mscale_all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def _qwen2_5(num_layers: int, d_model: int, d_ff: int, num_heads: int, num_kv_heads: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=151936 if d_model < 3584 else 152064,
        num_layers=num_layers,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=d_model // num_heads,
        rope_theta=1e6,
        rope_scaling=None,
        rms_eps=1e-6,
        tie_embeddings=tied,
        max_positions=32768,
    )


# The published instruct models. Base models differ in max_positions and, from 14B up, in rms_eps (1e-5).
QWEN2_5: Mapping[str, ModelConfig] = {
    "0.5B": _qwen2_5(24, 896, 4864, 14, 2, tied=True),
    "1.5B": _qwen2_5(28, 1536, 8960, 12, 2, tied=True),
    "3B": _qwen2_5(36, 2048, 11008, 16, 2, tied=True),
    "7B": _qwen2_5(28, 3584, 18944, 28, 4, tied=False),
    "14B": _qwen2_5(48, 5120, 13824, 40, 8, tied=False),
    "32B": _qwen2_5(64, 5120, 27648, 40, 8, tied=False),
    "72B": _qwen2_5(80, 8192, 29568, 64, 8, tied=False),
}


def published(name: str) -> ModelConfig | None:
    """The network called 'Qwen2.5-7B' or 'Qwen2.5-7B-Instruct', if it is one of `QWEN2_5`."""
    family, _, size = name.removesuffix("-Instruct").partition("-")
    return QWEN2_5.get(size) if family == "Qwen2.5" else None
