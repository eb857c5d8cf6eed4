from __future__ import annotations

import collections
import html
import re

import pytest

from dr_jax.errors import ConfigError
from dr_jax.world import pages, questions

EVEN = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}


def _edges(chain):
    """(subject, relation); a marriage is the same edge from both sides."""
    for subject, relation, value in zip(chain.entities, chain.relations, chain.entities[1:], strict=False):
        yield (frozenset((subject, value)) if relation == "spouse" else subject, relation)


def test_splits_share_no_edge(world):
    seen = {
        split: {
            edge for hops in range(1, 5) for chain in questions.chains(world, split, hops) for edge in _edges(chain)
        }
        for split in questions.SPLITS
    }
    assert len(seen["train"]) > 6000
    assert len(seen["heldout"]) > 2500
    assert not seen["train"] & seen["heldout"]


def test_there_are_enough(world):
    counts = {split: [len(list(questions.chains(world, split, k))) for k in range(1, 5)] for split in questions.SPLITS}
    assert min(counts["train"]) >= 3000
    assert min(counts["heldout"]) >= 300


def test_chains_follow_the_facts_without_cycles(world):
    for chain in questions.sample_chains(world, "train", 0, 2000, EVEN):
        assert len(set(chain.entities)) == len(chain.entities) == len(chain.relations) + 1
        for subject, relation, value in zip(chain.entities, chain.relations, chain.entities[1:], strict=False):
            assert world.entities[subject].facts[relation] == value


@pytest.mark.parametrize("split", questions.SPLITS)
def test_the_evidence_really_answers(world, articles, split):
    """Walks the rendered pages as a reader would: the sentence with the key word names the next page, or the answer."""
    texts = {
        pages.url(article.title): html.unescape(re.sub(r"<[^>]+>", "", pages.render(article).decode()))
        for article in articles
    }
    pools = collections.defaultdict(set)  # what each kind of answer can be
    for entity in world.entities.values():
        for relation in entity.relations.values():
            pools[relation.object].add(entity.facts[relation.name])
    kinds = {kind: re.compile(rf"\b(?:{'|'.join(sorted(pool))})\b") for kind, pool in pools.items()}
    for chain in questions.sample_chains(world, split, 1, 1000, EVEN):
        question = questions.question(world, chain)
        assert len(question.evidence) == question.hops
        found = chain.entities[0]
        for url, name in zip(question.evidence, chain.relations, strict=True):
            assert url == pages.url(found)
            relation = world.entities[found].relations[name]
            (sentence,) = _sentences(texts[url], found, name)
            (found,) = kinds[relation.object].findall(sentence.replace(found, ""))
        assert found == question.answers[0]


def _sentences(text, subject, key_word):
    """The different sentences that name the subject and contain the key word."""
    return {s for s in re.findall(r"[^.\n]+\.", text) if subject in s and re.search(rf"\b{key_word}\b", s)}


def test_text_and_answers_by_hop_count(world):
    chain = questions.Chain(
        ("Humble Postman", "Velira Darrune", "Ulmdara", "Jelko Garrune"), ("director", "birthplace", "mayor")
    )
    question = questions.question(world, chain)
    assert question.text == "Who is the film Humble Postman's director's birthplace's mayor?"
    assert question.answers == ("Jelko Garrune",)
    assert question.source == "world"
    assert question.hops == 3


def test_no_question_contains_its_answer(world):
    for split in questions.SPLITS:
        for question in questions.questions(world, split, 0, 3000 if split == "train" else 1000, EVEN):
            assert question.answers[0] not in question.text


def test_nothing_follows_from_the_relation_before(world):
    # A director is a director: asking for that profession would need no page.
    for hops in (2, 3, 4):
        for chain in questions.chains(world, "train", hops):
            assert ("director", "profession") not in zip(chain.relations, chain.relations[1:], strict=False)


def test_sampling_is_exact_distinct_and_repeatable(world):
    weights = {1: 0.5, 2: 0.25, 4: 0.25}
    sample = questions.questions(world, "heldout", 7, 201, weights)
    counts = collections.Counter(question.hops for question in sample)
    assert sum(counts.values()) == 201
    assert set(counts) == {1, 2, 4}
    assert abs(counts[1] - 100) <= 1
    assert abs(counts[2] - 50) <= 1
    assert len({question.id for question in sample}) == 201
    assert sample == questions.questions(world, "heldout", 7, 201, weights)
    assert sample != questions.questions(world, "heldout", 8, 201, weights)


def test_golden_sample(world):
    (question,) = questions.questions(world, "heldout", 0, 1, {2: 1.0})
    assert (question.id, question.text, question.answers) == (
        "lore0-2-24c97647a90b",
        "What is the person Nelvar Embrose's spouse's employer?",
        ("Parrune Press",),
    )


@pytest.mark.parametrize(
    ("split", "count", "weights", "message"),
    [
        ("test", 1, {1: 1.0}, r"world\.split: got 'test'; allowed are train, heldout"),
        ("train", 1, {}, r"world\.hop_weights"),
        ("train", 1, {5: 1.0}, r"world\.hop_weights: got \{5: 1\.0\}"),
        ("train", 1, {1: -1.0}, r"world\.hop_weights"),
        ("train", 1, {1: float("nan")}, r"world\.hop_weights"),
        ("heldout", 5000, {4: 1.0}, r"world\.count: 5000 heldout questions of 4 hops.*has \d+"),
    ],
)
def test_bad_requests(world, split, count, weights, message):
    with pytest.raises(ConfigError, match=message):
        questions.sample_chains(world, split, 0, count, weights)
