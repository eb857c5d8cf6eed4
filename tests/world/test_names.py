from __future__ import annotations

import collections

from dr_jax.world import names


def test_pools_share_no_word():
    # One word, one meaning: a word of a city can never be half of a person.
    pools = {
        "first names": names.FIRST_NAMES,
        "surnames": names.SURNAMES,
        "adjectives": names.ADJECTIVES,
        "nouns": names.NOUNS,
        "cities": names.CITIES,
        "regions": names.REGIONS,
        "company kinds": tuple(names.COMPANY_INDUSTRIES),
        "colours": names.COLOURS,
        "birds": names.BIRDS,
        "professions": names.PROFESSIONS,
    }
    where = collections.defaultdict(list)
    for pool, members in pools.items():
        for word in members:
            assert word.isascii()
            assert word.isalpha()
            where[word].append(pool)
    assert {word: found for word, found in where.items() if len(found) > 1} == {}


def test_pools_are_as_large_as_the_world_needs():
    sizes = [len(pool) for pool in (names.FIRST_NAMES, names.SURNAMES, names.ADJECTIVES, names.NOUNS, names.CITIES)]
    assert sizes == [60, 90, 45, 50, 200]


def test_only_film_companies_make_films():
    makers = {kind for kind, industries in names.COMPANY_INDUSTRIES.items() if "film" in industries}
    assert makers == set(names.FILM_COMPANIES)
