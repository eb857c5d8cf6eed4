"""Counts of modules that XLA really compiled, on eight CPU devices; and the ways of writing that only the TPU has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from dr_jax.plan import hlo


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def compiled(function, mesh, in_specs, out_specs, *args, **how):
    sharded = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    text = jax.jit(sharded).lower(*(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in args)).compile().as_text()
    return [op for op in hlo.read(text, devices=8, **how) if op.kind in hlo.COLLECTIVES]


A, NOWHERE = PartitionSpec("a"), PartitionSpec()


@pytest.mark.parametrize(
    ("collective", "kind", "group", "size"),
    [
        (lambda x: jax.lax.psum(x, "a"), "all-reduce", (0, 2, 4, 6), 2 * 16 * 4),
        (lambda x: jax.lax.psum(x, "b"), "all-reduce", (0, 1), 2 * 16 * 4),
        (lambda x: jax.lax.psum(x, ("a", "b")), "all-reduce", tuple(range(8)), 2 * 16 * 4),
        (lambda x: jax.lax.all_gather(x, "a"), "all-gather", (0, 2, 4, 6), 4 * 2 * 16 * 4),
        (lambda x: jax.lax.all_to_all(x, "b", 0, 0), "all-to-all", (0, 1), 2 * 16 * 4),
        (lambda x: jax.lax.psum_scatter(x, "b", tiled=True), "reduce-scatter", (0, 1), 16 * 4),
        (lambda x: jax.lax.ppermute(x, "b", [(0, 1), (1, 0)]), "collective-permute", None, 2 * 16 * 4),
    ],
)
def test_each_collective_with_its_group_and_bytes(mesh, collective, kind, group, size):
    (op,) = compiled(collective, mesh, A, A, ((8, 16), jnp.float32))
    assert (op.kind, op.runs, op.hbm_bytes) == (kind, 1, size)
    if group is not None:
        assert op.group == group


def nested(x, times, n):
    """`n` (traced) times: five times over a sum across chips, then one more sum."""
    inner = lambda x, _: (jnp.tanh(jax.lax.psum(x, "a")), None)  # noqa: E731
    outer = lambda _, x: jnp.tanh(jax.lax.psum(jax.lax.scan(inner, x, length=times)[0], "b"))  # noqa: E731
    return jax.lax.fori_loop(0, n, outer, x)


def test_loops_multiply_what_they_hold(mesh):
    ops = compiled(
        functools.partial(lambda x, n, times: nested(x, times, n), times=5), mesh, (A, NOWHERE), A,
        ((8, 16), jnp.bfloat16), ((), jnp.int32), dynamic_trips=7,
    )  # fmt: skip
    assert {(op.group, op.runs) for op in ops} == {((0, 2, 4, 6), 35), ((0, 1), 7)}


def test_every_branch_of_a_conditional_counts(mesh):
    def either(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "a"), lambda x: 2 * jax.lax.psum(x, "b"), x)

    ops = compiled(either, mesh, A, A, ((8, 16), jnp.float32))
    assert sorted(op.group for op in ops) == [(0, 1), (0, 2, 4, 6)]


# As the TPU compiler writes it: no trip count but a constant in the condition, on-chip memory as S(1), a gather that is
# started and awaited, a fused reduction of which one part is kept, groups by mesh axis, a Pallas kernel, a sparse core
# that sums beside the rest.
TPU = """HloModule jit_step, is_scheduled=true

%fused (p.1: bf16[64,64]) -> bf16[8,64] {
  %p.1 = bf16[64,64]{1,0} parameter(0)
  %all-reduce.9 = bf16[64,64]{1,0} all-reduce(%p.1), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %slice.1 = bf16[8,64]{1,0} slice(%all-reduce.9), slice={[0:8], [0:64]}
}

%multiply (p.2: bf16[64,64], p.3: bf16[64,64]) -> bf16[64,64] {
  %p.2 = bf16[64,64]{1,0} parameter(0)
  %p.3 = bf16[64,64]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[64,64]{1,0} convolution(%p.2, %p.3), dim_labels=bf_io->bf
}, execution_thread="sparsecore"

%task (p.4: bf16[64,64]) -> bf16[64,64] {
  %p.4 = bf16[64,64]{1,0} parameter(0)
  ROOT %all-reduce.10 = bf16[64,64]{1,0} all-reduce(%p.4), channel_id=4, replica_groups={{0,1,2,3,4,5,6,7}}
}, execution_thread="sparsecore"

