"""The update of a run: what is learned in parts is what is learned at once, and what is not finite is not learned."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from dr_jax import assemble, run_config
from dr_jax.batch import PackedBatch
from dr_jax.errors import Diverged
from dr_jax.learner.state import init_state
from dr_jax.records import Call, Episode, Finish, Question, Role, StopReason
from dr_jax.rollout.scheduler import Group
from dr_jax.update import Update

TOKENS = 64  # of a row


@pytest.fixture(scope="module")
def small(run) -> run_config.RunConfig:
    """Eight rows of 64 tokens, two a micro-batch."""
    batch = dataclasses.replace(run.batch, rows=8, row_tokens=TOKENS, micro_rows=2)
    return dataclasses.replace(run, batch=batch)


@pytest.fixture(scope="module")
def device(small):
    return assemble.device(small)


def in_parts(run, count: int):
    return dataclasses.replace(run, batch=dataclasses.replace(run.batch, parts=count))


def fresh(device):
    return init_state(device.params, device.config, device.optim, device.mesh, device.rules)


def group(row: int, *lengths: int, failed: bool = False) -> Group:
    """Rollouts of so many tokens, the last half of each drawn; the first is right."""
    rng, episodes = np.random.default_rng(row), []
    for rollout, length in enumerate(lengths):
        token = rng.integers(0, 200, length).astype(np.int32)
        half = length // 2
        call = Call(
            0, None, Role.POLICY, token[:half], np.zeros(half, np.uint8), token[half:],
            np.full(length - half, -1.0, np.float32), Finish.STOP, 0, 0.0, 0.0,
        )  # fmt: skip
        stop = StopReason.INFRASTRUCTURE if failed and rollout == 1 else StopReason.ANSWERED
        episodes.append(Episode(Question(str(row), "?", ("a",)), rollout, (call,), (), stop, reward=float(not rollout)))
    return Group(row, episodes[0].question, tuple(episodes))


GROUPS = [group(0, 60, 60), group(1, 50, 20, 40, failed=True), group(2, 9, 8), group(3, 33, 44)]


def test_parts_are_the_step(small, device):
    """Whole micro-batches are learned at once, and the rest waits for company."""
    whole, want = Update(small, device).finish(fresh(device), GROUPS)
    update, state = Update(in_parts(small, 4), device), fresh(device)
    for some, waits in ((GROUPS[:1], 0), (GROUPS[1:2], 0), (GROUPS[2:3], 2)):
        update.add(state, some)
        assert len(update._waiting) == waits
    state, got = update.finish(state, GROUPS[3:])
    assert update._waiting == []
    assert int(state.step) == 1
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), state.params, whole.params)
    _, again = update.finish(state, GROUPS[:1])  # nothing of the last step is left
    assert again["step/weight"] == 60


def test_the_third_step_in_a_row_without_a_finite_gradient_ends_the_run(small, device):
    update, state = Update(small, device), fresh(device)
    sound = PackedBatch.empty(8, TOKENS)
    sound.segment_bt[0, :9], sound.position_bt[0, :9] = 1, np.arange(9)
    sound.weight_bt[0, 3:9], sound.logp_bt[0, 3:9], sound.advantage_bt[0, :9] = 1.0, -1.0, 1.0
    broken = sound._replace(advantage_bt=np.where(sound.weight_bt > 0, np.float32(np.nan), 0))

    def apply(batch):
        nonlocal state
        state, learned = update.apply(state, (batch,))
        update.check(learned)
        return learned["step/skipped"]

    skipped = [apply(batch) for batch in (broken, broken, sound, broken, broken)]
    assert skipped == [1, 1, 0, 1, 1]
    before = np.asarray(state.params["embed"])
    with pytest.raises(Diverged, match="not finite in 3 steps in a row"):
        apply(broken)
    assert [apply(PackedBatch.empty(8, TOKENS)) for _ in range(4)] == [1] * 4  # nothing is wrong with those
    np.testing.assert_array_equal(np.asarray(state.params["embed"]), before)
