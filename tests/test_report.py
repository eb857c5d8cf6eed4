"""What a person sees of a run."""

from __future__ import annotations

import json

from dr_jax import report


def test_table_aligns_names_left_and_values_right():
    assert report.table(("", "before", "after"), [("f1", 0.25, 0.5), ("tool_calls", 10.0, 2)]) == (
        "            before  after\n"
        "-------------------------\n"
        "f1           0.250  0.500\n"
        "tool_calls  10.000      2"
    )  # fmt: skip


def test_progress_counts_from_where_a_resumed_run_stands(capsys):
    lines = report.Progress(steps=12, done=9)
    values = {
        "reward": 0.5, "score/f1": 0.6, "tools/calls_mean": 2.5, "completions/mean_length": 80.0,
        "perf/tokens_per_s": 12345.0, "timing_s/step": 3.0,
    }  # fmt: skip
    lines.step(values)
    out = capsys.readouterr().out
    assert out.startswith("step 10/12  reward +0.500  F1 0.600  calls 2.50  length 80  12,345 tokens/s  3.0 s  left ")


def test_plot_draws_what_the_metrics_hold(tmp_path):
    rows = [
        {"step": 0, "eval/f1": 0.2},
        {"step": 1, "reward": 0.1, "tools/calls_mean": 1.0},
        {"step": 2, "reward": None},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert report.plot(tmp_path).read_bytes().startswith(b"\x89PNG")
