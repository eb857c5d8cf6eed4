"""The simulated pod: its episodes the same for every way of scheduling, its clock honest."""

from __future__ import annotations

import asyncio
import importlib
import pathlib

import numpy as np
import pytest

from dr_jax.testing import run_in_no_time

TOOLS = pathlib.Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def sim():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        yield importlib.import_module("sim_rollout")


def test_the_load_is_what_it_says_and_the_same_whoever_asks(sim):
    load = sim.Load()
    scripts = [sim.script(load, f"0/{i}", rollout) for i in range(128) for rollout in range(4)]
    assert scripts[5] == sim.script(load, "0/1", 1)
    calls = np.array([len(turns) - 1 for turns in scripts])
    waits = np.array([turn.web_s for turns in scripts for turn in turns[:-1]])
    assert calls.min() >= 1
    assert calls.max() <= 9
    assert calls.mean() == pytest.approx(3.0, abs=0.25)
    assert np.median(waits) == pytest.approx(1.5, rel=0.15)
    assert (waits > 20).mean() == pytest.approx(0.06, abs=0.02)  # 5% slow ones, 1% that fail
    assert waits.max() == load.web_max_s
    assert all(turns[-1].observation_tokens == 0 for turns in scripts)


def test_an_engine_takes_as_long_as_its_programs_and_finishes_everything(sim):
    costs, chips = sim.Costs("v5p:2x2x1"), sim.Chips

    async def main(sequences, slots):
        mine = chips()
        engine = sim.SimulatedEngine(costs, mine, slots=slots)
        serving = asyncio.create_task(engine.serve())
        versions = await asyncio.gather(*(engine.generate(kept, new, out) for kept, new, out in sequences))
        serving.cancel()
        return versions, asyncio.get_running_loop().time(), sum(end_s - start_s for start_s, end_s, _ in mine.busy)

    versions, end_s, busy_s = run_in_no_time(main([(0, 1000, 16)], slots=4))
    assert versions == [0]
    assert end_s == busy_s == pytest.approx(costs.prefill_s(1000, 500_000) + 16 * costs.decode_s(1000 + 8))
    many = [(0, 5000, 40), (3000, 10, 1), (100, 100, 300)] * 5
    versions, end_s, busy_s = run_in_no_time(main(many, slots=4))
    assert len(versions) == 15
    assert end_s == pytest.approx(busy_s)


def test_a_report_by_hand(sim):
    report = sim.Report(lag=0, steps=[(1.0, 2.0), (5.0, 6.0), (9.0, 10.0)])
    report.busy = [[(0.0, 4.0, "engine"), (5.0, 6.0, "learner")], [(9.0, 12.0, "learner")]]
    assert report.step_s() == 4.0
    assert report.busy_fraction() == pytest.approx((2 + 1 + 1) / (2 * 8))
    assert report.busy_fraction("engine") == pytest.approx(2 / 16)
    first, *_ = report.busy_over_time(5.0)
    assert first == (0.0, pytest.approx(4 / 10), 0.0)


def test_the_schedule_changes_when_episodes_run_and_not_which(sim):
    load, costs = sim.Load(questions=8, rollouts=4), sim.Costs("v5p:2x2x2")  # two hosts

    def run(train, lag=0):
        async def main():
            return await sim.Pod(costs, load, slots=4, lag=lag).run(train)

        return run_in_no_time(main())

    marching = run(sim.lock_step)
    reports = [run(sim.scheduled(in_flight=16, max_policy_lag=lag), lag) for lag in (0, 1)]
    parts = run(sim.scheduled(in_flight=16, max_policy_lag=1, parts=2), 1)
    assert [len(report.steps) for report in (marching, *reports, parts)] == [9, 9, 11, 11]
    assert all(set(report.stops) == {"answered"} for report in (marching, *reports, parts))
    assert parts.stops == reports[1].stops
    assert reports[0].stops["answered"] == 9 * 8 * 4
    slow_s, step_s = marching.step_s(), [report.step_s() for report in reports]
    assert slow_s > step_s[0] > step_s[1]
    assert run(sim.scheduled(in_flight=16, max_policy_lag=1), 1).steps == reports[1].steps
