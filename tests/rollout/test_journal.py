"""The journal can be read back, and a repeated step replaces its own file."""

from __future__ import annotations

from dr_jax.records import Episode, Failure, FailureKind, Question, StopReason, ToolUse
from dr_jax.rollout import journal

QUESTION = Question("q1", "Who?", ("Ada",))
USE = ToolUse("web_search", {"query": ["x"]}, (Failure(FailureKind.TIMEOUT),), 0.25, "[]")


def test_round_trip_and_replacement(tmp_path):
    first = Episode(QUESTION, 0, (), (USE,), StopReason.ANSWERED, answer="Ada \ud800", reward=1.0, scores={"f1": 1.0})
    unscored = Episode(QUESTION, 1, (), (), StopReason.INFRASTRUCTURE)
    path = journal.write(tmp_path, 3, [first, unscored])
    rows = journal.read(path)
    assert [row["reward"] for row in rows] == [1.0, None]
    assert rows[0]["tools"][0]["failures"] == ["timeout"]
    assert rows[0]["answer"] == "Ada \ud800"
    assert journal.write(tmp_path, 3, [unscored]) == path
    assert len(journal.read(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step_000003.jsonl.gz"]
