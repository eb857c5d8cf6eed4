"""Every sentence of the encyclopedia: one lead per kind, a few phrasings per relation, and filler that states no fact.

A sentence that states a fact contains the relation's key word and the subject's full name, so a reader that looks for
both finds it. Filler never contains a key word.
"""

from __future__ import annotations

import random

from dr_jax.world.lore import RELATIONS, Entity
from dr_jax.world.names import words

# {s} is the subject, the rest are its facts.
LEADS = {
    "film": "{s} is a film of the year {year} by the director {director}.",
    "person": "{s} is a person of the profession {profession} with the birthplace {birthplace}.",
    "city": "{s} is a city in the region {region} under the mayor {mayor}.",
    "company": "{s} is a company of the {industry} industry with the headquarters {headquarters}.",
    "award": "{s} is an award of the sponsor {sponsor}, given since the year {year}.",
}

# {o} is the object, always after the key word: a model that reads from left to right knows then what it is reading.
STATEMENTS = {
    ("film", "composer"): (
        "The composer of {s} is {o}.",
        "{s} has the composer {o}.",
        "For {s} the composer was {o}.",
    ),
    ("film", "studio"): (
        "The studio of {s} is {o}.",
        "{s} comes from the studio {o}.",
        "Behind {s} stands the studio {o}.",
    ),
    ("film", "location"): (
        "The location of {s} is {o}.",
        "{s} was shot on location in {o}.",
        "For {s} the location was {o}.",
    ),
    ("person", "spouse"): ("The spouse of {s} is {o}.", "{s} lives with the spouse {o}."),
    ("person", "employer"): ("The employer of {s} is {o}.", "{s} works for the employer {o}."),
    ("person", "birth year"): ("The birth year of {s} is {o}.", "{s} has the birth year {o}."),
    ("city", "patron"): ("The patron of {s} is {o}.", "{s} looks to the patron {o}."),
    ("city", "founding year"): ("The founding year of {s} is {o}.", "{s} has the founding year {o}."),
    ("company", "founder"): ("The founder of {s} is {o}.", "{s} had the founder {o}."),
    ("company", "founding year"): ("The founding year of {s} is {o}.", "{s} has the founding year {o}."),
    ("award", "first winner"): ("The first winner of {s} is {o}.", "{s} had the first winner {o}."),
}

_QUALITIES = words("small famous careful cheap warm curious slow bright plain modest peculiar handsome")
SLOTS = {
    "a": _QUALITIES,
    "b": _QUALITIES,
    "n": words("poster map song letter photograph garden bridge market story drawing fence clock"),
    "p": words("scholars visitors children critics farmers sailors neighbours merchants students readers"),
    "t": words("spring summer autumn winter wartime peacetime"),
}

FILLERS = {
    "film": (
        "{p} still talk about the {a} {n} in the second act of {s}.",
        "A {a} print of {s} was found in a barn during {t}.",
        "The {n} seen near the end of {s} was built by hand.",
        "Some {p} called {s} a {a} picture with a {b} {n}.",
        "The opening scene shows a {a} {n} and no dialogue at all.",
        "Tickets sold out in {t}, and many {p} came twice.",
    ),
    "person": (
        "{p} describe {s} as {a} and fond of a good {n}.",
        "In {t}, {s} liked to walk to the {n} before breakfast.",
        "A {a} {n} once owned by {s} is kept in a museum.",
        "{s} wrote a {a} essay about a {n} that few {p} have read.",
        "Letters from that time mention a {a} house and a {b} {n}.",
        "Friends remember {a} dinners and a {b} sense of humour.",
    ),
    "city": (
        "{p} come to {s} in {t} to see the {a} {n}.",
        "The old quarter of {s} has a {a} {n} and narrow lanes.",
        "A {a} tram once ran from the {n} to the river in {s}.",
        "In {t} the streets of {s} are {a} and full of {p}.",
        "The cathedral holds a {a} {n} made of oak.",
        "Rain is common, and {p} carry a {a} umbrella.",
    ),
    "company": (
        "{p} know {s} for a {a} advertisement with a {b} {n}.",
        "During {t}, {s} sold a {a} model shaped like a {n}.",
        "The emblem of {s} shows a {a} {n}.",
        "A {a} strike in {t} was settled over a {n}.",
        "Catalogues from that decade praise the {a} finish of every {n}.",
        "{p} collect the {a} tins that {s} once gave away.",
    ),
    "award": (
        "{p} gather each {t} to hear who receives {s}.",
        "The trophy of {s} is a {a} {n} made of tin.",
        "A {a} dinner with a {n} on every table follows the ceremony.",
        "{p} have called {s} {a} but fair.",
        "The jury meets in {t} in a {a} room above a {n} shop.",
        "Speeches at {s} are {a} by tradition.",
    ),
}


def lead(entity: Entity) -> str:
    """The first sentence of the entity's page. It states the lead relations and nothing else."""
    return LEADS[entity.kind].format(s=entity.name, **entity.facts)


def statement(entity: Entity, relation: str) -> str:
    """The one sentence of the entity's page that states this relation."""
    if RELATIONS[entity.kind][relation].lead:
        return lead(entity)
    phrasing = random.Random(f"{entity.name}/{relation}").choice(STATEMENTS[entity.kind, relation])
    return phrasing.format(s=entity.name, o=entity.facts[relation])


def fillers(entity: Entity, count: int, rng: random.Random) -> list[str]:
    """`count` different sentences about the entity that state no fact."""
    sentences = []
    for template in rng.sample(FILLERS[entity.kind], count):
        sentence = template.format(s=entity.name, **{slot: rng.choice(choices) for slot, choices in SLOTS.items()})
        sentences.append(sentence[0].upper() + sentence[1:])
    return sentences
