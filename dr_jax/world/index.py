"""The search engine of the world: SQLite's FTS5 in memory, BM25 over title, lead and body."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterable, Iterator

from dr_jax.errors import ConfigError
from dr_jax.records import Hit
from dr_jax.world import pages
from dr_jax.world.names import words

MAX_QUERY_CHARS = 512
MAX_QUERY_WORDS = 32
SNIPPET_CHARS = 110
_WORD = re.compile(r"[^\W_]+")
_STOP = frozenset(
    words("a an and are as at by did do for from has in is it of on or that the to was what when where which who")
)
_CREATE = "CREATE VIRTUAL TABLE page USING fts5(title, lead, body, content='')"
_INSERT = "INSERT INTO page (rowid, title, lead, body) VALUES (?, ?, ?, ?)"
_SELECT = "SELECT rowid FROM page WHERE page MATCH ? ORDER BY bm25(page, 10.0, 3.0, 1.0), rowid LIMIT ?"


class Index:
    """Full-text search over articles. Any text is a valid query; ties keep the order of the articles."""

    def __init__(self, articles: Iterable[pages.Article]):
        articles = tuple(articles)
        self._hits = tuple(Hit(page.title, pages.url(page.title), _snippet(page.lead)) for page in articles)
        self._by_title = {_words(page.title): row for row, page in enumerate(articles)}
        self._longest_title = max(map(len, self._by_title), default=0)
        # The site answers from the thread of its event loop, which need not be the one that built the index.
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._db.execute(_CREATE)
        except sqlite3.OperationalError as error:
            self._db.close()
            raise ConfigError(
                f"world.index: this Python's SQLite {sqlite3.sqlite_version} has no FTS5 ({error}). "
                "Use a Python whose sqlite3 is built with it, as those of Debian and python.org are."
            ) from error
        rows = ((row, page.title, page.lead, page.body) for row, page in enumerate(articles))
        self._db.executemany(_INSERT, rows)
        self._ranked = functools.lru_cache(maxsize=8192)(self._rank)

    def search(self, query: str, top_k: int) -> tuple[Hit, ...]:
        """The best `top_k` pages: first those whose whole title stands in the query, longest first; then BM25."""
        asked = _words(query[:MAX_QUERY_CHARS])[:MAX_QUERY_WORDS]
        return self._ranked(asked, top_k) if asked and top_k > 0 else ()

    def close(self) -> None:
        """Frees the index; a search after it raises."""
        self._db.close()

    def _rank(self, asked: tuple[str, ...], top_k: int) -> tuple[Hit, ...]:
        # Words alone reach FTS5, each of them quoted: no character of a query is ever an operator.
        terms = [word for word in dict.fromkeys(asked) if word not in _STOP] or asked
        match = " OR ".join(f'"{term}"' for term in terms)
        found = [row for (row,) in self._db.execute(_SELECT, (match, top_k))]
        rows = dict.fromkeys([*self._named(asked), *found])
        return tuple(self._hits[row] for row in list(rows)[:top_k])

    def _named(self, asked: tuple[str, ...]) -> Iterator[int]:
        for length in range(min(self._longest_title, len(asked)), 0, -1):
            for start in range(len(asked) - length + 1):
                row = self._by_title.get(asked[start : start + length])
                if row is not None:
                    yield row


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.lower()))


def _snippet(text: str) -> str:
    return text if len(text) <= SNIPPET_CHARS else text[:SNIPPET_CHARS].rsplit(" ", 1)[0]
