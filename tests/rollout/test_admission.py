from __future__ import annotations

import asyncio
import logging

import psutil
import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import Episode, Question, StopReason
from dr_jax.rollout import scheduler
from dr_jax.rollout.admission import Admission, memory_bytes, resident_bytes

QUESTIONS = [Question(str(i), "?", ("a",)) for i in range(8)]


def test_what_the_system_says_of_this_process():
    before, block = resident_bytes(), bytearray(64 << 20)
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])  # touch every page
    assert abs(resident_bytes() - psutil.Process().memory_info().rss) < 16 << 20
    assert resident_bytes() - before > 32 << 20
    assert resident_bytes() < memory_bytes() <= psutil.virtual_memory().total


async def test_above_the_watermark_nothing_starts_and_below_it_everything_does(caplog):
    """The real scheduler; the memory is what this test says it is."""
    held, started, go_on = 99, [], asyncio.Event()
    gate = Admission(100, held=lambda: held, look_s=0.001)

    async def run_episode(question, rollout):
        nonlocal held
        started.append(question.id)
        if len(started) == 3:
            held = 100
        await go_on.wait()
        return Episode(question, rollout, (), (), StopReason.ANSWERED)

    async def turns():
        for _ in range(50):
            await asyncio.sleep(0.001)

    rolling = asyncio.create_task(
        scheduler.run_groups(
            QUESTIONS, rollouts=1, run_episode=run_episode, in_flight=asyncio.Semaphore(8), admit=gate.wait
        )
    )
    with caplog.at_level(logging.WARNING):
        await turns()
        assert started == ["0", "1", "2"]
        held = 96  # not yet 5% below
        await turns()
        assert len(started) == 3
        held = 94
        go_on.set()
        async with asyncio.timeout(30):
            assert len(await rolling) == 8
    assert len([record for record in caplog.records if "no episode starts" in record.message]) == 1
    figures = gate.metrics()
    assert figures["memory/resident_bytes"] == 94.0
    assert figures["memory/held_back_s"] > 0
    assert gate.metrics() == figures  # it does not run on


async def test_memory_that_never_comes_down_slows_a_run_and_does_not_hang_it():
    gate = Admission(100, patience_s=0.002, held=lambda: 500, look_s=0.001)

    async def run_episode(question, rollout):
        return Episode(question, rollout, (), (), StopReason.ANSWERED)

    async with asyncio.timeout(30):
        groups = await scheduler.run_groups(
            QUESTIONS, rollouts=2, run_episode=run_episode, in_flight=asyncio.Semaphore(8), admit=gate.wait
        )
    assert len(groups) == 8


async def test_who_is_cancelled_while_waiting_keeps_nobody_out():
    held = 500
    gate = Admission(100, held=lambda: held, look_s=0.001)
    waiting = [asyncio.create_task(gate.wait()) for _ in range(3)]
    await asyncio.sleep(0.01)
    waiting[0].cancel()
    held = 5
    async with asyncio.timeout(30):
        await asyncio.gather(*waiting[1:])
    assert waiting[0].cancelled()


def test_a_watermark_that_leaves_no_room():
    with pytest.raises(ConfigError, match="admission: 0 bytes"):
        Admission(0)
