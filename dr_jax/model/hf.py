"""Hugging Face directories in and out: safetensors <-> params through the weight table, one file or many with an index.

Both ways stream: import reads only the byte ranges that this host's devices need, export holds one shard in memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from dr_jax.errors import CheckpointError, ConfigError
from dr_jax.model import attention, qwen2, weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import DEFAULT_RULES, Rules, make_mesh, sizes, spec
from dr_jax.model.weights import Params, Weight

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}
_DTYPES = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}


def load(
    directory: str | pathlib.Path,
    config: ModelConfig,
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Params:
    """Params of a Hugging Face directory, cast to `dtype`; with a mesh, each device's shard is read on its own.

    Raises `CheckpointError` naming tensors that are missing, unexpected or of another shape.
    """
    with contextlib.ExitStack() as stack:
        tensors = _open(pathlib.Path(directory), stack)
        _check(tensors, config, directory)

        def leaf(row: Weight) -> jax.Array:
            shape = weights.shape(row, config)
            if mesh is None:
                return jnp.asarray(_read(tensors, row, config, (slice(None),) * len(shape)).astype(dtype))
            pieces: dict[str, np.ndarray] = {}  # devices that hold the same piece share one read

            def piece(index: tuple[slice, ...]) -> np.ndarray:
                if str(index) not in pieces:
                    pieces[str(index)] = _read(tensors, row, config, index).astype(dtype)
                return pieces[str(index)]

            return jax.make_array_from_callback(shape, NamedSharding(mesh, spec(row.letters, rules.weights)), piece)

        return weights.tree(config, leaf)


def check(directory: str | pathlib.Path, config: ModelConfig) -> None:
    """Raises `CheckpointError` unless whole files hold the tensors of `config`; reads their headers only."""
    with contextlib.ExitStack() as stack:
        _check(_open(pathlib.Path(directory), stack), config, directory)


def save(
    params: Params,
    config: ModelConfig,
    *,
    base_dir: str | pathlib.Path,
    out_dir: str | pathlib.Path,
    dtype: str = "bfloat16",
    max_shard_bytes: float = 5e9,
) -> pathlib.Path:
    """Writes `params` as a Hugging Face directory and returns its path.

    Tokenizer, chat template and every other file come from `base_dir`, the model these params were trained from; its
    `config.json` gets the dtype and both spellings of rope theta. The directory appears by rename: whole or not at all.
    Where the params are spread over hosts, all of them call together and the first one writes.
    """
    base_dir, out_dir = pathlib.Path(base_dir), pathlib.Path(out_dir)
    if jax.process_index() > 0:
        for _, array in _export(params, config):
            _on_host(array.astype(_DTYPES[dtype]))
        return out_dir
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: got {dtype!r}, allowed are {', '.join(_DTYPES)}")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError(f"out: {out_dir} exists and is not an empty directory. Choose another or remove it.")
    base_config = ModelConfig.from_hf(base_dir)
    if base_config != config:
        raise ConfigError(f"base_model: {base_dir} is another model.\n  base: {base_config}\n  this: {config}")

    partial = out_dir.with_name(out_dir.name + ".tmp")
    shutil.rmtree(partial, ignore_errors=True)  # an interrupted export of ours
    partial.mkdir(parents=True)
    for file in base_dir.iterdir():
        if file.is_file() and file.suffix not in _WEIGHT_SUFFIXES and not file.name.endswith(".index.json"):
            shutil.copy(file, partial / file.name)
    _write_config(base_dir, partial, config, dtype)
    _write_shards(params, config, partial, _DTYPES[dtype], max_shard_bytes)
    partial.rename(out_dir)
    return out_dir


def verify(directory: str | pathlib.Path, config: ModelConfig, params: Params) -> float:
    """Greatest absolute difference between transformers' f32 logits of this directory and our own.

    Raises `CheckpointError` if a tensor on disk is not `params` in the dtype of the file, if transformers misses or
    does not expect a tensor, or if the logits differ by more than 1e-3 of the greatest logit. Needs torch.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise ConfigError("verify: transformers needs torch to run a model; `pip install torch`") from None
    with contextlib.ExitStack() as stack:
        tensors = _open(pathlib.Path(directory), stack)
        _check(tensors, config, directory)
        for name, array in _export(params, config):
            on_disk = tensors[name][:]
            if not np.array_equal(np.asarray(array).astype(on_disk.dtype), on_disk):
                raise CheckpointError(f"{directory}: {name} differs from the params it was written from")

    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    troubles = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if troubles:
        raise CheckpointError(f"{directory}: transformers reports {troubles}")
    token_bt = np.random.default_rng(0).integers(0, config.vocab_size, (2, 32), dtype=np.int32)
    with torch.no_grad():
        want_btv = model(torch.from_numpy(token_bt).long()).logits.numpy()
    with jax.set_mesh(make_mesh({"data": 1})):
        got_btv = np.asarray(_logits(load(directory, config, dtype=jnp.float32), config, jnp.asarray(token_bt)))
    difference = float(np.abs(got_btv - want_btv).max())
    if not difference <= 1e-3 * np.abs(want_btv).max():
        raise CheckpointError(f"{directory}: logits differ from transformers by {difference:.3g}")
    return difference


