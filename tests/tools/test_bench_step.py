from __future__ import annotations

import importlib.util
import json
import pathlib

import numpy as np
import pytest

PATH = pathlib.Path(__file__).parents[2] / "tools" / "bench_step.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_step", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_batch_is_the_same_every_time_and_ragged_where_asked(bench):
    full, ragged = bench.batch(4096, ragged=False), bench.batch(4096, ragged=True)
    assert full["mask"].all()
    np.testing.assert_array_equal(full["prompt"], bench.batch(4096, ragged=False)["prompt"])
    length_b = ragged["mask"].sum(1)
    assert length_b[0] == bench.ANSWER
    assert length_b.min() >= 16
    assert length_b.sum() < 0.6 * ragged["mask"].size
    assert (ragged["answer"][ragged["mask"] == 0] == 0).all()


def test_mistakes_are_one_line(bench, capsys, tmp_path):
    assert bench.main(["--cases=default,wide"]) == 2
    assert capsys.readouterr().err == "error: --cases: unknown 'wide'; allowed: default, vocab32k, ragged\n"
    assert bench.main([f"--vs_tunix={tmp_path}"]) == 2
    assert capsys.readouterr().err.startswith(f"error: --vs_tunix: no {tmp_path}/bin/python; make it: python3 -m venv")


def test_a_line_is_found_and_what_leaves_it_is_told(bench):
    straight = bench.line_through({2: 0.7, 4: 1.2, 8: 2.2, 16: 4.2})
    np.testing.assert_allclose([straight["row_s"], straight["start_s"]], [0.25, 0.2], rtol=1e-9)
    assert straight["worst_error"] < 1e-9
    assert bench.line_through({2: 4.0, 4: 16.0, 8: 64.0, 16: 256.0})["worst_error"] > 0.3  # grows with the square


@pytest.mark.slow
def test_our_side_prints_its_figures_and_packs_without_a_difference(bench, capsys):
    assert bench.main(["--cases=ragged", "--turns=1", "--json"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["ragged"].keys() == {"cpu_s", "memory_mb"}
    assert "packed_logp_diff" in table[0]
