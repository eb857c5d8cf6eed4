from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

TOOL = pathlib.Path(__file__).parents[2] / "tools" / "bench_web.py"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_every_figure_is_measured_and_no_denied_address_is_reached():
    command = [sys.executable, str(TOOL), "--json", "--pages", "110", "--soak_fetches", "1000"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(output.splitlines()[-1])
    assert figures.pop("parse")["dense_elements"] > 900  # and those of real pages, where they are installed
    assert {name: set(value) if isinstance(value, dict) else set() for name, value in figures.items()} == {
        "guarded_vs_raw": set(),
        "guarded_vs_raw_tls": set(),
        "parse_pages_per_s_core": set(),
        "fetch_and_parse": {"pages_per_s"},
        "in_flight_1024": {"pages_per_s", "rss_mb", "lag_p99_ms"},
        "hostile": {"healthy_ok", "p99_ratio", "rss_mb", "lag_max_ms", "denied_reached"},
        "observation": {"encode_p99_ms", "encode_median_ms"},
        "cache": {"hits_per_s", "writes_per_s"},
        "soak": {"rss_mb_per_10k", "fds", "tasks"},
    }
    assert figures["hostile"]["healthy_ok"] == 1.0
    assert figures["hostile"]["denied_reached"] == 0
    assert figures["soak"]["fds"] == figures["soak"]["tasks"] == 0
