from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dr_jax.errors import CheckpointError, ConfigError
from dr_jax.model import hf, weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import DEFAULT_RULES, Rules, make_mesh


def read_all(directory):
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_bitwise_equal(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(tiny, request):
    return tiny(tied=request.param)


@pytest.fixture(scope="module")
def params(model):
    return hf.load(model.directory, model.config, dtype=jnp.float32)


@pytest.mark.parametrize("max_shard_bytes", [5e9, 60e3])
def test_export_of_import_is_the_same_bits(model, params, tmp_path, max_shard_bytes):
    out = tmp_path / "out"
    written = hf.save(params, model.config, base_dir=model.directory, out_dir=out, dtype="float32",
                      max_shard_bytes=max_shard_bytes)  # fmt: skip
    assert written == out
    assert_bitwise_equal(read_all(out), read_all(model.directory))
    files = sorted(file.name for file in out.glob("*.safetensors*"))
    if max_shard_bytes == 5e9:
        assert files == ["model.safetensors"]
    else:
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert sorted(set(index["weight_map"].values())) == files[:-1]
        assert files[0].startswith("model-00001-of-000")
        assert index["metadata"]["total_size"] == 4 * weights.count(model.config)
        assert all((out / file).stat().st_size < 70e3 for file in files[:-1])
    again = hf.load(out, model.config, dtype=jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert hf.verify(out, model.config, params) < 1e-4


def test_import_of_export_is_the_same_bits_in_bfloat16(model, params, tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    out = hf.save(params, model.config, base_dir=model.directory, out_dir=tmp_path / "out")
    again = hf.load(out, model.config, dtype=jnp.bfloat16)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert hf.verify(out, model.config, params) < 1e-4


def test_float32_params_are_rounded_to_bfloat16(model, params, tmp_path):
    out = hf.save(params, model.config, base_dir=model.directory, out_dir=tmp_path / "out")
    assert_bitwise_equal(
        read_all(out), {name: array.astype(jnp.bfloat16) for name, array in read_all(model.directory).items()}
    )
    hf.verify(out, model.config, params)


def test_reads_shards_written_by_transformers(model, params, tmp_path):
    model.torch_model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path, model.config, dtype=jnp.float32), params)


@pytest.mark.parametrize(
    "rules",
    [
        DEFAULT_RULES,
        Rules(weights=dict(l="data", d="fsdp", h="tensor", n=None, k=None, f="tensor", v=None), activations={}),
    ],
    ids=["default", "head channels"],
)
def test_loads_onto_a_mesh_piece_by_piece(tiny, tmp_path, monkeypatch, rules):
    """Every device gets its shard, and no read is larger than one device's share of a layer (or its merged heads)."""
    model = tiny(tied=False)
    config = ModelConfig.from_hf(json.loads((model.directory / "config.json").read_text()) | {"num_hidden_layers": 2})
    two_layers = {n: x for n, x in read_all(model.directory).items() if "layers.2" not in n}
    save_file(two_layers, tmp_path / "model.safetensors")
    whole = hf.load(tmp_path, config, dtype=jnp.float32)

    reads = {}
    real = hf._read

    def spy(tensors, row, config, index):
        piece = real(tensors, row, config, index)
        reads.setdefault(row.path, []).append(piece.size)
        return piece

    monkeypatch.setattr(hf, "_read", spy)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = hf.load(tmp_path, config, dtype=jnp.float32, mesh=mesh, rules=rules)
    jax.tree.map(np.testing.assert_array_equal, placed, whole)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == weights.shardings(config, mesh, rules)
    for row in weights.rows(config):
        leaf = placed
        for key in row.path.split("/"):
            leaf = leaf[key]
        # Devices with the same piece share one read: together the host reads each weight once.
        assert sum(reads[row.path]) == leaf.size
        assert max(reads[row.path]) == np.prod(leaf.sharding.shard_shape(leaf.shape))


def test_exports_sharded_params(tiny, tmp_path):
    model = tiny(tied=False)
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    params = hf.load(model.directory, model.config, dtype=jnp.float32, mesh=mesh)
    out = hf.save(params, model.config, base_dir=model.directory, out_dir=tmp_path / "out", dtype="float32")
    assert_bitwise_equal(read_all(out), read_all(model.directory))


def test_config_json_has_both_spellings_and_the_rest_untouched(tiny, tmp_path):
    for yarn in (False, True):
        model = tiny(tied=True, yarn=yarn)
        params = hf.load(model.directory, model.config, dtype=jnp.float32)
        out = hf.save(params, model.config, base_dir=model.directory, out_dir=tmp_path / f"yarn_{yarn}")
        base, config = (json.loads((d / "config.json").read_text()) for d in (model.directory, out))
        kind = "yarn" if yarn else "default"
        assert config["dtype"] == config["torch_dtype"] == "bfloat16"
        assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
        assert config["rope_parameters"]["rope_type"] == kind
        if yarn:
            assert config["rope_scaling"]["factor"] == config["rope_parameters"]["factor"] == 4.0
            assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "yarn"
        edited = {"dtype", "torch_dtype", "rope_theta", "rope_parameters", "rope_scaling"}
        assert {k: v for k, v in config.items() if k not in edited} == {
            k: v for k, v in base.items() if k not in edited
        }
        # A reader that knows one spelling alone sees the same model.
        old = {k: v for k, v in config.items() if k != "rope_parameters"}
        new = {k: v for k, v in config.items() if k not in ("rope_theta", "rope_scaling")}
        assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new) == model.config
        assert hf.verify(out, model.config, params) < 1e-4


