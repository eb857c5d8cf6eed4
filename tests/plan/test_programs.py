from __future__ import annotations

import pathlib

import jax
import pytest

from dr_jax.errors import ConfigError
from dr_jax.model import weights
from dr_jax.plan import programs, report
from dr_jax.plan.estimate import bytes_per_chip, trace

POD_CONFIGS = sorted(path.stem for path in (pathlib.Path(__file__).parents[2] / "configs").glob("deepresearcher_*.py"))


@pytest.fixture(scope="module")
def setup(tiny):
    return programs.setup(tiny, compiler=False)


def test_the_state_is_spread_over_the_slice_and_the_engine_over_its_own_chips(setup):
    there, count = programs.resident(setup), weights.count(setup.model)
    scalars = 64  # step, rng and Adam's counter, on every chip
    assert bytes_per_chip(there.state.opt_state) <= 2 * bytes_per_chip(there.state.params) + scalars
    small = sum(leaf.size for leaf in jax.tree.leaves(there.state.params) if leaf.ndim == 1)
    assert count <= bytes_per_chip(there.state.params) <= count + 4 * small + 4 * count * 0.01
    assert bytes_per_chip(there.engine_params) == 4 * count  # f32, on one chip
    engine, model = setup.run.engine, setup.model
    positions = (engine.pages + 1) * 128  # the sink comes on top
    per_token = 2 * 4 * model.num_layers * model.num_kv_heads * model.head_dim
    assert bytes_per_chip(there.kv_cache) == positions * per_token


def test_the_learner_step_multiplies_what_the_formula_says(read_config):
    changes = {"topology": "v5e:2x2", "mesh.fsdp": 4, "batch.micro_rows": 4, "model.remat": "none"}
    setup = programs.setup(read_config("quickstart", **changes, **{"grpo.kl_coef": 0.1}), compiler=False)
    learner = next(program for program in programs.programs(setup) if program.name == report.LEARNER)
    assert learner.dynamic_trips == setup.run.batch.rows // 4
    model, batch = setup.model, setup.run.batch
    attention = 2 * model.num_layers * model.num_heads * model.head_dim * batch.row_tokens
    attention *= batch.rows * batch.row_tokens
    # Attention is computed again in the backward pass, and counts half a block more a row; the head is not.
    least = report.model_flops(setup)
    assert least <= trace(learner).flops.total <= least + 2.5 * attention


def test_every_program_of_every_shipped_pod_traces_without_weights_or_chips(read_config):
    for name in POD_CONFIGS:
        setup = programs.setup(read_config(name), compiler=False)
        traced = {program.name: trace(program).flops for program in programs.programs(setup)}
        assert list(traced) == [report.LEARNER, "prefill", "decode", "hand_over"]
        assert traced[report.LEARNER].kernel > 0
        assert traced["hand_over"].total == 0
        assert (traced["decode"].kernel > 0) == (setup.run.engine.attention == "ragged")


def test_a_step_in_parts_is_planned_as_the_programs_that_run(setup, read_config):
    """`TrainStep.add` multiplies what the whole step does, `TrainStep.update` nothing; the sums lie there between."""
    changes = {"topology": "v5e:2x2", "mesh.fsdp": 4, "batch.micro_rows": 4, "batch.parts": 2}
    parts = programs.setup(read_config("quickstart", **changes), compiler=False)
    whole, *others = (trace(program).flops for program in programs.programs(setup))
    add, update, *rest = (trace(program).flops for program in programs.programs(parts))
    assert (add, update.total, rest) == (whole, 0, others)
    assert programs.resident(setup).gradients is None
    there = programs.resident(parts)
    assert bytes_per_chip(there.gradients) == bytes_per_chip(there.state.params)


@pytest.mark.parametrize(("pages", "rows"), [(0, 64), (4096, 64), (1024, 16)])
def test_the_engine_s_kernel_reads_the_context_of_every_row_that_has_pages(read_config, pages, rows):
    changes = {"engine.context": 8192, "engine.pages": pages, "batch.row_tokens": 8192}
    setup = programs.setup(read_config("deepresearcher_7b_v5p128", **changes), compiler=False)
    decode = next(program for program in programs.programs(setup) if program.name == "decode")
    assert decode.paged.hbm_bytes == 16 * rows * 8192 * 57_344 / 4  # steps, rows, positions, bytes of one, chips


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "config.topology: '' names no slice; set it, e.g. --config.topology=v5p:2x2x1"),
        ({"topology": "v5e:1x3", "mesh.fsdp": 3}, "mesh.fsdp: .* do not divide over fsdp=3"),
        (
            {"topology": "v5e:1x1", "model.path": "Qwen9-7B"},
            "config.model.path: no Hugging Face checkpoint at Qwen9-7B",
        ),
    ],
)
def test_what_cannot_be_planned_is_one_line(read_config, changes, message):
    with pytest.raises(ConfigError, match=message):
        programs.setup(read_config("quickstart", **changes), compiler=False)