@functools.partial(jax.jit, static_argnames="config")
def _logits(params: Params, config: ModelConfig, token_bt: jax.Array) -> jax.Array:
    position_bt = jnp.broadcast_to(jnp.arange(token_bt.shape[1]), token_bt.shape)
    attend = attention.packed(jnp.ones_like(token_bt))
    one_device = Rules(weights={}, activations=dict.fromkeys(DEFAULT_RULES.activations))
    x_btd, _ = qwen2.forward(params, config, token_bt, position_bt, attend=attend, rules=one_device)
    return qwen2.unembed(params, config, x_btd)


def _open(directory: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Every tensor of the directory by name, as a lazy slice; the files stay open as long as `stack`."""
    if (directory / _INDEX).exists():
        files = sorted(set(_read_index(directory / _INDEX).values()))
    elif (directory / _SINGLE).exists():
        files = [_SINGLE]
    else:
        raise CheckpointError(f"{directory}: neither {_SINGLE} nor {_INDEX} is there")
    tensors = {}
    for file in files:
        try:
            opened = stack.enter_context(safe_open(directory / file, framework="numpy"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{directory / file}: not a readable safetensors file ({error})") from None
        tensors |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return tensors


def _read_index(path: pathlib.Path) -> dict[str, str]:
    try:
        return json.loads(path.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a readable index ({error!r})") from None


def _check(tensors: Mapping[str, Any], config: ModelConfig, directory: str | pathlib.Path) -> None:
    want = {name: shape for name, _, _, shape in _plan(config)}
    # Some trainers write the head of a tied model too; transformers does not read it either.
    ignored = {"lm_head.weight"} if config.tie_embeddings else set()
    got = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    troubles = {
        "missing": sorted(want.keys() - got.keys()),
        "unexpected": sorted(got.keys() - want.keys() - ignored),
        "of another shape": [f"{n} {got[n]} not {s}" for n, s in want.items() if n in got and got[n] != s],
    }
    lines = [f"{kind}: {', '.join(names[:5])}" + " ..." * (len(names) > 5) for kind, names in troubles.items() if names]
    if lines:
        raise CheckpointError(f"{directory}: not the weights of this config; " + "; ".join(lines))


def _plan(config: ModelConfig) -> Iterator[tuple[str, Weight, int | None, tuple[int, ...]]]:
    """(Hugging Face name, row, layer, Hugging Face shape) of every tensor, layer by layer."""
    size = sizes(config)
    rows = weights.rows(config)
    places = [(row, None) for row in rows if not row.stacked]
    places += [(row, layer) for layer in range(config.num_layers) for row in rows if row.stacked]
    for row, layer in places:
        shape = tuple(math.prod(size[letter] for letter in merged) for merged in row.hf_layout.split())
        yield row.hf_name.format(l=layer), row, layer, shape


def _read(tensors: Mapping[str, Any], row: Weight, config: ModelConfig, index: tuple[slice, ...]) -> np.ndarray:
    """The piece `index` of one of our weights, in our layout."""
    size = sizes(config)
    ranges = {letter: range(size[letter])[cut] for letter, cut in zip(row.letters, index, strict=True)}
    if not row.stacked:
        return _read_one(tensors[row.hf_name], row, ranges, size)
    names = [row.hf_name.format(l=layer) for layer in ranges.pop("l")]
    return np.stack([_read_one(tensors[name], row, ranges, size) for name in names])


def _read_one(tensor: Any, row: Weight, ranges: Mapping[str, range], size: Mapping[str, int]) -> np.ndarray:
    # A merged axis `nh` is contiguous in its first letter: read that range, then cut the rest in memory.
    cuts, dims = [], []
    for first, *rest in row.hf_layout.split():
        stride = math.prod(size[letter] for letter in rest)
        cuts.append(slice(ranges[first].start * stride, ranges[first].stop * stride))
        dims += [len(ranges[first]), *(size[letter] for letter in rest)]
    order = row.hf_layout.replace(" ", "")
    part = tensor[tuple(cuts)].reshape(dims)
    firsts = {merged[0] for merged in row.hf_layout.split()}
    part = part[tuple(slice(None) if c in firsts else slice(ranges[c].start, ranges[c].stop) for c in order)]
    return part.transpose([order.index(letter) for letter in ranges])


def _export(params: Params, config: ModelConfig) -> Iterator[tuple[str, Any]]:
    """(name, array) of every Hugging Face tensor, in the layout of the file."""
    for name, row, layer, shape in _plan(config):
        array = params
        for key in row.path.split("/"):
            array = array[key]
        letters = row.letters.removeprefix("l")
        order = row.hf_layout.replace(" ", "")
        array = array if layer is None else array[layer]
        yield name, array.transpose([letters.index(letter) for letter in order]).reshape(shape)


def _write_shards(params: Params, config: ModelConfig, out: pathlib.Path, dtype: Any, max_shard_bytes: float) -> None:
    shards, total_bytes = _shards(config, np.dtype(dtype).itemsize, max_shard_bytes)
    weight_map, arrays = {}, _export(params, config)
    for number, names in enumerate(shards, 1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard = {}
        for _ in names:
            name, array = next(arrays)
            shard[name] = np.ascontiguousarray(_on_host(array.astype(dtype)))
            weight_map[name] = file
        save_file(shard, out / file, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        (out / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _on_host(array: jax.Array) -> np.ndarray:
    """The whole array, wherever its pieces are."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _shards(config: ModelConfig, itemsize: int, max_shard_bytes: float) -> tuple[list[list[str]], int]:
    shards: list[list[str]] = [[]]
    filled = total = 0
    for name, _, _, shape in _plan(config):
        size_bytes = math.prod(shape) * itemsize
        if shards[-1] and filled + size_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size_bytes
        total += size_bytes
    return shards, total


def _write_config(base_dir: pathlib.Path, out: pathlib.Path, config: ModelConfig, dtype: str) -> None:
    hf = json.loads((base_dir / "config.json").read_text())
    scaling = dict(hf.get("rope_scaling") or {}) | dict(hf.get("rope_parameters") or {})
    scaling = {key: value for key, value in scaling.items() if key not in ("rope_theta", "type", "rope_type")}
    kind = "yarn" if config.rope_scaling else "default"
    # transformers 4 (and vLLM builds on it) reads rope_theta and rope_scaling, and falls back to theta 10,000 without
    # them; transformers 5 reads rope_parameters.
    hf |= {"dtype": dtype, "torch_dtype": dtype, "rope_theta": config.rope_theta}
    hf["rope_parameters"] = {"rope_type": kind, "rope_theta": config.rope_theta, **scaling}
    if config.rope_scaling:
        hf["rope_scaling"] = {"rope_type": kind, "type": kind, **scaling}
    (out / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
