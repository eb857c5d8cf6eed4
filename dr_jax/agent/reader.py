"""A reader of pages that needs no model: it quotes the sentences that share most with the question."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from dr_jax.records import Page

_SENTENCE_END = re.compile(r"\n+|(?<=[.!?])\s+(?=[^\sa-z])")
_WORD = re.compile(r"\w+")
_STOP_WORDS = frozenset(
    _WORD.findall("""
    a an and are as at be been but by can could did do does for from had has have he her hers him his how i if in into
    is it its many me more most much my name no not of on or our she so some such than that the their them then
    there these they this those to was we were what when where which while who whom whose why will with would you your
    """)
)
_STEM_CHARS = 5  # "director" and "directed" meet; the usual length of truncation stemming
_TITLE_WEIGHT = 0.25  # every sentence of a page about X names X: that says little


@dataclasses.dataclass(frozen=True)
class _Sentence:
    segment: int
    text: str
    words: frozenset[str]  # stems


@dataclasses.dataclass(frozen=True)
class ExtractiveReader:
    """Quotes at most `max_sentences` sentences of a page, `max_chars` in all, in reading order.

    A sentence scores the inverse frequency (over the sentences read) of each content word that it shares with the
    question or the query, title words at a quarter; one that shares nothing but title words is quoted only where no
    other does better. Parts whose headings speak of what is asked for are read first. Reading stops after
    `max_segments`; a page about something else (most of its title is not asked for) also where the first `patience`
    segments share nothing but title words.
    *Differs from the paper*, whose reader is a language model.
    """

    max_sentences: int = 3
    max_chars: int = 600
    max_segments: int = 24
    patience: int = 3

    async def read(self, page: Page, *, question: str, query: str, notes: Sequence[str]) -> tuple[tuple[int, str], ...]:
        # In a thread: a long page takes tens of milliseconds, which the event loop does not have.
        return await asyncio.to_thread(self._read, page, f"{question} {query}", notes)

    def _read(self, page: Page, wanted: str, notes: Sequence[str]) -> tuple[tuple[int, str], ...]:
        wanted_words, title = _stems(wanted), _stems(page.title)
        sentences = self._walk(page, wanted_words, title)
        weight = _weights(wanted_words, title, sentences)
        # What repeats the question alone, such as a heading, tells nothing; nor does what is known.
        news = [s for s in sentences if s.words - wanted_words and not any(s.text in note for note in notes)]
        telling = [s for s in news if s.words & (wanted_words - title)]
        ranked = sorted(telling or [s for s in news if s.words & wanted_words], key=weight, reverse=True)
        chosen = set(map(id, self._within_limits(ranked)))
        return _by_segment(s for s in news if id(s) in chosen)

    def _walk(self, page: Page, wanted: frozenset[str], title: frozenset[str]) -> list[_Sentence]:
        """What is read before the reader gives up, in the order of the page."""
        sentences: list[_Sentence] = []
        relevant = 2 * len(title & wanted) > len(title)
        for count, index in enumerate(_jumping(page, wanted - title)[: self.max_segments]):
            if count == self.patience and not relevant:
                break
            for text in _SENTENCE_END.split(page.segments[index]):
                text = " ".join(text.split())[: self.max_chars]
                words = _stems(text)
                relevant = relevant or bool(words & wanted - title)
                if words and not text.startswith("#"):
                    sentences.append(_Sentence(index, text, words))
        return sorted(sentences, key=lambda sentence: sentence.segment)

    def _within_limits(self, ranked: Iterable[_Sentence]) -> Iterator[_Sentence]:
        quoted: set[str] = set()
        for sentence in ranked:
            room = self.max_chars - sum(map(len, quoted))
            if len(quoted) < self.max_sentences and len(sentence.text) <= room and sentence.text not in quoted:
                quoted.add(sentence.text)
                yield sentence


def reading_order(page: Page, wanted: str) -> list[int]:
    """The segments of `page`, first those whose headings speak of more of `wanted` than the title does."""
    return _jumping(page, _stems(wanted) - _stems(page.title))


def _jumping(page: Page, telling: frozenset[str]) -> list[int]:
    """The segments of `page`, first those that lie under a heading with one of the words `telling`."""
    promising = {i for i, path in enumerate(page.headings) if _stems(path) & telling}
    return sorted(range(len(page.segments)), key=lambda index: index not in promising)


def _by_segment(sentences: Iterable[_Sentence]) -> tuple[tuple[int, str], ...]:
    groups = itertools.groupby(sentences, lambda sentence: sentence.segment)
    return tuple((segment, " ".join(sentence.text for sentence in group)) for segment, group in groups)


def _stems(text: str) -> frozenset[str]:
    words = _WORD.findall(text.lower())
    return frozenset(word[:_STEM_CHARS] for word in words if word not in _STOP_WORDS)


def _weights(
    wanted: frozenset[str], title: frozenset[str], sentences: Sequence[_Sentence]
) -> Callable[[_Sentence], float]:
    count = collections.Counter(word for sentence in sentences for word in sentence.words & wanted)
    weight = {
        word: math.log(1 + len(sentences) / n) * (_TITLE_WEIGHT if word in title else 1.0) for word, n in count.items()
    }
    # Sorted: the order of a set of strings changes from process to process, and with it the last bit of the sum.
    return lambda sentence: sum(weight[word] for word in sorted(sentence.words & wanted))
