"""Reading exercises to pretrain the tiny checkpoint on: a few observations, then what each of them states.

A transcript looks up one fact a hop; an exercise, about a dozen in 570 tokens. The objects are dealt anew each time,
so there is nothing to remember: who wants to write them down has to read them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence

from dr_jax.world import prose
from dr_jax.world.lore import Entity, World
from dr_jax.world.pages import url

SUBJECTS = 5  # of one exercise: more make it longer, fewer leave nothing to mix up


def exercise(world: World, rng: random.Random) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Observations as the agent's tools write them, and (prompt, object) of each fact they state, in random order."""
    subjects = [_dealt(world, entity, rng) for entity in rng.sample(list(world.entities.values()), SUBJECTS)]
    observations, stated = [], []
    while subjects:
        if rng.random() < 0.5:
            found, subjects = subjects[:2], subjects[2:]
            observations.append(_search_results(found))
            stated += [(entity, name) for entity in found for name in _relations(entity, lead=True)]
        else:
            entity, *subjects = subjects
            below = rng.choice(_relations(entity, lead=False))
            observations.append(_page(entity, below))
            stated += [(entity, name) for name in (*_relations(entity, lead=True), below)]
    rng.shuffle(stated)
    return tuple(observations), tuple(_pairs(stated))


def _dealt(world: World, entity: Entity, rng: random.Random) -> Entity:
    """`entity` with the objects of others of its kind."""
    kin = world.of_kind(entity.kind)
    return dataclasses.replace(entity, facts={name: rng.choice(kin).facts[name] for name in entity.facts})


def _relations(entity: Entity, *, lead: bool) -> list[str]:
    return [name for name, relation in entity.relations.items() if relation.lead == lead]


def _search_results(entities: Sequence[Entity]) -> str:
    found = [{"quick_summary": prose.lead(e), "title": e.name, "url": url(e.name)} for e in entities]
    return str([{"search_query": entities[0].name, "web_page_info_list": found}])


def _page(entity: Entity, relation: str) -> str:
    summary = f"{prose.lead(entity)} {prose.statement(entity, relation)}"
    return str([{"information": [{"page_number": 0, "page_summary": summary}], "url": url(entity.name)}])


def _pairs(stated: Sequence[tuple[Entity, str]]) -> Iterator[tuple[str, str]]:
    for entity, relation in stated:
        yield f" need {entity.name}'s {relation}\n the {relation} is", entity.facts[relation]
