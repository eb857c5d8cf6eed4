"""What a simulated program takes, by hand; the learner's from the plan that the docs show."""

from __future__ import annotations

import importlib
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.model import flash

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sim():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("sim_costs")


def test_decode_and_prefill(sim):
    costs = sim.Costs("v5p:2x2x1", decode_over_floor=2.0)
    params = 7_615_616_512
    # 2 bytes a weight and 57,344 a token of cache, over 4 chips of 2,765 GB/s.
    assert costs.decode_s(0) == pytest.approx(2 * 2 * params / (4 * 2765e9))
    assert costs.decode_s(1000) - costs.decode_s(0) == pytest.approx(2 * 1000 * 57_344 / (4 * 2765e9))
    # A few tokens cost what reading the weights costs; many, their FLOPs at 35% of 459 TFLOP/s.
    assert costs.prefill_s(1, 0) == pytest.approx(2 * params / (4 * 2765e9))
    assert costs.prefill_s(4096, 0) == pytest.approx(2 * params * 4096 / (4 * 459e12 * 0.35))


def test_full_micro_batches_take_what_the_plan_says(sim):
    text = (ROOT / "docs" / "sharding.md").read_text()
    plan = text[text.index("deepresearcher_7b_v5p128.py: Qwen") :]
    predicted_s, *terms = map(float, re.search(r"learner_step +\S+ +\S+ +" + 5 * r"(\S+) +", plan).groups())
    costs = sim.Costs()
    assert predicted_s == pytest.approx(sum(terms), abs=1e-3)
    assert costs.learner_s(64 * costs.attended([[32768]], 32768)) == pytest.approx(predicted_s, abs=1e-3)
    matrix, memory, kernels, exposed = terms
    assert costs.learner_s([0] * 64) == pytest.approx(matrix + memory + exposed)


@pytest.mark.parametrize("tokens", [[32768], [8000, 9000, 7000, 4000], [20_000], [300] * 100, [1024, 2048, 5120], []])
def test_pairs_are_those_that_the_kernel_goes_over(sim, tokens):
    segment_bt = np.zeros((1, 32768), np.int32)
    for number, end in enumerate(np.cumsum(tokens, dtype=int)):
        segment_bt[0, end - tokens[number] : end] = number + 1
    first_i, _ = np.asarray(flash._spans(flash._begins(jnp.asarray(segment_bt)), 1024))[0]
    assert sim.block_pairs(tokens, 32768) == (np.arange(32) - first_i + 1).sum()


def test_a_micro_batch_waits_for_the_chip_with_most(sim):
    costs = sim.Costs(rows=(8192, 32768))
    assert (costs.hosts, costs.micro_rows(32768), costs.micro_rows(8192)) == (16, 4, 16)
    long, half, empty = (sim.block_pairs(tokens, 32768) for tokens in ([32768], [16384, 16384], []))
    assert (long, half, empty) == (32 * 33 / 2, 2 * 16 * 17 / 2, 32)
    assert costs.attended([[32768], [], [], [], [16384, 16384]], 32768) == [long, half]
    # Four rows of 8,192 on each chip: the second chip has rows 1, 5, 9 and 13.
    short = [[8192] if row in (0, 1, 5, 9) else [] for row in range(16)]
    assert costs.attended(short, 8192) == [3 * 8 * 9 / 2 + 8]
