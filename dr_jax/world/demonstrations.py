"""Transcripts to pretrain the tiny checkpoint on, by few careful researchers and many careless ones.

Careful authors alone would leave nothing to learn, and careless ones alone nothing to learn from. A model of their
mixture can do everything that research takes, mostly does not, and prefers not to when it decodes greedily.
"""

from __future__ import annotations

import dataclasses
import json
import random

from dr_jax.world.lore import Entity, World
from dr_jax.world.pages import url
from dr_jax.world.questions import Chain


@dataclasses.dataclass(frozen=True)
class Habits:
    """How likely each bad habit is at each chance it gets."""

    guess: float  # answers the question without a search
    skim: float  # takes a fact of the search snippet for the one asked, instead of reading the page
    stop: float  # takes the first thing found for the answer, though the question goes on


CAREFUL = Habits(guess=0.0, skim=0.0, stop=0.0)


@dataclasses.dataclass(frozen=True)
class Authors:
    """Who writes the transcripts: a share of careful authors, and the habits of all others."""

    careful_share: float
    others: Habits

    def draw(self, rng: random.Random) -> Habits:
        """The habits of whoever writes the next transcript."""
        return CAREFUL if rng.random() < self.careful_share else self.others


def turns(world: World, chain: Chain, habits: Habits, rng: random.Random) -> tuple[str, ...]:
    """What the demonstrator writes, turn by turn, each after a forced `<think>` and up to its end token.

    Follows `chain` through searches (the fact is in the snippet) and pages (it is not), until it is through or a bad
    habit ends it with a wrong answer.
    """
    if rng.random() < habits.guess:
        return (_answer("I know it", _guess(world, chain, rng)),)
    written = [_search(f"need {chain.entities[0]}'s {chain.relations[0]}", chain.entities[0])]
    for hop, relation in enumerate(chain.relations):
        subject, found = world.entities[chain.entities[hop]], chain.entities[hop + 1]
        if not subject.relations[relation].lead:
            if rng.random() < habits.skim:
                return (*written, _answer("short enough", _lead_fact(subject, rng)))
            written.append(_browse(f"the {relation} of {subject.name} is on the page", subject.name))
        last = hop + 1 == len(chain.relations)
        if last or rng.random() < habits.stop:
            return (*written, _answer(f"the {relation} is {found}", found))
        written.append(_search(f"the {relation} is {found}, need the {relation}'s {chain.relations[hop + 1]}", found))
    raise AssertionError("a chain has at least one relation")


def _search(thought: str, query: str) -> str:
    return _call(thought, "web_search", {"query": [query]})


def _browse(thought: str, name: str) -> str:
    return _call(thought, "browse_webpage", {"url_list": [url(name)]})


def _call(thought: str, tool: str, arguments: dict[str, list[str]]) -> str:
    call = json.dumps({"name": tool, "arguments": arguments})
    return f" {thought}</think>\n<tool_call>\n{call}\n</tool_call><|im_end|>"


def _answer(thought: str, answer: str) -> str:
    return f" {thought}</think>\n<answer> {answer}</answer><|im_end|>"


def _guess(world: World, chain: Chain, rng: random.Random) -> str:
    """The right kind of thing, of somebody else."""
    asked = world.entities[chain.entities[-2]]
    other = rng.choice([entity for entity in world.of_kind(asked.kind) if entity.name != asked.name])
    return other.facts[chain.relations[-1]]


def _lead_fact(subject: Entity, rng: random.Random) -> str:
    return subject.facts[rng.choice([name for name, relation in subject.relations.items() if relation.lead])]
