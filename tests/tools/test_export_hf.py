from __future__ import annotations

import json
import pathlib
import runpy

import jax
import numpy as np
import pytest

from dr_jax.learner.checkpoint import Checkpoints
from dr_jax.learner.optim import OptimConfig
from dr_jax.learner.state import init_state
from dr_jax.model import hf, weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import DEFAULT_RULES, make_mesh

main = runpy.run_path(str(pathlib.Path(__file__).parents[2] / "tools" / "export_hf.py"))["main"]

CONFIG_JSON = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(base model directory, workdir with steps 3 and 4, {step: params})."""
    root = tmp_path_factory.mktemp("run")
    base, workdir = root / "base", root / "run"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(CONFIG_JSON))
    (base / "tokenizer.json").write_text("{}")
    config, mesh = ModelConfig.from_hf(base), make_mesh({"data": 1, "fsdp": 2, "tensor": 2})
    rng = np.random.default_rng(0)
    saved = {}
    with Checkpoints(workdir / "checkpoints", keep=2) as checkpoints:
        for step in (3, 4):
            saved[step] = weights.tree(config, lambda row: rng.normal(size=weights.shape(row, config)).astype("f4"))
            state = init_state(saved[step], config, OptimConfig(), mesh, DEFAULT_RULES)
            checkpoints.save(step, state, {"step": step})
    return base, workdir, saved


def said(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_newest_step_of_a_workdir_verified(run, tmp_path, capsys):
    base, workdir, saved = run
    out = tmp_path / "out"
    assert main(["export", f"--workdir={workdir}", f"--base_model={base}", f"--out={out}", "--verify"]) == 0
    last = said(capsys)
    assert last.pop("max_logit_difference") < 1e-3
    assert last == {"export": str(out), "step": 4, "parameters": 17_696, "dtype": "bfloat16"}
    config = ModelConfig.from_hf(out)
    loaded = hf.load(out, config, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, loaded, jax.tree.map(lambda x: x.astype("bfloat16"), saved[4]))
    assert (out / "tokenizer.json").read_text() == "{}"


def test_one_step_in_float32_is_the_same_bits(run, tmp_path, capsys):
    base, workdir, saved = run
    out = tmp_path / "out"
    place = f"--checkpoint={workdir}/checkpoints/3"
    assert main(["export", place, f"--base_model={base}", f"--out={out}", "--dtype=float32"]) == 0
    assert said(capsys)["step"] == 3
    jax.tree.map(np.testing.assert_array_equal, hf.load(out, ModelConfig.from_hf(out), dtype="float32"), saved[3])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"workdir": "{tmp}/none"}, "none/checkpoints: no checkpoint directory"),
        ({"workdir": None}, "give one of --workdir=RUN"),
        ({"workdir": None, "checkpoint": "{tmp}"}, "is not a step directory such as RUN/checkpoints/40"),
        ({"base_model": "{tmp}/none"}, "none: not a readable config.json"),
        ({"out": "{tmp}"}, "exists and is not an empty directory"),
        ({"dtype": "int8"}, "dtype: got 'int8', allowed are bfloat16, float16, float32"),
        ({"out": None}, "--out"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, capsys, change, sentence):
    base, workdir, _ = run
    (tmp_path / "precious").write_text("1")
    given = {"workdir": str(workdir), "base_model": str(base), "out": f"{tmp_path}/out"} | change
    argv = [f"--{flag}={value.format(tmp=tmp_path)}" for flag, value in given.items() if value is not None]
    assert main(["export", *argv]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert sentence in printed.err
    assert [file.name for file in tmp_path.iterdir()] == ["precious"]


def test_help_says_what_it_does(capsys):
    assert main(["export", "--help"]) == 0
    assert "--base_model" in capsys.readouterr().out
