from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "bench_engine.py"
CASES = {"full", "cache2048", "half_stop", "group", "agentic_padded", "agentic_documented"}


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_our_side_of_every_case_runs_and_compiles_nothing():
    done = bench("--turns=1", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures) == CASES | {"compiles_after_warmup", "cpu", "hand_over"}
    assert figures["compiles_after_warmup"] == 0
    assert figures["hand_over"]["idle_ms"] > 0


@pytest.mark.parametrize(
    ("argument", "words"),
    [("--cases=full,empty", "--cases: unknown empty; allowed are full,"), ("--vs_tunix=/nowhere", "is no virtual env")],
)
def test_bad_arguments_are_one_line(argument, words):
    done = bench(argument)
    assert done.returncode == 2
    assert words in done.stderr
