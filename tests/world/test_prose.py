from __future__ import annotations

import random
import re

from dr_jax.world import lore, prose

KEY_WORDS = {word for rows in lore.RELATIONS.values() for relation in rows for word in relation.split()}


def test_every_statement_has_subject_key_word_and_object(world):
    for entity in (*world.entities.values(), *world.remakes):
        for relation, value in entity.facts.items():
            sentence = prose.statement(entity, relation)
            assert entity.name in sentence
            assert value in sentence
            key_word = re.search(rf"\b{relation}\b", sentence)
            assert entity.relations[relation].lead or key_word.end() < sentence.rindex(value)


def test_lead_states_the_lead_relations_and_no_other(world):
    for entity in world.entities.values():
        sentence = prose.lead(entity)
        assert len(sentence) <= 110  # so that a snippet shows it whole
        for relation in entity.relations.values():
            stated = entity.facts[relation.name] in sentence
            assert stated == relation.lead


def test_phrasings_vary(world):
    films = world.of_kind("film")
    starts = {prose.statement(film, "composer").replace(film.name, "S").split()[0] for film in films}
    assert {"The", "S"} < starts


def test_filler_states_nothing(world):
    rng = random.Random(0)
    for kind in lore.RELATIONS:
        entity = world.of_kind(kind)[0]
        for _ in range(50):
            for sentence in prose.fillers(entity, 6, rng):
                rest = sentence.replace(entity.name, "")
                assert not KEY_WORDS & set(re.findall(r"[a-z]+", rest.lower()))
                assert "{" not in sentence
                assert sentence[0].isupper()
                assert not re.search(r"\b[Aa] [aeiou]", sentence)
