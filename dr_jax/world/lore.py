"""The facts of the world: who made what, where and when. A pure function of the seed.

Every relation is functional (one object per subject), so a question has exactly one answer. Dates agree with each
other: nobody directs before they are 25, founders are grown up, a studio is older than its films.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping

from dr_jax.errors import ConfigError
from dr_jax.world import names

COUNTS = {"person": 800, "film": 700, "city": 200, "company": 250, "award": 100}
NUM_DIRECTORS, NUM_COMPOSERS, NUM_REMAKES = 150, 120, 60

Facts = dict[str, dict[str, str]]  # name -> relation -> object, while the world is being made


@dataclasses.dataclass(frozen=True)
class Relation:
    """What one kind of entity is to another entity, or to a literal."""

    name: str  # the key word: every sentence that states the fact contains it
    object: str  # a kind of entity, or "year", "profession", "region", "industry"
    lead: bool  # stated in the page's first sentence; otherwise only in the body

    @property
    def ends(self) -> bool:
        """True where the object is a literal, so that nothing can be asked of it."""
        return self.object not in RELATIONS


def _relations(*rows: tuple[str, str, bool]) -> dict[str, Relation]:
    return {name: Relation(name, object_, lead) for name, object_, lead in rows}


RELATIONS: Mapping[str, Mapping[str, Relation]] = {
    "film": _relations(
        ("year", "year", True),
        ("director", "person", True),
        ("composer", "person", False),
        ("studio", "company", False),
        ("location", "city", False),
    ),
    "person": _relations(
        ("profession", "profession", True),
        ("birthplace", "city", True),
        ("birth year", "year", False),
        ("employer", "company", False),
        ("spouse", "person", False),
    ),
    "city": _relations(
        ("region", "region", True),
        ("mayor", "person", True),
        ("patron", "company", False),
        ("founding year", "year", False),
    ),
    "company": _relations(
        ("industry", "industry", True),
        ("headquarters", "city", True),
        ("founder", "person", False),
        ("founding year", "year", False),
    ),
    "award": _relations(
        ("sponsor", "company", True),
        ("year", "year", True),
        ("first winner", "film", False),
    ),
}


@dataclasses.dataclass(frozen=True)
class Entity:
    """One subject of the encyclopedia. `facts` has every relation of its kind, as text."""

    kind: str
    name: str
    facts: Mapping[str, str]

    @property
    def relations(self) -> Mapping[str, Relation]:
        """What can be asked of it, by key word."""
        return RELATIONS[self.kind]


@dataclasses.dataclass(frozen=True)
class World:
    """Everything that is true. `remakes` are near-duplicates of films: they have pages; no question is about them."""

    seed: int
    entities: Mapping[str, Entity]
    remakes: tuple[Entity, ...]

    def of_kind(self, kind: str) -> tuple[Entity, ...]:
        """The entities of one kind, in a fixed order."""
        return tuple(entity for entity in self.entities.values() if entity.kind == kind)


def make_world(seed: int = 0) -> World:
    """The world of this seed: the same on every machine and in every process."""
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ConfigError(f"world.seed: got {seed!r}; allowed is a whole number from 0 up. Set world.seed to 0.")
    rng = random.Random(seed)
    people = _people(rng)
    cities = {name: {} for name in rng.sample(names.CITIES, COUNTS["city"])}
    companies = _companies(rng, people, list(cities))
    _settle(rng, people, cities, companies)
    films = _films(rng, people, cities, companies, _film_titles(rng))
    awards = _awards(rng, films, companies)
    titles = [f"{title} (remake)" for title in rng.sample(list(films), NUM_REMAKES)]
    remakes = _films(rng, people, cities, companies, titles)
    facts = {"film": films, "person": people, "city": cities, "company": companies, "award": awards}
    entities = {name: Entity(kind, name, rows[name]) for kind, rows in facts.items() for name in rows}
    return World(seed, entities, tuple(Entity("film", name, facts) for name, facts in remakes.items()))


def _pairs(rng: random.Random, left: tuple[str, ...], right: tuple[str, ...], count: int) -> list[str]:
    return rng.sample([f"{a} {b}" for a in left for b in right], count)


def _film_titles(rng: random.Random) -> list[str]:
    return _pairs(rng, names.ADJECTIVES, names.NOUNS, COUNTS["film"])


def _people(rng: random.Random) -> Facts:
    everyone = _pairs(rng, names.FIRST_NAMES, names.SURNAMES, COUNTS["person"])
    others = COUNTS["person"] - NUM_DIRECTORS - NUM_COMPOSERS
    professions = ["director"] * NUM_DIRECTORS + ["composer"] * NUM_COMPOSERS
    professions += [rng.choice(names.PROFESSIONS) for _ in range(others)]
    people = {
        name: {"profession": profession, "birth year": str(rng.randint(1870, 1970))}
        for name, profession in zip(everyone, professions, strict=True)
    }
    # Neighbours in age marry; the shuffle inside ten-year bands keeps couples from being guessable.
    by_age = sorted(everyone, key=lambda name: (int(people[name]["birth year"]) // 10, rng.random()))
    for one, other in zip(by_age[::2], by_age[1::2], strict=True):
        people[one]["spouse"], people[other]["spouse"] = other, one
    return people


def _companies(rng: random.Random, people: Facts, cities: list[str]) -> Facts:
    companies = {}
    for name in _pairs(rng, names.SURNAMES, tuple(names.COMPANY_INDUSTRIES), COUNTS["company"]):
        line = name.split()[1]
        first, last = (1900, 1914) if line in names.FILM_COMPANIES else (1910, 1960)
        companies[name] = {
            "industry": rng.choice(names.COMPANY_INDUSTRIES[line]),
            "headquarters": rng.choice(cities),
            "founding year": str(rng.randint(first, last)),
        }
    free = [name for name, facts in people.items() if facts["profession"] not in ("director", "composer")]
    for facts in sorted(companies.values(), key=lambda facts: facts["founding year"]):
        adults = [name for name in free if int(people[name]["birth year"]) + 20 <= int(facts["founding year"])]
        facts["founder"] = rng.choice(adults)
        free.remove(facts["founder"])
    return companies


def _settle(rng: random.Random, people: Facts, cities: Facts, companies: Facts) -> None:
    """Completes people and cities in place: where they were born, who employs them, who governs."""
    for facts in people.values():
        facts["birthplace"] = rng.choice(list(cities))
        retired = int(facts["birth year"]) + 55
        facts["employer"] = rng.choice([n for n, c in companies.items() if int(c["founding year"]) <= retired])
    eligible = [n for n, f in people.items() if f["profession"] in names.PROFESSIONS and f["birth year"] >= "1920"]
    for facts, mayor in zip(cities.values(), rng.sample(eligible, len(cities)), strict=True):
        facts["region"] = rng.choice(names.REGIONS)
        facts["mayor"] = mayor
        facts["patron"] = rng.choice(list(companies))
        facts["founding year"] = str(rng.randint(1820, 1868))


def _films(rng: random.Random, people: Facts, cities: Facts, companies: Facts, titles: list[str]) -> Facts:
    born = {name: int(facts["birth year"]) for name, facts in people.items()}
    directors = [name for name, facts in people.items() if facts["profession"] == "director"]
    composers = [name for name, facts in people.items() if facts["profession"] == "composer"]
    studios = [name for name in companies if name.split()[1] in names.FILM_COMPANIES]
    films = {}
    for title in titles:
        director = rng.choice(directors)
        composer = rng.choice([name for name in composers if abs(born[name] - born[director]) <= 20])
        first = max(born[director] + 25, born[composer] + 25, 1915)
        last = min(born[director] + 65, born[composer] + 65, 2015)
        films[title] = {
            "year": str(rng.randint(first, last)),
            "director": director,
            "composer": composer,
            "studio": rng.choice(studios),
            "location": rng.choice(list(cities)),
        }
    return films


def _awards(rng: random.Random, films: Facts, companies: Facts) -> Facts:
    awards = {}
    winners = rng.sample([title for title, facts in films.items() if facts["year"] >= "1960"], COUNTS["award"])
    prizes = [f"{pair} Prize" for pair in _pairs(rng, names.COLOURS, names.BIRDS, COUNTS["award"])]
    for name, winner in zip(prizes, winners, strict=True):
        year = str(int(films[winner]["year"]) + 1)
        awards[name] = {"sponsor": rng.choice(list(companies)), "year": year, "first winner": winner}
    return awards
