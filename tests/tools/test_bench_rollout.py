from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "bench_rollout.py"


@pytest.mark.slow
def test_every_figure_is_measured_and_no_episode_is_lost(tmp_path):
    plot = tmp_path / "busy.png"
    sizes = ["--questions", "16", "--lags", "0", "1", "--parts", "1", "--episodes", "32", "--plot", str(plot)]
    output = subprocess.run(
        [sys.executable, str(TOOL), "--json", *sizes], capture_output=True, text=True, check=True
    ).stdout
    figures = json.loads(output.splitlines()[-1])
    assert set(figures) == {"of", "busy_fraction", "speedup_vs_lockstep", "load", "runs"}
    assert set(figures["load"]) >= {"episodes", "seconds", "rss_mb", "lost", "lag_p99_ms"}
    assert (figures["load"]["episodes"], figures["load"]["lost"]) == (32, 0)
    assert list(figures["runs"]) == ["lock-step", "lag 0, 1 part", "lag 1, 1 part"]
    assert 0 < figures["busy_fraction"] <= 1
    assert figures["speedup_vs_lockstep"] > 1
    assert plot.read_bytes().startswith(b"\x89PNG")
