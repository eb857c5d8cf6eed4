"""The encyclopedia's HTML: what the real web puts around a fact (navigation, sidebar, cookie note, tables, dead links).

An `Article` is plain text first; links are put on the names that occur in it, so what is indexed, rendered and stated
is the same sentence.
"""

from __future__ import annotations

import dataclasses
import html
import random
import urllib.parse
from collections.abc import Iterable, Sequence

from dr_jax.world import prose
from dr_jax.world.lore import RELATIONS, Entity, World
from dr_jax.world.style import CSS

HOST = "lore.test"
LONG_SHARE = 0.08  # of the pages run over several reader segments, with the facts late
HEADINGS = {  # one section per relation that the lead leaves out, in the order of RELATIONS
    "film": ("Music", "Production", "Filming"),
    "person": ("Early life", "Career", "Personal life"),
    "city": ("Economy", "History"),
    "company": ("People", "History"),
    "award": ("Ceremony",),
}
PLURALS = {"film": "films", "person": "people", "city": "cities", "company": "companies", "award": "awards"}


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading, paragraphs of whole sentences, and list items (each the name of a page)."""

    heading: str
    paragraphs: tuple[str, ...]
    items: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Article:
    """One page as plain text. `lead` is its first sentence; `names` are the pages that its text links to."""

    entity: Entity
    lead: str
    intro: str
    films: tuple[Entity, ...]  # rows of the filmography table
    sections: tuple[Section, ...]
    names: tuple[str, ...]

    @property
    def title(self) -> str:
        return self.entity.name

    @property
    def body(self) -> str:
        """All prose after the lead, one paragraph per line."""
        return "\n".join([self.intro, *(paragraph for section in self.sections for paragraph in section.paragraphs)])


def path(name: str) -> str:
    """Where a page lies below its host: underscores for spaces."""
    return urllib.parse.quote(name.replace(" ", "_"), safe="()_")


def url(name: str) -> str:
    """The page's address in the world."""
    return f"http://{HOST}/{path(name)}"


def articles(world: World) -> tuple[Article, ...]:
    """Every article of the world: one per entity, then the stubs of the remakes."""
    films_by: dict[str, list[Entity]] = {}
    for film in world.of_kind("film"):
        films_by.setdefault(film.facts["director"], []).append(film)
    full = (_article(world, entity, films_by.get(entity.name, [])) for entity in world.entities.values())
    return (*full, *(_article(world, remake, [], stub=True) for remake in world.remakes))


def _article(world: World, entity: Entity, films: list[Entity], *, stub: bool = False) -> Article:
    rng = random.Random(f"{world.seed}/{entity.name}")
    intro = " ".join(prose.fillers(entity, 1, rng))
    facts = [prose.statement(entity, name) for name, relation in entity.relations.items() if not relation.lead]
    headings = HEADINGS[entity.kind]
    sections = [
        Section(heading, (_paragraph(entity, rng, 0 if stub else rng.randint(2, 3), fact),))
        for heading, fact in zip(headings, facts, strict=True)
    ]
    if not stub and rng.random() < LONG_SHARE:
        background = tuple(_paragraph(entity, rng, rng.randint(4, 6)) for _ in range(rng.randint(20, 30)))
        sections.insert(0, Section("Background", background))
    dead = f"{rng.choice(headings)} of {entity.name}"
    sections.append(Section("See also", (), (*rng.sample(list(world.entities), 3), dead)))
    mentioned = tuple(value for value in entity.facts.values() if value in world.entities)
    films = sorted(films, key=lambda film: (film.facts["year"], film.name))
    return Article(entity, prose.lead(entity), intro, tuple(films), tuple(sections), mentioned)


def _paragraph(entity: Entity, rng: random.Random, fillers: int, fact: str | None = None) -> str:
    sentences = prose.fillers(entity, fillers, rng)
    if fact:
        sentences.insert(rng.randint(0, len(sentences)), fact)
    return " ".join(sentences)


def render(article: Article) -> bytes:
    """The article as a whole HTML page."""
    lead = _linked(article.lead, article.names)
    parts = [_infobox(article.entity), f"<p>{lead} {html.escape(article.intro)}</p>"]
    headings = ["Filmography"] * bool(article.films) + [section.heading for section in article.sections]
    if article.films:
        rows = "".join(f"<tr><td>{film.facts['year']}</td><td>{_link(film.name)}</td></tr>" for film in article.films)
        parts.append(f"{_heading('Filmography')}<table><tr><th>Year</th><th>Film</th></tr>{rows}</table>")
    for section in article.sections:
        parts.append(_heading(section.heading))
        parts += [f"<p>{_linked(paragraph, article.names)}</p>" for paragraph in section.paragraphs]
        if section.items:
            parts.append(_list(_link(name) for name in section.items))
    return _shell(article.title, "\n".join(parts), headings)


def render_home(world: World) -> bytes:
    """The front page."""
    kinds = _list(
        f"{_link(f'List of {plural}')}: {len(world.of_kind(kind))} articles, for instance "
        f"{_link(world.of_kind(kind)[0].name)}"
        for kind, plural in PLURALS.items()
    )
    return _shell("Lore", f"<p>An encyclopedia of a world that does not exist.</p>\n{kinds}")


def render_list(world: World, kind: str) -> bytes:
    """All entities of one kind, as one long list of links."""
    items = _list(_link(name) for name in sorted(entity.name for entity in world.of_kind(kind)))
    return _shell(f"List of {PLURALS[kind]}", items)


def render_missing(name: str) -> bytes:
    """The page that goes with status 404."""
    return _shell("Page not found", f"<p>There is no article called {html.escape(name)}.</p>")


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _heading(text: str) -> str:
    return f'<h2 id="{path(text)}">{html.escape(text)}</h2>'


def _link(name: str) -> str:
    return f'<a href="/{path(name)}">{html.escape(name)}</a>'


def _linked(text: str, names: tuple[str, ...]) -> str:
    text = html.escape(text, quote=False)
    for name in names:
        text = text.replace(name, _link(name), 1)
    return text


def _infobox(entity: Entity) -> str:
    known = {name: entity.facts[name] for name, relation in RELATIONS[entity.kind].items() if relation.lead}
    rows = "".join(
        f"<tr><th>{name.capitalize()}</th><td>{value if entity.relations[name].ends else _link(value)}</td></tr>"
        for name, value in known.items()
    )
    return f'<table class="infobox"><caption>{html.escape(entity.name)}</caption>{rows}</table>'


def _shell(title: str, content: str, headings: Sequence[str] = ()) -> bytes:
    nav = _list(f'<a href="/List_of_{plural}">{plural.capitalize()}</a>' for plural in PLURALS.values())
    contents = _list(f'<a href="#{path(heading)}">{html.escape(heading)}</a>' for heading in headings)
    aside = f"<h3>Contents</h3>{contents}" if headings else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)} - Lore</title>
<style>{CSS}</style>
</head>
<body>
<header><a class="brand" href="/">Lore</a><span>the encyclopedia of nowhere</span></header>
<nav>{nav}</nav>
<div class="columns">
<aside>{aside}</aside>
<main><article>
<h1>{html.escape(title)}</h1>
{content}
</article></main>
</div>
<div class="cookies">We use cookies that do nothing. <button type="button">Accept</button></div>
<footer><p>Text is available to everyone. About Lore. Privacy policy.</p></footer>
<script>window.lore = {{"page": "view"}};</script>
</body>
</html>
""".encode()
