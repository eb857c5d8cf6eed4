"""A schedule read from text as the TPU compiler writes it; and the real one, where there is a compiler."""

from __future__ import annotations

import pytest

from dr_jax import chips
from dr_jax.plan import kernels, programs

BLOCK = 1024


def bundles(*lines: tuple[int, str]) -> str:
    return "\n".join(f"{address:#7x}   {text}" for address, text in lines)


# A loop of 200 bundles: 70 before the first block of a row, 90 with products in them, the rest in every step.
FINAL = bundles(
    (0x0, ":  { %s1 = sld [smem:[#allocation0]] } /* Start region 5 */"),
    (0x10, "LB: > { %s2 = sphi } /* Start region 9 */"),
    (0x14, ": > { %3 = sbr.rel (%p1) target = $region12 } /* Start region 10 :: Start region 11 */"),
    (0x16, ": > { nop } /* Start region 13 */"),
    (0x17, ": > { nop } /* End region 13 */"),
    (0x59, ": > { %5 = vst } /* End region 11 :: End region 10 */"),
    (0x60, "PF: > { %6 = vld } /* Start region 20 */"),
    (0x61, ": > { %7 = vmatmul.bf16.gmra.mxu0 %v1 ;;  %8 = vmatmul.bf16.gmra.mxu1 %v2 }"),
    (0xB0, ": > { %9 = vmatmul.f32.gmra.mxu0 %v3 }"),
    (0xB9, ": > { %10 = vst } /* End region 20 */"),
    (0xD7, ": > { %p2 = scmp.ge.s32.totalorder %s2, 898 /* loop exit test */ } /* End region 9 */"),
    (0xF0, ":  { nop } /* End region 5 */"),
)


def test_a_schedule_is_counted_by_how_often_its_parts_run():
    assert kernels.read(FINAL) == kernels.Schedule(body=90, edges=70, step=40, steps=898)


# The same of a kernel with two loops: 60 bundles where it masks, 40 where it does not, 70 at the start of a row.
LOOPS = bundles(
    (0x10, "LB: > { %s2 = sphi } /* Start region 9 */"),
    (0x14, ": > { %3 = vst } /* Start region 10 */"),
    (0x59, ": > { %5 = vst } /* End region 10 */"),
    (0x60, "LB: >> { %6 = vld } /* Start region 20 */"),
    (0x62, ": >> { %7 = vmatmul.bf16.gmra.mxu0 %v1 } /* Start region 21 */"),
    (0x98, ": >> { %8 = vmatmul.bf16.gmra.mxu1 %v1 } /* End region 21 */"),
    (0x9B, ": >> { %9 = vst } /* End region 20 */"),
    (0xA0, "LB: >> { %10 = vmatmul.bf16.gmra.mxu1 %v1 } /* Start region 30 */"),
    (0xC7, ": >> { %11 = vmatmul.bf16.gmra.mxu0 %v1 } /* End region 30 */"),
    (0xD7, ": > { %p2 = scmp.ge.s32.totalorder %s2, 226 /* loop exit test */ } /* End region 9 */"),
)


def test_a_kernel_that_masks_in_a_loop_of_its_own_has_two_bodies():
    assert kernels.read(LOOPS) == kernels.Schedule(body=40, edges=70, step=30, steps=226, masked=60)


def test_its_steps_mask_one_pair_and_go_over_the_others_before_it():
    attention = kernels.Attention("flash", "v6e", rows=1, length=8 * BLOCK, heads=28, kv_heads=4, head_dim=128)
    slow = kernels.Schedule(body=10_000, edges=560, step=300, steps=224, masked=12_000)
    a_step = 300 + 12_000 + 3.5 * 10_000 + 560 / (8 * 7)
    chip = chips.CHIPS["v6e"]
    alone_s = 4 * 8 * BLOCK * 128 * 2 * 2 / chip.hbm_bytes_per_s  # keys and values of 4 heads, in bf16
    assert kernels.seconds(attention, "flash_fwd", slow) == pytest.approx(224 * a_step / chip.clock_hz + alone_s)


def test_a_run_takes_its_steps_and_at_the_least_what_the_products_need():
    attention = kernels.Attention("splash", "v5p", rows=1, length=8 * BLOCK, heads=28, kv_heads=4, head_dim=128)
    visited = 9 / 16  # of 8 x 8 pairs, those not beyond the diagonal
    clock = chips.CHIPS["v5p"].clock_hz
    slow = kernels.Schedule(body=10_000, edges=700, step=200, steps=896)
    assert kernels.seconds(attention, "splash_mqa_fwd", slow) == pytest.approx(
        896 * (200 + visited * 10_000 + 700 / 8) / clock
    )
    assert kernels.seconds(attention, "splash_mqa_dkv", slow) == pytest.approx(
        896 * (200 + visited * 10_000 + 700 / 56) / clock
    )
    # Four 128 x 128 units a core: 4 products of a pair of blocks take 8,192 cycles, whatever the schedule says.
    fast = kernels.Schedule(body=1, edges=0, step=0, steps=896)
    assert kernels.seconds(attention, "splash_mqa_dkv", fast) == pytest.approx(896 * visited * 8192 / clock, rel=2e-3)


def test_half_of_a_wider_matrix_unit_stays_empty():
    fast = kernels.Schedule(body=1, edges=0, step=0, steps=100)
    narrow, full = (kernels.Attention("splash", "v6e", 1, BLOCK, 4, 2, head_dim) for head_dim in (128, 256))
    assert kernels.seconds(narrow, "splash_mqa_dq", fast) == kernels.seconds(full, "splash_mqa_dq", fast)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", kernels.PRODUCTS)
def test_both_cores_of_a_chip_take_part_in_every_kernel(kernel):
    if not programs.has_compiler():
        pytest.skip("needs the TPU compiler: pip install libtpu")
    attention = kernels.Attention(kernel, "v5p", rows=1, length=2 * BLOCK, heads=4, kv_heads=2, head_dim=128)
    grid = {"splash": 4 * 2 * 2, "flash": 4 * 2}[kernel]  # heads x pairs of blocks; heads x blocks
    for name, schedule in kernels.schedules(attention).items():
        assert schedule.steps == grid // 2 + 2, name  # over two cores, and the pipeline's
        assert schedule.body > 4 * schedule.step > 0
        assert (schedule.masked > schedule.body) == (kernel == "flash")
        useful = kernels.PRODUCTS[kernel][name] * 2 * 4 * (2 * BLOCK) ** 2 / 2 * 128
        assert 0.2 < useful / kernels.seconds(attention, name, schedule) / chips.CHIPS["v5p"].flops_per_s < 1
