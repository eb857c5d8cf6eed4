from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from dr_jax.plan import programs, report
from dr_jax.plan.estimate import GIB, Compiled

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def plan(read_config):
    return report.make(programs.setup(read_config("deepresearcher_7b"), compiler=False), compiler=False)


GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("deepresearcher_*.py")))
def test_what_lies_where_is_as_it_was_read(read_config, name):
    """A change is meant to show: write the file again with the command, and read the difference."""
    config = f"configs/{name}.py"
    found = report.layout(programs.setup(read_config(name), compiler=False), config) + "\n"
    command = f"python tools/plan.py --config={config} --layout > tests/golden/{name}.txt"
    assert found == (GOLDEN / f"{name}.txt").read_text(), command


PARAMETERS = 7_615_616_512  # of Qwen2.5-7B, as published


def test_hbm_by_kind_is_what_one_works_out_by_hand(plan):
    hbm, chips = report.hbm_gib(plan), 4
    assert hbm["params"] == pytest.approx(4 * PARAMETERS / chips / GIB, rel=1e-3)
    assert hbm["optimizer"] == pytest.approx(8 * PARAMETERS / chips / GIB, rel=1e-3)
    assert hbm["reference"] == pytest.approx(2 * PARAMETERS / chips / GIB, rel=1e-3)
    assert hbm["engine_params"] == pytest.approx(2 * PARAMETERS / chips / GIB, rel=1e-3)
    assert hbm["kv_cache"] == (4096 + 1) * 128 * 57_344 / chips / GIB
    assert hbm["activations"] == 28 * 32768 * (3584 + 28 * 128) * 2 / GIB  # one row a chip: a layer's input, and o
    assert hbm["temporaries"] == 0
    assert hbm["total"] == pytest.approx(sum(hbm[kind] for kind in hbm if kind not in ("total", "limit")))
    assert hbm["limit"] == 95


def test_without_a_compiler_the_plan_says_so_and_leaves_open_what_it_cannot_know(plan):
    said = report.summary(plan, "a.py")
    assert json.loads(json.dumps(said)) == said
    assert (said["topology"], said["chips"], said["config"]) == ("v5p:2x2x1", 4, "a.py")
    for name in ("fits", "predicted_step_s", "predicted_mfu", "collective_gb_per_chip", "compile_s"):
        assert said[name] is None
    assert "Arithmetic only: the TPU compiler (pip install libtpu) was not asked." in report.table(plan, "a.py")


def test_what_does_not_fit_names_the_largest_kinds_and_what_to_change(read_config):
    run = read_config("deepresearcher_7b", **{"engine.pages": 65536})
    setup = programs.setup(run, compiler=False)
    plan = report.make(setup, compiler=False)
    full = dict.fromkeys(plan.programs, Compiled(seconds=dict.fromkeys(TERMS, 1e5), temp_bytes=20 * GIB))
    plan = report.Plan(setup, plan.resident, plan.programs, plan.traced, full)
    assert report.summary(plan, "")["fits"] is False
    assert report.hbm_gib(plan)["activations"] + report.hbm_gib(plan)["temporaries"] == 20
    assert report.advice(plan).startswith(
        "kv_cache (112.0 GiB): lower config.engine.pages, and config.engine.slots with it; optimizer (14.2 GiB): raise"
    )


TERMS = ("matrix", "memory", "kernels", "exposed", "overlapped")


def test_a_program_that_does_not_compile_does_not_fit(plan):
    broken = {name: Compiled(seconds=dict.fromkeys(TERMS, 1.0)) for name in plan.programs}
    broken["decode"] = Compiled(failure="Used 40.1G of 31.2G hbm.", compile_s=3.0)
    failed = report.Plan(plan.setup, plan.resident, plan.programs, plan.traced, broken)
    said = report.summary(failed, "")
    assert said["fits"] is False
    assert said["programs"]["decode"]["failure"] == "Used 40.1G of 31.2G hbm."
    assert "did not compile: Used 40.1G of 31.2G hbm." in report.table(failed, "")


def test_a_step_faster_than_the_chips_is_our_mistake(plan):
    quick = {name: Compiled(seconds=dict.fromkeys(TERMS, 1.0)) for name in plan.programs}
    with pytest.raises(AssertionError, match="was not read whole"):
        report.mfu(report.Plan(plan.setup, plan.resident, plan.programs, plan.traced, quick))


def test_a_step_in_parts_takes_the_time_of_both_programs_and_keeps_its_gradients(plan, read_config):
    run = read_config("deepresearcher_7b", **{"batch.parts": 16})
    setup = programs.setup(run, compiler=False)
    parts = report.make(setup, compiler=False)
    assert list(parts.programs)[:2] == [report.LEARNER, report.UPDATE]
    before, after = report.hbm_gib(plan), report.hbm_gib(parts)
    assert after["gradients"] == after["params"]
    assert after["total"] == pytest.approx(before["total"] + after["gradients"])
    took_s = {report.LEARNER: 9e3, report.UPDATE: 1e3}
    each = {
        name: Compiled(
            seconds=dict.fromkeys(TERMS, 0.0) | {"matrix": took_s.get(name, 1.0)},
            collectives={"all-gather": (3, 5e9)},
        )
        for name in parts.programs
    }
    said = report.summary(dataclasses.replace(parts, compiled=each), "")
    assert (said["predicted_step_s"], said["collective_gb_per_chip"]) == (1e4, 10)
    per_chip_flops = report.model_flops(setup) / 4
    assert said["predicted_mfu"] == pytest.approx(per_chip_flops / (1e4 * setup.piece.chip.flops_per_s), abs=1e-4)


def test_every_array_is_listed_with_its_letters_and_placement(plan):
    lines = report.shapes(plan).splitlines()
    rows = {line.split("  ")[0]: " ".join(line.split()) for line in lines}
    assert rows["params/blocks/attn/q"].endswith("float32[28,3584,28,128] ldnh (-, fsdp, tensor, -) 359,661,568")
    assert rows["engine/blocks/mlp/down"].endswith("bfloat16[28,18944,3584] lfd (-, tensor, fsdp) 950,534,144")
    assert rows["cache"].endswith("bfloat16[114716,128,8,128] pskh (-, -, tensor, -) 7,518,027,776")
    assert rows["batch/token_bt"].endswith("int32[4096,32768] bt (data+fsdp, -) 134,217,728")


def test_the_floor_of_decode_reads_no_more_of_the_cache_than_its_rows_have(read_config):
    changes = {"engine.context": 8192, "engine.pages": 4096, "engine.slots": 16, "batch.row_tokens": 8192}
    made = report.make(programs.setup(read_config("deepresearcher_7b", **changes), compiler=False), compiler=False)
    each = {name: Compiled(seconds=dict.fromkeys(TERMS, 1e5)) for name in made.programs}
    said = report.summary(dataclasses.replace(made, compiled=each), "")["programs"]["decode"]
    weights, of_rows = 16 * report.bytes_per_chip(made.resident.engine_params), 16 * 16 * 8192 * 57_344 / 4
    assert said["roofline_s"] == pytest.approx((weights + of_rows) / 2765e9, rel=1e-3)
