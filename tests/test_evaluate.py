"""Evaluation scores, worked by hand."""

from __future__ import annotations

import math

import numpy as np

from dr_jax import evaluate
from dr_jax.metrics import outcome
from dr_jax.records import Call, Episode, Failure, FailureKind, Finish, Question, Role, StopReason, ToolUse

NONE = np.zeros(0, np.int32)
CALL = Call(0, None, Role.POLICY, NONE, NONE.astype(np.uint8), NONE, NONE.astype(np.float32), Finish.STOP, 0, 0.0, 0.0)


def episode(f1: float, *, hops: int, failures=()) -> Episode:
    uses = (ToolUse("web_search", {}, tuple(failures), 0.1, ""),)
    question = Question("q", "?", ("a",), source="world", hops=hops)
    return Episode(question, 0, (CALL,), uses, StopReason.ANSWERED, answer="a", scores={"f1": f1, "em": float(f1 == 1)})


def test_means_leave_out_what_an_outage_touched_and_count_it():
    down = episode(0.0, hops=1, failures=[Failure(FailureKind.PROVIDER_DOWN)])
    got = evaluate.scores([*map(outcome, (episode(1.0, hops=1), episode(0.5, hops=2), down))])
    assert (got["f1"], got["em"], got["infra_failures"], got["answered"]) == (0.75, 0.5, 1, 1)
    assert 0.5 <= got["f1_low"] <= 0.75 <= got["f1_high"] <= 1
    assert evaluate.by_source([episode(1.0, hops=1), episode(0.5, hops=2), down]) == {
        "1-hop": 1.0, "2-hop": 0.5, "world": 0.75,
    }  # fmt: skip


def test_a_total_outage_has_no_score():
    down = episode(0.0, hops=1, failures=[Failure(FailureKind.PROVIDER_DOWN)])
    assert math.isnan(evaluate.scores([outcome(down)])["f1"])
