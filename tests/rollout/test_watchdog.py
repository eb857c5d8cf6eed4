from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest

from dr_jax.errors import ConfigError
from dr_jax.rollout.watchdog import Watchdog


def the_culprit(seconds):
    time.sleep(seconds)


async def test_a_loop_that_stands_still_is_named_by_its_stack(caplog):
    with caplog.at_level(logging.ERROR):
        async with Watchdog(limit_s=0.2) as watchdog:
            the_culprit(0.6)
            while not watchdog.metrics()["loop/stops"]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            figures = watchdog.metrics()
    (record,) = caplog.records
    assert "the event loop stands still" in record.message
    assert "the_culprit" in record.message
    assert "time.sleep(seconds)" in record.message
    assert figures["loop/stops"] == 1.0
    assert 0.4 < figures["loop/longest_stop_s"] < 60


async def test_a_loop_that_turns_is_not(caplog):
    with caplog.at_level(logging.ERROR):
        async with Watchdog(limit_s=5.0) as watchdog:
            await asyncio.sleep(0.05)
    assert watchdog.metrics() == {"loop/stops": 0.0, "loop/longest_stop_s": 0.0}
    assert caplog.records == []
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_loop_that_is_closed_ends_the_watch():
    loop = asyncio.new_event_loop()
    watchdog = Watchdog(limit_s=0.1)
    loop.run_until_complete(watchdog.__aenter__())
    loop.close()
    watchdog._thread.join(30)
    assert not watchdog._thread.is_alive()


def test_a_limit_that_is_none():
    with pytest.raises(ConfigError, match="watchdog: 0 s"):
        Watchdog(limit_s=0)
