"""Metrics: the JSONL can be resumed, and the summary counts what it says."""

from __future__ import annotations

import math

import numpy as np

from dr_jax.metrics import MetricsLog, read, rollout_summary
from dr_jax.records import Call, Episode, Failure, FailureKind, Finish, Question, Role, StopReason, ToolUse

QUESTION = Question("q", "?", ("a",))


def episode(reward: float, *, tokens: int = 3, failures=()) -> Episode:
    none = np.zeros(0, np.int32)
    output = np.zeros(tokens, np.int32)
    call = Call(0, None, Role.POLICY, none, none, output, output, Finish.STOP, 0, 0.0, 0.0)
    uses = (ToolUse("web_search", {}, tuple(failures), 0.1, ""),)
    return Episode(QUESTION, 0, (call,), uses, StopReason.ANSWERED, reward=reward, scores={"f1": max(reward, 0)})


def test_a_resumed_log_drops_later_lines_and_a_line_cut_by_a_crash(tmp_path):
    log = MetricsLog(tmp_path, last_step=0)
    for step in (1, 2, 3):
        log.write(step, {"loss": step / 10, "bad": math.nan})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    log = MetricsLog(tmp_path, last_step=2)
    log.write(3, {"loss": 9.0})
    log.close()
    assert read(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.1, "bad": None},
        {"step": 2, "loss": 0.2, "bad": None},
        {"step": 3, "loss": 9.0},
    ]


def test_summary_means_cover_trainable_episodes_only():
    outage = episode(math.nan, failures=[Failure(FailureKind.TIMEOUT), Failure(FailureKind.STATUS, status=404)])
    groups = [[episode(1.0, tokens=5), episode(0.0)], [episode(-1.0), episode(-1.0), outage]]
    got = rollout_summary(groups)
    assert got["reward"] == -0.25
    assert got["score/f1"] == 0.25
    assert got["frac_reward_zero_std"] == 0.5
    assert got["completions/mean_length"] == 3.5
    assert got["completions/max_length"] == 5
    assert (got["episodes"], got["episodes/untrained"], got["infra_failures"]) == (5, 1, 1)
    assert (got["failures/timeout"], got["failures/status"]) == (1, 1)
    assert got["tools/web_search"] == 5
    assert got["stop/answered"] == 1


def test_an_empty_step_is_a_summary_too():
    assert math.isnan(rollout_summary([])["reward"])
