from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.errors import ConfigError
from dr_jax.records import Hit
from dr_jax.world import index as index_module
from dr_jax.world import lore, pages
from dr_jax.world.index import Index

INDEX = Index(pages.articles(lore.make_world(0)))


def test_a_named_page_comes_first(world):
    for entity in list(world.entities.values())[::20]:
        for relation in entity.relations:
            for query in (entity.name, f"{relation} of {entity.name}", f"{entity.name.upper()} {relation}"):
                assert INDEX.search(query, 3)[0].url == pages.url(entity.name)


def test_original_before_remake_unless_asked_for(world):
    remake = world.remakes[0].name
    original = remake.removesuffix(" (remake)")
    assert [hit.title for hit in INDEX.search(f"composer of {original}", 2)] == [original, remake]
    assert INDEX.search(f"{original} remake", 5)[0].title == remake


def test_title_outranks_lead_outranks_body():
    def article(name, text_lead, text_intro):
        return pages.Article(lore.Entity("film", name, {}), text_lead, text_intro, (), (), ())

    index = Index(
        [article("One", "x y.", "zebra."), article("Two", "zebra y.", "z."), article("Zebra herd", "x y.", "z.")]
    )
    assert [hit.title for hit in index.search("a zebra", 5)] == ["Zebra herd", "Two", "One"]


def test_hits_are_the_leads(world):
    film = world.of_kind("film")[0]
    year, director = film.facts["year"], film.facts["director"]
    snippet = f"{film.name} is a film of the year {year} by the director {director}."
    assert INDEX.search(film.name, 1) == (Hit(film.name, pages.url(film.name), snippet),)


def test_a_long_snippet_is_cut_at_a_word():
    text = "word " * 40
    entity = lore.Entity("film", "A", {})
    (hit,) = Index([pages.Article(entity, text, "", (), (), ())]).search("A", 1)
    assert hit.snippet == " ".join(["word"] * 22)  # 109 characters; one letter more fits


def test_top_k():
    assert [len(INDEX.search("film", k)) for k in (-1, 0, 1, 10, 100)] == [0, 0, 1, 10, 100]


HOSTILE = [
    "", " ", '"', "'", '"""', "*", "NEAR(a b)", "AND", "NOT film", "title:film", "film*", "^film", "(", "-film",
    "a + b", "{title lead}: film", "\0", "film\0film", "😀", "\ud800", "x" * 1_000_000, "word " * 200_000,
    "\u0301", "a\u0301", "' OR 1=1 --", "film; DROP TABLE page", "\u202e\u200b", "½ ² ٣ 中文",
]  # fmt: skip


@pytest.mark.parametrize("query", HOSTILE, ids=lambda query: ascii(query[:12]))
def test_hostile_queries_are_only_words(query):
    assert isinstance(INDEX.search(query, 5), tuple)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_a_query(query):
    assert INDEX.search(query, 5) == INDEX.search(query, 5)


def test_order_is_the_same_in_a_second_index(articles, world):
    other = Index(articles)
    for film in world.of_kind("film")[:30]:
        query = f"the composer of the picture {film.name.split()[0]}"
        assert [hit.url for hit in other.search(query, 20)] == [hit.url for hit in INDEX.search(query, 20)]


def test_sqlite_without_full_text_search(monkeypatch):
    # The same error, from the same library, as a build without FTS5 gives.
    monkeypatch.setattr(index_module, "_CREATE", index_module._CREATE.replace("fts5", "fts0"))
    with pytest.raises(ConfigError, match=r"no FTS5 \(no such module: fts0\)"):
        Index([])
