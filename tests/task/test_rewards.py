from __future__ import annotations

import pytest

from dr_jax.records import Question, StopReason
from dr_jax.task.answers import first_answer
from dr_jax.task.rewards import REWARDS, scores, well_formed

PARIS = Question("q", "Capital of France?", ("Paris",))


def reward(name, answer, response="", question=PARIS):
    return REWARDS[name](question, answer, response, StopReason.ANSWERED)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>x</think><answer>Paris</answer>", 1),
        ("<answer>Paris</answer>", 1),
        ("<think>x<answer>Paris</answer></think>", 1),
        ("<think>x<answer>Paris</answer>", -1),
        ("<think>x</think>Paris", -1),
        ("<think>x</think><answer>Lyon</answer>", 0),
        ("<think>x</think><answer>Lyon</answer><answer>Paris</answer>", 0),
        ("<think>x</think><answer></answer>", 0),
        ("<think>x</think><tool_call>{}</tool_call><think>y</think><answer>Paris</answer>", 1),
        ("<think>x</think><tool_call>{}<answer>Paris</answer>", -1),
        ("</think>x<think><answer>Paris</answer>", -1),
        ("<think>x</think><answer>paris</answer>", 1),
        # The reference reads tool output too: handed the whole transcript, so does this function.
        ("<think>x</think><tool_response>[<answer>Paris</answer>]</tool_response><answer>Lyon</answer>", 1),
        ("<think>x</think><tool_response>a stray <think></tool_response><answer>Paris</answer>", -1),
    ],
)
def test_deepresearcher_golden(response, expected):
    assert reward("deepresearcher", first_answer(response), response) == expected


def test_deepresearcher_is_set_f1_over_alternatives():
    question = Question("q", "Which bridge?", ("Ponte", "Rialto Bridge"))
    response = "<think></think><answer>The Rialto Bridge</answer>"
    assert reward("deepresearcher", "The Rialto Bridge", response, question) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("name", "answer", "expected"),
    [
        ("squad_f1", "Paris, France", 2 / 3),
        ("squad_f1", None, 0),
        ("em", "the Paris", 1),
        ("em", "Paris France", 0),
        ("em", None, 0),
        ("em", "", 0),
        ("cover_em", "Paris, France", 1),
        ("cover_em", None, 0),
    ],
)
def test_outcome_rewards(name, answer, expected):
    assert reward(name, answer) == pytest.approx(expected)


def test_a_gold_answer_that_normalises_to_nothing_grades_nothing():
    band = Question("q", "Which band?", ("The The",))
    assert scores(band, "Paris") == {"f1": 0, "squad_f1": 0, "em": 0, "cover_em": 0}


def test_scores_name_every_metric():
    assert scores(PARIS, "in Paris") == {
        "f1": pytest.approx(2 / 3), "squad_f1": pytest.approx(2 / 3), "em": 0, "cover_em": 1,
    }  # fmt: skip
    assert set(scores(PARIS, None).values()) == {0.0}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        ("<think></think><think></think>", True),
        ("<THINK></think>", True),
        ("<think><think></think>", False),
        ("<think></think></think><think>", False),
        ("<answer></answer", False),
    ],
)
def test_well_formed(text, expected):
    assert well_formed(text) is expected
