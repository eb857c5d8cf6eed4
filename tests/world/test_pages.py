from __future__ import annotations

import html.parser
import re
import urllib.parse

import pytest

from dr_jax.world import lore, pages, prose


class _Text(html.parser.HTMLParser):
    """What a reader sees inside <main>, and the links there."""

    def __init__(self):
        super().__init__()
        self.depth = 0
        self.text, self.links, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name == "href" and "main" in self.open]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "main" in self.open:
            self.text.append(data)


def _read(page: bytes) -> _Text:
    parser = _Text()
    parser.feed(page.decode())
    parser.close()
    assert parser.open == []  # every element is closed in order
    return parser


def test_every_page_states_every_fact(world, articles):
    entities = (*world.entities.values(), *world.remakes)
    assert [article.title for article in articles] == [entity.name for entity in entities]
    for article, entity in zip(articles, entities, strict=True):
        text = "".join(_read(pages.render(article)).text)
        for relation in entity.relations:
            assert text.count(prose.statement(entity, relation)) == 1


def test_only_the_body_states_the_body_facts(articles):
    # Reading has to pay: neither the lead nor the infobox knows them.
    for article in articles:
        page = pages.render(article).decode()
        box = page[page.index('<table class="infobox">') : page.index("</table>")]
        for relation in article.entity.relations.values():
            value = article.entity.facts[relation.name]
            assert (f">{value}<" in box) == relation.lead
            assert (value in article.lead) == relation.lead


def test_links_are_right_or_dead_on_purpose(world, articles):
    known = {f"/{pages.path(article.title)}" for article in articles}
    for article in articles:
        links = [link for link in _read(pages.render(article)).links]
        dead = [link for link in links if link not in known]
        assert len(dead) == 1
        assert dead[0].endswith(f"_of_{pages.path(article.title)}")
        objects = [value for value in article.entity.facts.values() if value in world.entities]
        assert {f"/{pages.path(value)}" for value in objects} <= set(links)


def test_filmography(world, articles):
    by_name = {article.title: article for article in articles}
    director = next(person for person in world.of_kind("person") if person.facts["profession"] == "director")
    films = [film for film in world.of_kind("film") if film.facts["director"] == director.name]
    page = pages.render(by_name[director.name]).decode()
    assert films
    for film in films:
        row = f'<tr><td>{film.facts["year"]}</td><td><a href="/{pages.path(film.name)}">{film.name}</a></td></tr>'
        assert page.count(row) == 1


def test_some_pages_are_long_with_the_facts_late(articles):
    long = [article for article in articles if len(article.body) > 6000]
    assert 100 < len(long) < 250
    for article in long:
        facts = [prose.statement(article.entity, r.name) for r in article.entity.relations.values() if not r.lead]
        assert all(article.body.index(fact) > 5000 for fact in facts)


def test_remakes_are_other_films(world, articles):
    by_name = {article.title: article for article in articles}
    for remake in world.remakes:
        original = world.entities[remake.name.removesuffix(" (remake)")]
        assert original.facts != remake.facts
        stub = by_name[remake.name]
        assert len(stub.body) < 300
        assert re.findall(rf"{original.name}(?! \(remake\))", stub.lead + stub.body) == []


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("Kasteri Mon", "http://lore.test/Kasteri_Mon"),
        ("Silent Harbor (remake)", "http://lore.test/Silent_Harbor_(remake)"),
        ("a/b?c#d%", "http://lore.test/a%2Fb%3Fc%23d%25"),
    ],
)
def test_url(name, url):
    assert pages.url(name) == url
    assert urllib.parse.unquote(pages.path(name)).replace("_", " ") == name


def test_front_page_leads_to_every_entity(world):
    home = _read(pages.render_home(world))
    assert {f"/List_of_{plural}" for plural in pages.PLURALS.values()} <= set(home.links)
    listed = [link for kind in lore.RELATIONS for link in _read(pages.render_list(world, kind)).links]
    assert sorted(listed) == sorted(f"/{pages.path(name)}" for name in world.entities)


def test_a_missing_name_cannot_write_html():
    page = pages.render_missing("<script>alert(1)</script>")
    assert b"<script>alert" not in page
    assert "<script>alert(1)</script>" in "".join(_read(page).text)
