"""The scheduler: groups stay whole and in order, the bound holds, one failure stays one failure."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dr_jax.errors import RolloutHalted
from dr_jax.records import Call, Episode, Failure, FailureKind, Finish, Question, Role, StopReason, ToolUse
from dr_jax.rollout.scheduler import check_health, run_groups

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
    groups = await run_groups(QUESTIONS, rollouts=3, run_episode=run, max_in_flight=100, on_episode=seen.append)
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
        await turns(3)
        running -= 1
        return Episode(question, rollout, (CALL,), (), StopReason.ANSWERED)

    await run_groups(QUESTIONS, rollouts=4, run_episode=run, max_in_flight=7)
    assert peak == 7


async def test_a_defect_in_one_episode_is_counted_and_the_others_go_on():
    async def run(question, rollout):
        if (question.id, rollout) == ("2", 1):
            raise ZeroDivisionError("a defect")
        return Episode(question, rollout, (CALL,), (), StopReason.ANSWERED)

    groups = await run_groups(QUESTIONS, rollouts=2, run_episode=run, max_in_flight=3)
    failed = [e for group in groups for e in group.episodes if not e.trainable]
    assert [(e.question.id, e.rollout, e.stop, e.detail) for e in failed] == [
        ("2", 1, StopReason.INFRASTRUCTURE, "ZeroDivisionError: a defect")
    ]


async def test_a_defect_that_hits_every_episode_is_logged_once(caplog):
    async def run(question, rollout):
        raise ZeroDivisionError("a defect")

    groups = await run_groups(QUESTIONS, rollouts=4, run_episode=run, max_in_flight=3)
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

    task = asyncio.create_task(run_groups(QUESTIONS, rollouts=2, run_episode=run, max_in_flight=4))
    await turns(5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert started == ended == 4


async def test_a_step_with_too_many_outside_failures_is_not_trained_on():
    use = ToolUse("web_search", {}, (Failure(FailureKind.QUOTA_EXHAUSTED),), 0.1, "")

    async def run(question, rollout):
        return Episode(question, rollout, (CALL,), (use,) if int(question.id) < 2 else (), StopReason.ANSWERED)

    groups = await run_groups(QUESTIONS, rollouts=1, run_episode=run, max_in_flight=9)
    check_health(groups, max_infra_fraction=0.4)
    with pytest.raises(RolloutHalted, match="2 of 5.*quota_exhausted"):
        check_health(groups, max_infra_fraction=0.39)