@pytest.fixture
def base(tiny, tmp_path):
    """A copy of the untied model, with the other files a model directory has."""
    directory = tmp_path / "base"
    shutil.copytree(tiny(tied=False).directory, directory)
    (directory / "tokenizer.json").write_text('{"made": "up"}')
    (directory / "LICENSE").write_text("Apache-2.0")
    (directory / "pytorch_model.bin").write_bytes(b"old weights")
    return directory


@pytest.fixture
def untied(tiny):
    config = tiny(tied=False).config
    return config, hf.load(tiny(tied=False).directory, config, dtype=jnp.float32)


def test_other_files_of_the_base_are_copied_and_its_weights_are_not(untied, base, tmp_path):
    config, params = untied
    out = tmp_path / "out"
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "left over").write_text("an interrupted export")
    hf.save(params, config, base_dir=base, out_dir=out)
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "LICENSE", "model.safetensors",
    }  # fmt: skip
    assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out.tmp").exists()


def test_save_refuses(untied, base, tmp_path):
    config, params = untied
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("1")
    with pytest.raises(ConfigError, match=r"out: .*taken exists and is not an empty directory"):
        hf.save(params, config, base_dir=base, out_dir=taken)
    assert [file.name for file in taken.iterdir()] == ["precious"]
    with pytest.raises(ConfigError, match="dtype: got 'int4', allowed are bfloat16, float16, float32"):
        hf.save(params, config, base_dir=base, out_dir=tmp_path / "out", dtype="int4")
    (base / "config.json").write_text((base / "config.json").read_text().replace("10000.0", "20000.0"))
    with pytest.raises(ConfigError, match=r"base_model: .* is another model"):
        hf.save(params, config, base_dir=base, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def change(directory, edit):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_load_names_what_is_wrong(untied, base):
    config, _ = untied
    change(base, lambda tensors: tensors.pop("model.norm.weight"))
    change(base, lambda tensors: tensors.update(extra=np.zeros(1)))
    change(base, lambda tensors: tensors.update({"lm_head.weight": np.zeros((255, 64), np.float32)}))
    with pytest.raises(CheckpointError) as error:
        hf.load(base, config, dtype=jnp.float32)
    assert "missing: model.norm.weight" in str(error.value)
    assert "unexpected: extra" in str(error.value)
    assert "of another shape: lm_head.weight (255, 64) not (256, 64)" in str(error.value)


def test_tied_model_may_carry_its_head_twice(tiny, tmp_path):
    model = tiny(tied=True)
    tensors = load_file(model.directory / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "model.safetensors")
    params = hf.load(tmp_path, model.config, dtype=jnp.float32)
    assert "unembed" not in params


def test_load_without_weights_or_with_broken_files(untied, tmp_path):
    config, _ = untied
    with pytest.raises(CheckpointError, match="neither model.safetensors nor model.safetensors.index.json"):
        hf.load(tmp_path, config, dtype=jnp.float32)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors: not a readable"):
        hf.load(tmp_path, config, dtype=jnp.float32)
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(CheckpointError, match="model-00001-of-00002.safetensors: not a readable"):
        hf.load(tmp_path, config, dtype=jnp.float32)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable index"):
        hf.load(tmp_path, config, dtype=jnp.float32)


def test_verify_finds_other_weights(untied, base):
    config, params = untied
    assert hf.verify(base, config, params) < 1e-4
    change(base, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((0, 0), 7.0))
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj.weight differs from the params"):
        hf.verify(base, config, params)
