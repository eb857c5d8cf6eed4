"""The arithmetic, worked by hand; and one small run compiled by the real TPU compiler."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from dr_jax import chips
from dr_jax.plan import hlo, programs, report
from dr_jax.plan.estimate import (
    KERNEL_BANDWIDTH,
    KERNEL_EFFICIENCY,
    bytes_per_chip,
    link_bytes_per_s,
    paged_seconds,
    seconds,
    wire_bytes,
)
from dr_jax.plan.programs import Work

CUBE = chips.find("v5p:4x4x4")
PLACES = [tuple(map(int, place)) for place in np.ndindex(4, 4, 4)]


def test_bytes_on_the_wire():
    eight = tuple(range(8))
    wire = {kind: wire_bytes(hlo.Op(kind, "", 1, 800.0, group=eight)) for kind in hlo.COLLECTIVES}
    assert wire["all-gather"] == wire["all-to-all"] == 700
    assert wire["all-reduce"] == 1400
    assert wire["reduce-scatter"] == 5600  # its result is an eighth of what was summed
    assert wire["collective-permute"] == 800
    assert wire_bytes(hlo.Op("all-reduce", "", 1, 800.0, group=(3,))) == 0


def test_links_that_a_group_can_use():
    link = CUBE.chip.link_bytes_per_s
    assert link_bytes_per_s(range(64), CUBE, PLACES) == 6 * link  # three rings, both ways
    assert link_bytes_per_s(range(4), CUBE, PLACES) == 2 * link  # one ring
    assert link_bytes_per_s((0, 1), CUBE, PLACES) == link  # neighbours on it
    pair = chips.find("v5p:2x2x1")
    assert link_bytes_per_s(range(4), pair, list(np.ndindex(2, 2, 1))) == 2 * pair.chip.link_bytes_per_s


def test_every_term_of_the_time():
    chip = CUBE.chip
    ops = [
        hlo.Op("matrix", "", 10, 1.0, cycles=1_750_000),
        hlo.Op("memory", "", 2, 2765e6, cycles=175_000_000),  # bytes: 1 ms, cycles: 100 ms
        hlo.Op("memory", "", 1, 2765e9, cycles=1_750_000),  # bytes: 1 s, cycles: 1 ms
        hlo.Op("all-gather", "", 3, 64 * 540e6 / 63, group=tuple(range(64))),
        hlo.Op("all-gather", "", 1, 64 * 540e6 / 63, group=tuple(range(64)), overlapped=True),
    ]
    ops += [hlo.Op("kernel", "splash_mqa_fwd.1", 4, 1.0), hlo.Op("kernel", "other", 4, 1.0)]
    others = chip.flops_per_s * KERNEL_EFFICIENCY / 2
    terms = seconds(ops, CUBE, PLACES, kernel_flops=others, kernel_s={"splash_mqa_fwd.1": 0.25})
    want = dict(matrix=0.01, memory=0.003, kernels=1.5, exposed=0.003, overlapped=0.001)
    assert terms == pytest.approx(want)


def test_what_is_waited_for_of_collectives_beside_other_work_is_exposed():
    def gather(handle):  # 2 ms each
        return hlo.Op("all-gather", "", 5, 2 * 64 * 540e6 / 63, group=tuple(range(64)), overlapped=True, handle=handle)

    product = hlo.Op("matrix", "", 5, 1.0, cycles=1_750_000)  # 1 ms
    ops = [
        gather("a"),
        gather("b"),
        product,
        hlo.Op("wait", "a", 5, 0.0),
        product,
        product,
        hlo.Op("wait", "b", 5, 0.0),
    ]
    terms = seconds([*ops, hlo.Op("wait", "a copy", 5, 0.0)], CUBE, PLACES, kernel_flops=0.0, kernel_s={})
    # The first ends 1 ms after the product beside it, the second, which follows it, with the two products after that.
    assert (terms["exposed"], terms["overlapped"], terms["matrix"]) == pytest.approx((0.005, 0.020, 0.015))


def test_the_engine_s_kernel_reads_or_multiplies():
    chip = CUBE.chip
    reading = Work(flops=1.0, hbm_bytes=chip.hbm_bytes_per_s * KERNEL_BANDWIDTH / 4)
    multiplying = Work(flops=chip.flops_per_s * KERNEL_EFFICIENCY / 2, hbm_bytes=1.0)
    assert (paged_seconds(reading, CUBE), paged_seconds(multiplying, CUBE)) == pytest.approx((0.25, 0.5))


def test_bytes_of_placed_arrays():
    mesh = AbstractMesh((4, 2), ("a", "b"))
    placed = jax.ShapeDtypeStruct((8, 6), np.float32, sharding=NamedSharding(mesh, PartitionSpec("a", "b")))
    whole = jax.ShapeDtypeStruct((5,), np.int8, sharding=NamedSharding(mesh, PartitionSpec()))
    assert bytes_per_chip({"x": placed, "y": whole}) == 2 * 3 * 4 + 5


@pytest.mark.slow
def test_a_run_compiled_for_a_tpu(tiny):
    """The donated state and cache are reused, and what is predicted is not below what is possible."""
    if not programs.has_compiler():
        pytest.skip("needs the TPU compiler: pip install libtpu")
    plan = report.make(programs.setup(tiny, compiler=True), compiler=True)
    said = report.summary(plan, "tiny")
    assert said["fits"] is True
    state = bytes_per_chip(plan.resident.state)
    assert plan.compiled[report.LEARNER].alias_bytes >= 0.99 * state
    assert plan.compiled["decode"].alias_bytes >= bytes_per_chip(plan.resident.kv_cache)
    assert {"all-gather", "all-reduce"} <= plan.compiled[report.LEARNER].collectives.keys()
    for name, program in said["programs"].items():
        assert program["predicted_s"] >= program["ideal_s"], name
    assert 0 < said["predicted_mfu"] < 1


@pytest.mark.slow
def test_a_step_in_parts_compiled_for_a_tpu(tiny):
    """The sums are added to where they lie, and then the state is changed where it lies."""
    if not programs.has_compiler():
        pytest.skip("needs the TPU compiler: pip install libtpu")
    parts = dataclasses.replace(tiny, batch=dataclasses.replace(tiny.batch, parts=2))
    plan = report.make(programs.setup(parts, compiler=True), compiler=True)
    there, compiled = plan.resident, plan.compiled
    assert compiled[report.LEARNER].alias_bytes >= 0.99 * bytes_per_chip(there.gradients)
    assert compiled[report.UPDATE].alias_bytes >= 0.99 * bytes_per_chip(there.state)
    said = report.summary(plan, "tiny")
    assert said["fits"] is True
    assert said["predicted_step_s"] == pytest.approx(
        sum(compiled[name].step_s for name in (report.LEARNER, report.UPDATE)), abs=1e-3
    )
