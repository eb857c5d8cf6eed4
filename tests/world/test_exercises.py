"""Exercises can be done by reading, and only by reading."""

from __future__ import annotations

import random
import re

import pytest

from dr_jax.world import lore
from dr_jax.world.exercises import SUBJECTS, exercise


@pytest.fixture(scope="module")
def world():
    return lore.make_world(0)


def asked(prompt: str) -> tuple[str, str]:
    match = re.fullmatch(r" need (.+)'s (.+)\n the \2 is", prompt)
    return match[1], match[2]


def test_each_object_is_stated_beside_its_subject_and_key_word(world):
    for seed in range(50):
        observations, stated = exercise(world, random.Random(seed))
        for prompt, object_ in stated:
            subject, relation = asked(prompt)
            sentences = [text for text in re.split(r"(?<=\.)[ ']", " ".join(observations)) if subject in text]
            assert any(relation in text and object_ in text for text in sentences), (prompt, object_)


def test_every_subject_is_asked_about_and_nothing_twice(world):
    observations, stated = exercise(world, random.Random(0))
    questions = [asked(prompt) for prompt, _ in stated]
    assert len({subject for subject, _ in questions}) == SUBJECTS
    assert len(set(questions)) == len(questions) >= 2 * SUBJECTS
    assert 3 <= len(observations) <= SUBJECTS


def test_the_facts_of_the_world_are_of_no_help(world):
    """Chance makes some dealt objects true; whoever has the world by heart mostly gets it wrong."""
    right = total = 0
    for seed in range(100):
        for prompt, object_ in exercise(world, random.Random(seed))[1]:
            subject, relation = asked(prompt)
            right += world.entities[subject].facts[relation] == object_
            total += 1
    assert right < 0.1 * total


def test_the_same_seed_gives_the_same_exercise(world):
    assert exercise(world, random.Random(3)) == exercise(world, random.Random(3))
