"""Metrics: the JSONL can be resumed, and the summary counts what it says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from dr_jax.metrics import MetricsLog, outcome, policy_lag, policy_tokens, read, rollout_summary, tokens
from dr_jax.records import Call, Episode, Failure, FailureKind, Finish, Question, Role, StopReason, ToolUse

QUESTION = Question("q", "?", ("a",))


def episode(reward: float, *, drawn: int = 3, failures=()) -> Episode:
    none = np.zeros(0, np.int32)
    output = np.zeros(drawn, np.int32)
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
    groups = [[episode(1.0, drawn=5), episode(0.0)], [episode(-1.0), episode(-1.0), outage]]
    got = rollout_summary([[outcome(e) for e in group] for group in groups])
    assert got["reward"] == -0.25
    assert got["score/f1"] == 0.25
    assert got["frac_reward_zero_std"] == 0.5
    assert got["completions/mean_length"] == 3.5
    assert got["completions/max_length"] == 5
    assert (got["episodes"], got["episodes/untrained"], got["infra_failures"]) == (5, 1, 1)
    assert (got["failures/timeout"], got["failures/status"]) == (1, 1)
    assert got["tools/web_search"] == 5
    assert got["stop/answered"] == 1


def test_calls_of_a_reader_are_counted_apart():
    one = episode(1.0, drawn=5)
    prompt, output = np.zeros(7, np.int32), np.zeros(4, np.int32)
    read = dataclasses.replace(
        one.calls[0], role=Role.READER, prompt=prompt, output=output, logps=np.zeros(4, np.float32)
    )
    last = dataclasses.replace(one.calls[0], prompt=np.zeros(30, np.int32))
    both = dataclasses.replace(one, calls=(*one.calls, read, read, last, read))
    assert (policy_tokens(both), tokens(both)) == (2 * 5, 30 + 5 + 3 * 11)
    got = rollout_summary([[outcome(both), outcome(episode(0.0))]])
    assert (got["reader/calls_mean"], got["reader/mean_length"]) == (1.5, 4.0)
    assert "reader/calls_mean" not in rollout_summary([[outcome(one)]])


def test_the_lag_of_an_episode_is_that_of_its_oldest_call_whoever_made_it():
    calls = [dataclasses.replace(episode(0.0).calls[0], version=version) for version in (5, 3, 6)]
    reader = dataclasses.replace(calls[0], role=Role.READER, version=1)
    mixed = dataclasses.replace(episode(0.0), calls=(*calls, reader))
    fresh = dataclasses.replace(episode(0.0), calls=(calls[2],))
    assert (policy_lag(mixed, 6), policy_lag(fresh, 6)) == (5, 0)
    assert policy_lag(dataclasses.replace(fresh, calls=()), 6) == 0
    got = rollout_summary([[outcome(mixed), outcome(fresh)]], step=6)
    assert (got["policy_lag/mean"], got["policy_lag/max"]) == (2.5, 5)


def test_an_empty_step_is_a_summary_too():
    assert math.isnan(rollout_summary([])["reward"])
