"""SIGTERM: work that waits for the world is left at once, and a second one ends the process."""

from __future__ import annotations

import asyncio
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dr_jax import preemption
from dr_jax.preemption import Preempted

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
NOTICED_S = 5.0  # row 68 of the fault matrix
START_S = 300.0  # what a busy machine may take to get there


async def test_row_68_what_waits_is_left_at_once():
    async with preemption.listening() as present:
        assert await present.unless(asyncio.sleep(0, "done")) == "done"
        forever = asyncio.Event()
        left = asyncio.create_task(present.unless(forever.wait()))
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted):
            await asyncio.wait_for(left, NOTICED_S)
        with pytest.raises(Preempted):  # what comes after it does not begin in earnest
            await present.unless(forever.wait())


async def test_work_that_fails_raises_as_it_is():
    async def fail():
        raise ZeroDivisionError("theirs")

    async with preemption.listening() as present:
        with pytest.raises(ZeroDivisionError, match="theirs"):
            await present.unless(fail())


async def test_afterwards_sigterm_is_what_it_was():
    def handler(*_):
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        async with preemption.listening():
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


STUBBORN = """
import asyncio
from dr_jax import preemption

async def main():
    async with preemption.listening():
        print("listening", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_a_second_sigterm_ends_the_process():
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGTERM)
        while process.poll() is None:  # the first one may not have been taken yet
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_a_run_that_is_told_to_go_keeps_what_it_learned(tmp_path):
    run = tmp_path / "run"
    sizes = ("rollout.questions=4", "rollout.rollouts=4", "eval.questions=4", "eval.every_steps=0", "engine.slots=16")
    settings = (*sizes, "steps=1000", "checkpoint.every_steps=500", "batch.rows=16", "batch.micro_rows=8")
    options = [f"--config.{setting}" for setting in settings]
    command = [sys.executable, "-m", "dr_jax.train", f"--config={QUICKSTART}", f"--workdir={run}", *options]
    log = tmp_path / "log"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT) as process:
        deadline_s = time.monotonic() + START_S
        while "step    2/1000" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(START_S) == 0
    (said,) = (line for line in log.read_text().splitlines() if line.startswith("stopped after step "))
    step = int(said.split()[3])
    assert [path.name for path in (run / "checkpoints").iterdir()] == [str(step)]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step
