"""The whole loop on the embedded world, small: resuming is exact, mistakes are one line, nothing is overwritten."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re

import numpy as np
import pytest

from dr_jax import metrics, train, workdirs
from dr_jax.model import hf
from dr_jax.model.config import ModelConfig
from dr_jax.rollout import journal
from dr_jax.run_config import resolve

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
SMALL = [
    "--config.steps=4",
    "--config.rollout.questions=2",
    "--config.rollout.rollouts=4",
    "--config.eval.questions=4",
    "--config.eval.every_steps=0",
    "--config.engine.slots=8",
    "--config.engine.pages=0",
    "--config.batch.rows=8",
    "--config.batch.micro_rows=4",
    "--config.checkpoint.every_steps=2",
]
# Clocks, memory; and the engine's last bits, which depend on who met in a batch.
TIMES = ("timing_s/", "perf/", "sampler/", "memory/", "loop/")


def run(workdir: pathlib.Path, *more: str) -> int:
    return train.main(["train", f"--config={QUICKSTART}", f"--workdir={workdir}", *SMALL, *more])


def rows(workdir: pathlib.Path):
    kept = metrics.read(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in kept]


def exported(workdir: pathlib.Path):
    export = workdir / "export"
    return hf.load(export, ModelConfig.from_hf(export), dtype="float32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("whole")
    assert run(workdir) == 0
    return workdir


def test_four_steps_are_two_steps_a_stop_and_two_more_bitwise(whole, tmp_path, capsys):
    assert run(tmp_path, "--stop_after=2") == 0
    assert "stopped after step 2 of 4" in capsys.readouterr().out
    assert not (tmp_path / "export").exists()
    assert run(tmp_path) == 0
    assert rows(tmp_path) == rows(whole)
    ours, theirs = exported(tmp_path), exported(whole)
    import jax

    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=["4 devices", "8 devices"])
def test_the_first_step_is_the_same_on_more_devices(mesh, whole, tmp_path):
    """Same questions, same tokens, same update: only the order of sums may differ."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    assert run(tmp_path, *sizes, "--stop_after=1") == 0
    sharded, alone = rows(tmp_path), rows(whole)[:2]
    assert [row.keys() for row in sharded] == [row.keys() for row in alone]
    for ours, theirs in zip(sharded, alone, strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def trained_questions(workdir: pathlib.Path):
    """The question of every episode of every step, in order."""
    return [[row["question_id"] for row in journal.read(path)] for path in sorted((workdir / "rollouts").iterdir())]


def test_with_lag_steps_overlap_and_a_stopped_run_goes_on_with_the_questions_it_has_not_trained(whole, tmp_path):
    lag = ("--config.rollout.max_policy_lag=1", "--config.grpo.tis_cap=2.0")
    assert run(tmp_path, *lag, "--stop_after=3") == 0
    assert run(tmp_path, *lag) == 0
    assert trained_questions(tmp_path) == trained_questions(whole)
    steps = metrics.read(tmp_path / "metrics.jsonl")[1:]
    # Steps 2 and 3 ran ahead; nothing of step 4 was kept over the stop, so it began anew with the weights of step 3.
    assert [row["policy_lag/max"] for row in steps] == [0, 1, 1, 0]
    assert [row["stop/stale"] for row in steps] == [0, 0, 0, 0]
    assert steps[0]["sampler/k3"] < 1e-6
    assert steps[2]["sampler/k3"] > 1e-6
    assert all(0 <= row["sampler/truncated_mean"] < 1 for row in steps)


def test_a_step_in_parts_is_the_same_step_and_resumes_exactly(whole, tmp_path):
    """Without lag its groups are learned in question order: the sums are the same in every run of so many parts."""
    parts = "--config.batch.parts=2"
    assert run(tmp_path / "whole", parts, "--stop_after=2") == 0
    for _ in range(2):
        assert run(tmp_path / "stopped", parts, "--stop_after=1") == 0
    assert rows(tmp_path / "stopped") == rows(tmp_path / "whole")
    for ours, theirs in zip(rows(tmp_path / "whole")[:2], rows(whole)[:2], strict=True):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert trained_questions(tmp_path / "whole") == trained_questions(whole)[:2]


def test_a_finished_run_leaves_all_it_promised(whole, capsys):
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["infra_failures"] == 0
    assert pathlib.Path(summary["plot"]).read_bytes().startswith(b"\x89PNG")
    assert (pathlib.Path(summary["export"]) / "model.safetensors").exists()
    assert len(list((whole / "rollouts").iterdir())) == 4
    assert [row["step"] for row in rows(whole)] == [0, 1, 2, 3, 4]
    assert run(whole) == 0
    out = capsys.readouterr().out
    assert "finished" in out
    assert json.loads(out.splitlines()[-1]) == summary


def test_training_changes_the_weights(whole):
    start = hf.load(train.assemble.CHECKPOINT, ModelConfig.from_hf(train.assemble.CHECKPOINT), dtype="float32")
    assert np.abs(np.asarray(exported(whole)["embed"]) - np.asarray(start["embed"])).max() > 0


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optim.lrr=1", "lrr"),
        ("--config.optim.lr=fast", "fast"),
        ("--config.mesh.tensor=8", "mesh.tensor: "),
        ("--config.model.path=/nowhere", "config.model.path: no Hugging Face checkpoint at /nowhere"),
        ("--config.web.provider=bing", "bing"),
        ("--config.web.provider=altavista", "altavista"),
        ("--config.agent.preset=mystery", "config.agent.preset: unknown 'mystery'; allowed: deepresearcher"),
        ("--config.questions.train=/nowhere.jsonl", "/nowhere.jsonl"),
        ("--config.optim.lr=0.0", "config.optim.lr: got 0.0"),
        ("extra", "unknown argument 'extra'"),
        ("--nonsense=1", "nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_and_nothing_is_written(tmp_path, capsys, argument, message, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "test")
    workdir = tmp_path / "run"
    assert run(workdir, argument) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") <= 2
    assert not (workdir / "checkpoints").exists() or not any((workdir / "checkpoints").iterdir())


def test_a_question_file_with_a_broken_line_is_named_with_its_line(tmp_path, capsys):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "a", "text": "Who?", "answers": ["x"]}\n{"id": "b", "text": \n')
    assert run(tmp_path / "run", f"--config.questions.train={path}") == 2
    assert "questions.jsonl:2" in capsys.readouterr().err


def test_another_config_is_refused_with_the_difference_and_nothing_is_overwritten(whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"}
    assert run(whole, "--config.optim.lr=0.5") == 2
    assert re.search(r"config\.optim\.lr: [\d.e-]+ -> 0\.5", capsys.readouterr().err)
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.name != ".lock"} == before


def test_a_missing_config_file_is_named(tmp_path, capsys):
    assert train.main(["train", "--config=configs/nowhere.py", f"--workdir={tmp_path}"]) == 2
    assert "no such file 'configs/nowhere.py'" in capsys.readouterr().err


def quickstart():
    spec = importlib.util.spec_from_file_location("quickstart", QUICKSTART)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_two_processes_cannot_train_in_one_workdir(tmp_path, capsys):
    lock = workdirs.claim(tmp_path, resolve(quickstart().to_dict()))
    try:
        assert train.main(["train", f"--config={QUICKSTART}", f"--workdir={tmp_path}"]) == 2
        assert "another process" in capsys.readouterr().err
    finally:
        lock.close()


def test_a_run_that_is_out_of_budget_halts_untrained_and_goes_on_when_the_budget_is_raised(tmp_path, capsys):
    assert run(tmp_path, "--stop_after=1") == 0
    calls = int(rows(tmp_path)[-1]["budget/run_calls"])
    assert calls > 0
    assert run(tmp_path, f"--config.budget.max_calls={calls + 1}") == 3
    assert f"budget.max_calls = {calls + 1} is reached" in capsys.readouterr().err
    assert rows(tmp_path)[-1]["step"] == 1
    assert run(tmp_path, "--stop_after=1") == 0
    assert rows(tmp_path)[-1]["budget/run_calls"] > calls + 1


def test_an_evaluation_that_is_out_of_budget_is_not_logged(tmp_path, capsys):
    assert run(tmp_path, "--config.budget.max_calls=1") == 3
    assert "budget.max_calls = 1 is reached" in capsys.readouterr().err
    assert rows(tmp_path) == []
    assert run(tmp_path, "--stop_after=1") == 0
    assert "eval/f1" in rows(tmp_path)[0]


def test_what_a_run_can_cost_is_said_before_it_spends_anything(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SERPER_API_KEY", "k")
    paid = ["--config.web.provider=serper", "--config.web.endpoint=http://127.0.0.1:9/search"]
    assert run(tmp_path, *paid) == 3
    assert "4 steps cost at most 0.86 USD; 0.00 USD are spent" in capsys.readouterr().out


def test_the_policy_reads_pages_and_its_reading_is_trained(tmp_path):
    reading = ["--config.web.reader=policy", "--config.reading.train=True", "--config.grpo.equal_groups=keep"]
    assert run(tmp_path, "--stop_after=1", *reading) == 0
    row = metrics.read(tmp_path / "metrics.jsonl")[-1]
    assert row["infra_failures"] == 0
    assert row["reader/calls_mean"] > 0
    assert row["sampler/logp_diff_max"] < 1e-3  # of the tokens of the reader's calls too


def test_a_provider_that_nothing_describes_is_named_before_anything_is_written(tmp_path, capsys):
    assert run(tmp_path / "run", "--config.web.provider=json") == 2
    assert "missing 2 required keyword-only arguments: 'query' and 'results'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
