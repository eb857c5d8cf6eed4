"""Group advantages, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from dr_jax.rollout.advantages import group_advantages

ALL = np.ones(4, bool)


def test_reference_normalisation_worked_by_hand():
    # mean 0.25, deviations -.25 -.25 -.25 .75, unbiased variance (3 * .0625 + .5625) / 3 = .25, std .5
    got = group_advantages(np.array([0, 0, 0, 1.0]), ALL)
    np.testing.assert_allclose(got, np.array([-0.25, -0.25, -0.25, 0.75]) / (0.5 + 1e-6), rtol=1e-6)
    assert got.dtype == np.float32


def test_mean_only():
    np.testing.assert_allclose(group_advantages(np.array([0, 0, 0, 1.0]), ALL, normalise="mean"), [-0.25] * 3 + [0.75])


def test_equal_rewards_say_nothing():
    assert not group_advantages(np.full(4, 0.1), ALL).any()
    assert not group_advantages(np.full(4, -1.0), ALL).any()


def test_untrainable_rollouts_take_no_part():
    trainable = np.array([True, True, False, True])
    got = group_advantages(np.array([0, 1, np.nan, 1.0]), trainable)
    alone = group_advantages(np.array([0, 1, 1.0]), ALL[:3])
    np.testing.assert_array_equal(got[trainable], alone)
    assert got[2] == 0


@pytest.mark.parametrize("count", [0, 1])
def test_a_group_needs_two(count):
    trainable = np.arange(4) < count
    assert not group_advantages(np.array([0, 1, 2, 3.0]), trainable).any()


def test_advantages_sum_to_zero():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert abs(group_advantages(rng.uniform(-1, 1, 4), ALL).sum()) < 1e-5