%offloaded (p.5: bf16[64,64]) -> bf16[64,64] {
  %p.5 = bf16[64,64]{1,0} parameter(0)
  ROOT %custom-call.1 = bf16[64,64]{1,0} custom-call(%p.5), called_computations={%task}
}, execution_thread="sparsecore"

%condition (c.1: (s32[], bf16[64,64])) -> pred[] {
  %c.1 = (s32[], bf16[64,64]) parameter(0)
  %c.2 = s32[]{:T(128)} constant(28)
  %c.3 = s32[] get-tuple-element(%c.1), index=0
  ROOT %c.4 = pred[] compare(%c.3, %c.2), direction=LT
}

%body (b.1: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %b.1 = (s32[], bf16[64,64]) parameter(0)
  %b.2 = bf16[64,64]{1,0:T(8,128)(2,1)} get-tuple-element(%b.1), index=1
  %b.3 = bf16[64,64]{1,0:T(8,128)(2,1)S(1)} copy(%b.2), backend_config={"estimated_cycles":"10"}
  %b.4 = bf16[64,64]{1,0} fusion(%b.2, %b.3), kind=kOutput, calls=%multiply, backend_config={"estimated_cycles":"1000"}
  %b.5 = (bf16[8,64]{1,0}, bf16[64,64]{1,0}) all-gather-start(%b.6), channel_id=1, replica_groups=mesh['x'=8,'y'=2]{'x'}
  %b.6 = bf16[8,64]{1,0} fusion(%b.4), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"5"}
  %b.7 = bf16[64,64]{1,0} custom-call(%b.4), custom_call_target="tpu_custom_call"
  %b.9 = ((), (), (s32[8]{0})) async-start(), calls=%offloaded
  %b.10 = ((bf16[8]{0}), bf16[8]{0}, (s32[8]{0})) async-update(%b.9, %b.4)
  %b.11 = bf16[8]{0} async-done(%b.10)
  %b.12 = bf16[64,64]{1,0} all-gather-done(%b.5)
  ROOT %b.8 = (s32[], bf16[64,64]) tuple(%b.1, %b.7)
}

ENTRY %main (m.1: (s32[], bf16[64,64])) -> (s32[], bf16[64,64]) {
  %m.1 = (s32[], bf16[64,64]) parameter(0)
  ROOT %m.2 = (s32[], bf16[64,64]) while(%m.1), condition=%condition, body=%body
}
"""


def test_a_module_as_the_tpu_compiler_writes_it():
    square = 64 * 64 * 2
    found = {(op.kind, op.name): op for op in hlo.read(TPU, devices=16)}
    assert all(op.runs == 28 for op in found.values())
    assert found["memory", "b.3"].hbm_bytes == square  # read from HBM, written on the chip
    assert (found["matrix", "b.4"].cycles, found["matrix", "b.4"].hbm_bytes) == (1000, 2 * square)
    gather = found["all-gather", "b.5"]
    assert gather.overlapped
    assert gather.group == (0, 2, 4, 6, 8, 10, 12, 14)
    assert gather.hbm_bytes == pytest.approx((square + square / 8) * 8 / 9)
    scattered = found["reduce-scatter", "all-reduce.9"]
    assert (scattered.group, scattered.hbm_bytes, scattered.overlapped) == (tuple(range(8)), square / 8, False)
    assert ("wait", gather.handle) in found
    summed = found["all-reduce", "all-reduce.10"]
    assert ("wait", summed.handle) in found
    assert (summed.group, summed.hbm_bytes, summed.overlapped) == (tuple(range(8)), square, True)
    assert ("kernel", "b.7") in found


def test_a_loop_that_the_tpu_compiler_made_counts_in_unsigned_numbers():
    unsigned = TPU.replace("s32[]", "u32[]")
    assert {op.runs for op in hlo.read(unsigned, devices=16, dynamic_trips=1000)} == {28}


def test_a_kernel_whose_data_has_line_breaks_does_not_end_its_computation():
    text = """HloModule step
ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %p = f32[8,8]{1,0} parameter(0)
  %attend.1 = f32[8,8]{1,0} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={"config":{
"xprof_metadata":"{\\"block_q\\": 1024}"
}}, metadata={op_name="attend"}
  ROOT %dot.1 = f32[8,8]{1,0} dot(%attend.1, %attend.1), backend_config={"estimated_cycles":"7"}
}, execution_thread="main"
"""
    assert [(op.kind, op.name, op.cycles) for op in hlo.read(text, devices=1)] == [
        ("kernel", "attend.1", 0), ("matrix", "dot.1", 7),
    ]  # fmt: skip
