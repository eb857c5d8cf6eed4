"""Questions of 1 to 4 hops over the world's facts, with the pages that answer them.

Every (entity, relation) edge belongs to one split, by a digest of its text; a split's chains use its own edges alone,
so no held-out question can be answered from facts that training questions asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Iterator, Mapping

from dr_jax.errors import ConfigError
from dr_jax.records import Question
from dr_jax.world import pages
from dr_jax.world.lore import World

SPLITS = ("train", "heldout")
TRAIN_SHARE = 0.7
MAX_HOPS = 4
# What the relation before already gives away.
_TRIVIAL = {("director", "profession"), ("composer", "profession")}


@dataclasses.dataclass(frozen=True)
class Chain:
    """A walk over the facts: `entities[i]` has `relations[i]`, which is `entities[i + 1]`; the last is the answer."""

    entities: tuple[str, ...]
    relations: tuple[str, ...]


def split_of(world: World, subject: str, relation: str) -> str:
    """The split an edge belongs to. Both directions of a marriage are one edge."""
    ends = (subject, world.entities[subject].facts[relation]) if relation == "spouse" else (subject,)
    digest = hashlib.sha256("|".join([relation, *sorted(ends)]).encode()).digest()
    return "train" if int.from_bytes(digest[:4], "big") < TRAIN_SHARE * 2**32 else "heldout"


def chains(world: World, split: str, hops: int) -> Iterator[Chain]:
    """Every chain of this many hops whose edges all belong to the split, in a fixed order."""
    edges = {
        name: [relation for relation in entity.relations if split_of(world, name, relation) == split]
        for name, entity in world.entities.items()
    }

    def walk(entities: tuple[str, ...], relations: tuple[str, ...]) -> Iterator[Chain]:
        entity = world.entities[entities[-1]]
        for relation in edges[entity.name]:
            value = entity.facts[relation]
            if value in entities or (relations and (relations[-1], relation) in _TRIVIAL):
                continue
            longer = Chain((*entities, value), (*relations, relation))
            if len(longer.relations) == hops:
                if value not in _text(world, longer):
                    yield longer
            elif not entity.relations[relation].ends:
                yield from walk(longer.entities, longer.relations)

    for name in world.entities:
        yield from walk((name,), ())


def sample_chains(
    world: World, split: str, seed: int, count: int, hop_weights: Mapping[int, float]
) -> tuple[Chain, ...]:
    """`count` different chains in random order; hop counts in proportion to `hop_weights` (hops -> weight)."""
    if split not in SPLITS:
        raise ConfigError(f"world.split: got {split!r}; allowed are {', '.join(SPLITS)}.")
    if not hop_weights or any(k not in range(1, MAX_HOPS + 1) or not w > 0 for k, w in hop_weights.items()):
        raise ConfigError(
            f"world.hop_weights: got {dict(hop_weights)!r}; allowed are positive weights for 1 to 4 hops."
        )
    total = sum(hop_weights.values())
    chosen: list[Chain] = []
    reached = 0.0
    for hops, weight in sorted(hop_weights.items()):
        reached += weight
        wanted = round(count * reached / total) - len(chosen)
        found = list(chains(world, split, hops))
        if wanted > len(found):
            raise ConfigError(
                f"world.count: {wanted} {split} questions of {hops} hops were asked for; this world has {len(found)}. "
                "Ask for fewer, or weigh other hop counts."
            )
        chosen += random.Random(f"{seed}/{split}/{hops}").sample(found, wanted)
    random.Random(f"{seed}/{split}").shuffle(chosen)
    return tuple(chosen)


def question(world: World, chain: Chain) -> Question:
    """The chain as a nested phrase, with its answer and the pages in the order in which they must be read."""
    text = _text(world, chain)
    return Question(
        id=f"lore{world.seed}-{len(chain.relations)}-{hashlib.sha256(text.encode()).hexdigest()[:12]}",
        text=text,
        answers=_answers(world, _asked(world, chain), chain.entities[-1]),
        source="world",
        hops=len(chain.relations),
        evidence=tuple(pages.url(name) for name in chain.entities[:-1]),
    )


def _asked(world: World, chain: Chain) -> str:
    """What kind of thing the answer is."""
    return world.entities[chain.entities[-2]].relations[chain.relations[-1]].object


def _text(world: World, chain: Chain) -> str:
    start = world.entities[chain.entities[0]]
    phrase = "".join(f"'s {relation}" for relation in chain.relations)
    return f"{'Who' if _asked(world, chain) == 'person' else 'What'} is the {start.kind} {start.name}{phrase}?"


def _answers(world: World, kind: str, value: str) -> tuple[str, ...]:
    """The canonical answer first, then other ways to say the same."""
    if kind == "city":
        return (value, f"{value}, {world.entities[value].facts['region']}")
    if kind == "industry":
        return (value, f"{value} industry")
    return (value,)


def questions(
    world: World, split: str, seed: int, count: int, hop_weights: Mapping[int, float]
) -> tuple[Question, ...]:
    """`sample_chains` as questions, in the same order."""
    return tuple(question(world, chain) for chain in sample_chains(world, split, seed, count, hop_weights))
