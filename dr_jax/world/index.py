"""The search engine of the world: SQLite's FTS5 in memory, BM25 over title, lead and body."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Iterable

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
_SQL = """
SELECT title, url, snippet FROM page WHERE page MATCH ?
ORDER BY title_words = ? DESC, bm25(page, 10.0, 3.0, 1.0), rowid LIMIT ?
"""


class Index:
    """Full-text search over articles. Any text is a valid query; ties keep the order of the articles."""

    def __init__(self, articles: Iterable[pages.Article]):
        # The site answers from the thread of its event loop, which need not be the thread that built the index.
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._db.execute(
                "CREATE VIRTUAL TABLE page USING fts5(title, lead, body, title_words UNINDEXED, url UNINDEXED, "
                "snippet UNINDEXED, tokenize='unicode61 remove_diacritics 2')"
            )
        except sqlite3.OperationalError as error:
            raise ConfigError(
                f"world.index: this Python's SQLite {sqlite3.sqlite_version} has no FTS5 ({error}). "
                "Use a Python whose sqlite3 is built with FTS5; the ones of Debian and python.org are."
            ) from error
        self._db.executemany("INSERT INTO page VALUES (?, ?, ?, ?, ?, ?)", map(_row, articles))
        self._search = functools.lru_cache(maxsize=8192)(self._query)

    def search(self, query: str, top_k: int) -> tuple[Hit, ...]:
        """The best `top_k` pages: a page whose title is the query itself first, then by BM25."""
        asked = tuple(_WORD.findall(query[:MAX_QUERY_CHARS].lower())[:MAX_QUERY_WORDS])
        return self._search(asked, max(top_k, 0)) if asked else ()

    def close(self) -> None:
        self._db.close()

    def _query(self, asked: tuple[str, ...], top_k: int) -> tuple[Hit, ...]:
        terms = [word for word in dict.fromkeys(asked) if word not in _STOP] or asked
        match = " OR ".join(f'"{term}"' for term in terms)
        return tuple(Hit(*row) for row in self._db.execute(_SQL, (match, " ".join(asked), top_k)))


def _row(article: pages.Article) -> tuple[str, ...]:
    title_words = " ".join(_WORD.findall(article.title.lower()))
    return article.title, article.lead, article.body, title_words, pages.url(article.title), _snippet(article.lead)


def _snippet(text: str) -> str:
    if len(text) <= SNIPPET_CHARS:
        return text
    return text[:SNIPPET_CHARS].rsplit(" ", 1)[0]
