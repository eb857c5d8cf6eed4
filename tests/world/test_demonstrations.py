"""Demonstrations follow the facts when they are careful, and go wrong in the named ways when they are not."""

from __future__ import annotations

import json
import random
import re

import pytest

from dr_jax.world import lore, questions
from dr_jax.world.demonstrations import CAREFUL, Authors, Habits, turns
from dr_jax.world.pages import url
from dr_jax.world.questions import Chain


@pytest.fixture(scope="module")
def world():
    return lore.make_world(0)


def answer(text: str) -> str:
    return re.search(r"<answer> (.*)</answer><\|im_end\|>$", text)[1]


def calls(written):
    found = [re.search(r"<tool_call>\n(.*)\n</tool_call><\|im_end\|>$", text) for text in written]
    return [json.loads(match[1]) for match in found if match]


def test_a_careful_author_reads_what_must_be_read_and_answers_right(world):
    for hops in (1, 2, 3, 4):
        for chain in questions.sample_chains(world, "train", 0, 20, {hops: 1.0}):
            written = turns(world, chain, CAREFUL, random.Random(0))
            assert answer(written[-1]) == chain.entities[-1]
            expected = []
            for subject, relation in zip(chain.entities, chain.relations, strict=False):
                expected.append(("web_search", {"query": [subject]}))
                if not world.entities[subject].relations[relation].lead:
                    expected.append(("browse_webpage", {"url_list": [url(subject)]}))
            assert [(call["name"], call["arguments"]) for call in calls(written)] == expected


def film_chain(world) -> Chain:
    film = world.of_kind("film")[0]
    director = world.entities[film.facts["director"]]
    return Chain((film.name, director.name, director.facts["spouse"]), ("director", "spouse"))


def test_each_habit_ends_in_its_own_wrong_answer(world):
    chain, rng = film_chain(world), random.Random(0)
    film, director, spouse = chain.entities
    guessed = turns(world, chain, Habits(guess=1, skim=0, stop=0), rng)
    assert len(guessed) == 1
    assert answer(guessed[0]) != spouse
    stopped = turns(world, chain, Habits(guess=0, skim=0, stop=1), rng)
    assert (len(stopped), answer(stopped[-1])) == (2, director)
    skimmed = turns(world, chain, Habits(guess=0, skim=1, stop=0), rng)
    assert len(skimmed) == 3
    assert answer(skimmed[-1]) in world.entities[director].facts.values()
    assert answer(skimmed[-1]) != spouse


def test_authors_are_drawn_from_the_seed_alone():
    careless = Habits(guess=0.5, skim=0.5, stop=0.5)
    authors = Authors(careful_share=0.2, others=careless)
    drawn = [authors.draw(random.Random(i)) for i in range(500)]
    assert drawn == [authors.draw(random.Random(i)) for i in range(500)]
    assert 60 < drawn.count(CAREFUL) < 140
    assert set(drawn) == {CAREFUL, careless}
