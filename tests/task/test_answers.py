"""Golden values: each was obtained by running the function of the system that the metric is named after."""

from __future__ import annotations

import pytest

from dr_jax.task import answers

# prediction, gold: DeepResearcher F1, SQuAD F1, EM, substring EM, cover EM
TABLE = [
    ("The Beatles", "Beatles", 0.667, 1, 1, 1, 1),
    ("U.S.A.", "USA", 0, 1, 1, 1, 0),
    ("U.S. Army", "US Army", 0.4, 1, 1, 1, 0),
    ("Bong Joon-ho", "Bong Joon Ho", 1, 0.4, 0, 0, 1),
    ("New York New York", "New York", 1, 0.667, 0, 1, 1),
    ("yes, it is", "yes", 0.5, 0.5, 0, 1, 1),
    ("Paris, France", "Paris", 0.667, 0.667, 0, 1, 1),
    ("France Paris", "Paris France", 1, 1, 0, 0, 1),
    ("the", "a", 0, 0, 1, 1, 1),
    ("Catherine", "Cat", 0, 0, 0, 1, 0),
    ("Beyoncé", "Beyonce", 0, 0, 0, 0, 0),
    ("1,200", "1200", 0, 1, 1, 1, 0),
    ("20 March 1995", "March 20, 1995", 1, 1, 0, 0, 1),
]
METRICS = (answers.set_f1, answers.squad_f1, answers.exact_match, answers.sub_em, answers.cover_em)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row[0]}|{row[1]}")
def test_golden_table(row):
    prediction, gold, *expected = row
    assert [round(metric(prediction, gold), 3) for metric in METRICS] == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "expected"),
    [
        ("The Rialto Bridge", "Rialto Bridge", 0.8),
        ("new new york", "new york", 1.0),
        ("", "new york", 0.0),
        ("U.S.", "US", 0.0),
        ("1,200", "1200", 0.0),
        ("Yes, it is", "yes", 0.5),
    ],
)
def test_set_f1_measured_on_the_reference(prediction, gold, expected):
    assert answers.set_f1(prediction, gold) == pytest.approx(expected)


def test_best_takes_the_kindest_alternative():
    assert answers.best(answers.exact_match, "Paris", ("Lyon", "the Paris")) == 1.0
    assert answers.best(answers.exact_match, "Paris", ()) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>Lyon</answer><answer>Paris</answer>", "Lyon"),
        ("<answer>\nNew\nYork\n</answer>", "New\nYork"),
        ("<Answer>Paris</ANSWER>", "Paris"),
        ("<answer></answer>", ""),
        ("<answer>Paris", None),
        ("</answer>Paris<answer>", None),
        ("Paris", None),
    ],
)
def test_first_answer(text, expected):
    assert answers.first_answer(text) == expected


@pytest.mark.parametrize("text", ["", " ", "!!!", "a", "\n", "\x00", "’"])
def test_metrics_bear_texts_that_normalise_to_nothing(text):
    for metric in METRICS:
        assert 0 <= metric(text, text) <= 1
        assert metric(text, "Paris") == 0
