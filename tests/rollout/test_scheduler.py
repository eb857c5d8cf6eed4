"""The scheduler: groups stay whole and in order, the bounds hold, one failure stays one failure, no step runs ahead.

Rows 54, 55, 56 (the step), 60 and 80 of the fault matrix are named in the tests that hold them."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools

import numpy as np
import pytest

from dr_jax.errors import RolloutHalted
from dr_jax.metrics import policy_lag
from dr_jax.records import Call, Episode, Failure, FailureKind, Finish, Question, Role, StopReason, ToolUse
from dr_jax.rollout.scheduler import Scheduler, check_health, run_groups

QUESTIONS = [Question(str(i), f"question {i}", ("a",)) for i in range(5)]
NONE = np.zeros(0, np.int32)
CALL = Call(0, None, Role.POLICY, NONE, NONE.astype(np.uint8), NONE, NONE.astype(np.float32), Finish.STOP, 0, 0.0, 0.0)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_groups_are_whole_and_in_question_order_whatever_finishes_first():
    async def run(question, rollout):
        await turns(50 - 10 * int(question.id) + rollout)
        return Episode(question, rollout, (CALL,), (), StopReason.ANSWERED)

    seen = []
    groups = await run_groups(
        QUESTIONS, rollouts=3, run_episode=run, in_flight=asyncio.Semaphore(100), on_episode=seen.append
    )
    assert [group.question.id for group in groups] == ["0", "1", "2", "3", "4"]
    assert all([e.rollout for e in group.episodes] == [0, 1, 2] for group in groups)
    assert len(seen) == 15
    assert seen[0].question.id == "4"


async def test_the_bound_on_episodes_in_flight_holds_and_is_used():
    running = peak = 0

    async def run(question, rollout):
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await turns(30)
        running -= 1
        return Episode(question, rollout, (CALL,), (), StopReason.ANSWERED)

    await run_groups(QUESTIONS, rollouts=4, run_episode=run, in_flight=asyncio.Semaphore(7))
    assert peak == 7


async def test_row_54_a_defect_in_one_episode_is_counted_and_the_others_go_on():
    async def run(question, rollout):
        if (question.id, rollout) == ("2", 1):
            raise ZeroDivisionError("a defect")
        return Episode(question, rollout, (CALL,), (), StopReason.ANSWERED)

    groups = await run_groups(QUESTIONS, rollouts=2, run_episode=run, in_flight=asyncio.Semaphore(3))
    failed = [e for group in groups for e in group.episodes if not e.trainable]
    assert [(e.question.id, e.rollout, e.stop, e.detail) for e in failed] == [
        ("2", 1, StopReason.INFRASTRUCTURE, "ZeroDivisionError: a defect")
    ]


async def test_a_defect_that_hits_every_episode_is_logged_once(caplog):
    async def run(question, rollout):
        raise ZeroDivisionError("a defect")

    groups = await run_groups(QUESTIONS, rollouts=4, run_episode=run, in_flight=asyncio.Semaphore(3))
    assert sum(e.detail == "ZeroDivisionError: a defect" for group in groups for e in group.episodes) == 20
    assert len(caplog.records) == 1


async def test_cancelling_leaves_no_episode_running():
    started, ended = 0, 0

    async def run(question, rollout):
        nonlocal started, ended
        started += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1

    task = asyncio.create_task(run_groups(QUESTIONS, rollouts=2, run_episode=run, in_flight=asyncio.Semaphore(4)))
    await turns(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert started == ended == 4


async def test_rows_55_and_56_a_step_with_too_many_outside_failures_is_not_trained_on():
    use = ToolUse("web_search", {}, (Failure(FailureKind.QUOTA_EXHAUSTED),), 0.1, "")

    async def run(question, rollout):
        return Episode(question, rollout, (CALL,), (use,) if int(question.id) < 2 else (), StopReason.ANSWERED)

    groups = await run_groups(QUESTIONS, rollouts=1, run_episode=run, in_flight=asyncio.Semaphore(9))
    check_health(groups, max_infra_fraction=0.4)
    with pytest.raises(RolloutHalted, match="2 of 5.*quota_exhausted"):
        check_health(groups, max_infra_fraction=0.39)


class Rollouts:
    """Episodes that last as long as they are told to; remembers what ran when."""

    def __init__(self, ended_after=lambda step, question, rollout: 3):
        self.version = 0
        self.started, self.running, self.peak = [], 0, 0
        self._turns = ended_after

    async def run(self, step, question, rollout):
        self.started.append((step, question.id, rollout, self.version))
        self.running += 1
        self.peak = max(self.peak, self.running)
        call = dataclasses.replace(CALL, version=self.version)
        try:
            await turns(self._turns(step, question, rollout))
        finally:
            self.running -= 1
        return Episode(question, rollout, (call,), (), StopReason.ANSWERED)

    def starts(self):
        """step -> versions of the weights with which its episodes started"""
        seen = collections.defaultdict(set)
        for step, _, _, version in self.started:
            seen[step].add(version)
        return dict(seen)


def questions_of(step):
    return [Question(f"{step}.{i}", "?", ("a",)) for i in range(3)]


async def train(rollouts, *, steps, lag, in_flight=100, learn_turns=20, **more):
    taken = []
    async with Scheduler(
        questions_of,
        rollouts.run,
        steps=steps,
        rollouts=2,
        in_flight=asyncio.Semaphore(in_flight),
        max_policy_lag=lag,
        **more,
    ) as scheduler:
        for step in steps:
            rollouts.version = step
            taken.append(await scheduler.take(step))
            await turns(learn_turns)
    return taken


@pytest.mark.parametrize("lag", [0, 1, 2])
async def test_episodes_start_as_early_as_the_lag_allows_and_no_earlier(lag):
    rollouts = Rollouts()
    taken = await train(rollouts, steps=range(4, 10), lag=lag)
    assert rollouts.starts() == {step: {max(4, step - lag)} for step in range(4, 10)}
    assert [[group.question.id for group in groups] for groups in taken] == [
        [f"{step}.{i}" for i in range(3)] for step in range(4, 10)
    ]
    lags = [policy_lag(e, step) for step, groups in enumerate(taken, 4) for group in groups for e in group.episodes]
    assert max(lags) == lag
    assert all(e.trainable for groups in taken for group in groups for e in group.episodes)


async def test_without_lag_nothing_runs_while_the_learner_works():
    rollouts, seen = Rollouts(), []
    steps = range(3)
    async with Scheduler(
        questions_of, rollouts.run, steps=steps, rollouts=2, in_flight=asyncio.Semaphore(9)
    ) as scheduler:
        for step in steps:
            await scheduler.take(step)
            for _ in range(20):
                await asyncio.sleep(0)
                seen.append(rollouts.running)
    assert set(seen) == {0}
    assert [(step, id, rollout) for step, id, rollout, _ in rollouts.started] == [
        (step, f"{step}.{i}", rollout) for step in steps for i in range(3) for rollout in range(2)
    ]


async def test_an_episode_goes_on_while_the_weights_change_and_is_trained_in_its_own_step():
    # One episode of step 1 outlasts step 0's training; those of step 2 wait for version 1.
    rollouts = Rollouts(lambda step, question, rollout: 60 if (question.id, rollout) == ("1.0", 0) else 3)
    taken = await train(rollouts, steps=range(3), lag=1, learn_turns=30)
    slow = taken[1][0].episodes[0]
    assert (slow.calls[0].version, slow.stop) == (0, StopReason.ANSWERED)
    assert rollouts.starts() == {0: {0}, 1: {0}, 2: {1}}


async def test_the_bound_on_episodes_in_flight_holds_over_all_steps():
    rollouts = Rollouts(lambda step, question, rollout: 30)
    await train(rollouts, steps=range(5), lag=3, in_flight=4)
    assert rollouts.peak == 4


async def test_an_evaluation_beside_the_next_steps_shares_their_bound():
    """Both get on: neither waits for the other to be done."""
    rollouts, in_flight = Rollouts(lambda step, question, rollout: 30), asyncio.Semaphore(4)
    async with Scheduler(
        questions_of, rollouts.run, steps=range(9), rollouts=2, in_flight=in_flight, max_policy_lag=3
    ) as scheduler:
        await scheduler.take(0)
        before = len(rollouts.started)
        groups = await run_groups(
            QUESTIONS, rollouts=1, run_episode=functools.partial(rollouts.run, 99), in_flight=in_flight
        )
    assert len(groups) == 5
    assert rollouts.peak == 4
    steps = [step for step, *_ in rollouts.started[before:]]
    assert steps.index(99) < 4
    assert any(step != 99 for step in steps[steps.index(99) :])


async def test_what_nobody_takes_is_bounded_and_the_stopped_scheduler_leaves_nothing_behind():
    rollouts = Rollouts()
    async with Scheduler(
        questions_of, rollouts.run, steps=range(100), rollouts=2, in_flight=asyncio.Semaphore(3), max_policy_lag=2
    ) as scheduler:
        await scheduler.take(0)
        await turns(300)
    assert {step for step, *_ in rollouts.started} == {0, 1, 2}
    assert len(asyncio.all_tasks()) == 1


async def test_row_80_an_episode_with_older_weights_than_the_lag_allows_is_dropped_and_counted():
    async def run(step, question, rollout):
        # As if the sampler still drew with the weights of version 3.
        first, last = (dataclasses.replace(CALL, version=version) for version in (3, step))
        old = rollout == 1 and question.id.endswith(".0")
        return Episode(question, rollout, (first, last) if old else (last,), (), StopReason.ANSWERED)

    async with Scheduler(
        questions_of, run, steps=range(4, 7), rollouts=2, in_flight=asyncio.Semaphore(9), max_policy_lag=1
    ) as all:
        groups = {step: await all.take(step) for step in range(4, 7)}
    stale = {
        step: [(e.question.id, e.rollout) for group in taken for e in group.episodes if e.stop is StopReason.STALE]
        for step, taken in groups.items()
    }
    assert stale == {4: [], 5: [("5.0", 1)], 6: [("6.0", 1)]}
    dropped = groups[6][0].episodes[1]
    assert not dropped.trainable
    assert dropped.infra_failures == 0
    assert dropped.detail == "drawn with weights 3 steps older than those it would train; allowed: 1"
    check_health(groups[6], max_infra_fraction=0.0)  # nobody outside is to blame


async def test_row_60_a_learner_that_dies_ends_every_episode_and_is_heard():
    rollouts = Rollouts(lambda step, question, rollout: 10**9 if step else 3)

    async def learn():
        async with Scheduler(
            questions_of, rollouts.run, steps=range(9), rollouts=2, in_flight=asyncio.Semaphore(4), max_policy_lag=3
        ) as scheduler:
            await scheduler.take(0)
            await turns(5)
            raise ZeroDivisionError("the learner")

    async with asyncio.timeout(5):
        with pytest.raises(ZeroDivisionError):
            await learn()
    assert len(rollouts.started) > 6
    assert rollouts.running == 0
    assert len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize("step_1", ["has ended", "still runs"])
async def test_row_60_a_scheduler_that_dies_is_heard_by_whoever_waits_for_it(step_1):
    rollouts = Rollouts(lambda step, question, rollout: 10**9 if step == 1 and step_1 == "still runs" else 3)
    asked = 0

    async def admit():
        nonlocal asked
        asked += 1
        if asked > 12:  # the first of step 2
            raise ZeroDivisionError("the gate")

    async with asyncio.timeout(5):
        async with Scheduler(
            questions_of,
            rollouts.run,
            steps=range(9),
            rollouts=2,
            in_flight=asyncio.Semaphore(100),
            max_policy_lag=1,
            admit=admit,
        ) as scheduler:
            await scheduler.take(0)
            await turns(20)
            if step_1 == "has ended":
                assert len(await scheduler.take(1)) == 3
            with pytest.raises(ZeroDivisionError, match="the gate"):
                await scheduler.take(1 if step_1 == "still runs" else 2)
    assert rollouts.running == 0


async def test_a_progress_bar_that_breaks_is_heard():
    def broken(episode):
        raise ZeroDivisionError("the bar")

    rollouts = Rollouts()
    with pytest.raises(ZeroDivisionError):
        async with Scheduler(
            questions_of, rollouts.run, steps=range(1), rollouts=2, in_flight=asyncio.Semaphore(4)
        ) as scheduler:
            await scheduler.take(0, on_episode=broken)
    assert rollouts.running == 0


async def test_a_gate_holds_starts_back_and_lets_the_running_ones_end():
    gate, waiting = asyncio.Event(), asyncio.Event()
    rollouts, asked = Rollouts(), 0

    async def admit():
        nonlocal asked
        asked += 1
        if asked > 2:
            waiting.set()
            await gate.wait()

    async with Scheduler(
        questions_of, rollouts.run, steps=range(1), rollouts=2, in_flight=asyncio.Semaphore(9), admit=admit
    ) as one:
        taking = asyncio.create_task(one.take(0))
        await waiting.wait()
        await turns(20)
        assert (len(rollouts.started), rollouts.running) == (2, 0)
        gate.set()
        groups = await taking
    assert sum(len(group.episodes) for group in groups) == 6


@pytest.mark.parametrize(("lag", "want"), [(0, [[0, 1], [2, 3], [4]]), (1, [[3, 4], [1, 2], [0]])])
async def test_a_step_is_taken_in_parts(lag, want):
    """Of the next questions without lag, so that the order is the same in every run; else of those that end first."""

    async def run(step, question, rollout):
        await turns(50 - 10 * int(question.id) + 3 * rollout)
        return Episode(question, rollout, (CALL,), (), StopReason.ANSWERED)

    async with Scheduler(
        lambda step: QUESTIONS, run, steps=range(2), rollouts=2, in_flight=asyncio.Semaphore(99), max_policy_lag=lag
    ) as scheduler:
        taken = [await scheduler.take(0, 2), await scheduler.take(0, 2), await scheduler.take(0)]
        assert sorted(group.row for group in await scheduler.take(1)) == [0, 1, 2, 3, 4]
    assert [[group.row for group in groups] for groups in taken] == want
    assert all([e.rollout for e in group.episodes] == [0, 1] for groups in taken for group in groups)
    assert all(group.question is QUESTIONS[group.row] for groups in taken for group in groups)


async def test_a_step_is_taken_once():
    rollouts = Rollouts()
    async with Scheduler(
        questions_of, rollouts.run, steps=range(1), rollouts=2, in_flight=asyncio.Semaphore(9)
    ) as scheduler:
        await scheduler.take(0)
        with pytest.raises(AssertionError, match="step 0 is not one of range.0, 1., or was taken before"):
            await scheduler.take(0)
