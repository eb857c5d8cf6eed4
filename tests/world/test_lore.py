from __future__ import annotations

import subprocess
import sys

import pytest

from dr_jax.errors import ConfigError
from dr_jax.world import lore

DIGEST = """
import dataclasses, hashlib, json
from dr_jax.world import lore
print(hashlib.sha256(json.dumps(dataclasses.asdict(lore.make_world(0))).encode()).hexdigest())
"""


def _year(world, name, relation):
    return int(world.entities[name].facts[relation])


def test_size_and_names(world):
    assert {kind: len(world.of_kind(kind)) for kind in lore.RELATIONS} == {
        "film": 700,
        "person": 800,
        "city": 200,
        "company": 250,
        "award": 100,
    }
    assert len(world.entities) == 2050  # a name used twice would have been swallowed
    assert len({film.name for film in world.remakes} - set(world.entities)) == len(world.remakes) == 60
    assert all(name.isascii() for name in world.entities)


def test_every_fact_is_there_and_names_an_entity_of_the_right_kind(world):
    for entity in (*world.entities.values(), *world.remakes):
        assert set(entity.facts) == set(entity.relations)
        for name, relation in entity.relations.items():
            value = entity.facts[name]
            if relation.object == "year":
                assert 1000 < int(value) <= 2016
            elif not relation.ends:
                assert world.entities[value].kind == relation.object


def test_marriage_is_symmetric(world):
    for person in world.of_kind("person"):
        spouse = world.entities[person.facts["spouse"]]
        assert spouse.name != person.name
        assert spouse.facts["spouse"] == person.name
        assert abs(int(person.facts["birth year"]) - int(spouse.facts["birth year"])) <= 25


def test_dates_agree(world):
    for film in (*world.of_kind("film"), *world.remakes):
        year = int(film.facts["year"])
        for role in ("director", "composer"):
            assert 25 <= year - _year(world, film.facts[role], "birth year") <= 65
            assert world.entities[film.facts[role]].facts["profession"] == role
        assert _year(world, film.facts["studio"], "founding year") < year
    for company in world.of_kind("company"):
        founded = int(company.facts["founding year"])
        assert founded - _year(world, company.facts["founder"], "birth year") >= 20
        assert founded > _year(world, company.facts["headquarters"], "founding year")
    for person in world.of_kind("person"):
        assert _year(world, person.facts["employer"], "founding year") <= int(person.facts["birth year"]) + 55
    for award in world.of_kind("award"):
        assert int(award.facts["year"]) == _year(world, award.facts["first winner"], "year") + 1
        assert _year(world, award.facts["sponsor"], "founding year") < int(award.facts["year"])


def test_same_seed_same_world_in_another_process(world):
    run = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["d4a721512cff3fdc4c437318219128bab7af6fb53124cc08605fdbb3b61f5ff1"]
    assert lore.make_world(0) == world


def test_other_seed_other_world(world):
    other = lore.make_world(1)
    assert other.entities != world.entities
    assert len(other.entities) == 2050


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True, None])
def test_bad_seed(seed):
    with pytest.raises(ConfigError, match=r"world\.seed: got .*allowed"):
        lore.make_world(seed)
