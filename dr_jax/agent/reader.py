"""A reader of pages that needs no model: it quotes the sentences that share most with the question."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence

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
_MIN_SHARE_OF_BEST = 0.5


@dataclasses.dataclass(frozen=True)
class ExtractiveReader:
    """Quotes at most `max_sentences` sentences of a page, `max_chars` in all, in reading order.

    A sentence scores the inverse frequency (over the sentences read) of each content word that it shares with the
    question or the query, title words at a quarter. Reading stops after `max_segments`, or where the first `patience`
    segments share no word but the title's. *Differs from the paper*, whose reader is a language model.
    """

    max_sentences: int = 3
    max_chars: int = 600
    max_segments: int = 24
    patience: int = 3

    async def read(self, page: Page, *, question: str, query: str, notes: Sequence[str]) -> tuple[tuple[int, str], ...]:
        # In a thread: a long page takes tens of milliseconds, which the event loop does not have.
        return await asyncio.to_thread(self._read, page, f"{question} {query}", notes)

    def _read(self, page: Page, wanted: str, notes: Sequence[str]) -> tuple[tuple[int, str], ...]:
        stems = _stems(wanted)
        title = _stems(page.title)
        sentences = self._walk(page.segments, stems - title)
        weight = _weights(stems, title, [words for _, _, words in sentences])
        scored = [
            (sum(weight[word] for word in words & stems), place, segment, text)
            for place, (segment, text, words) in enumerate(sentences)
            if not any(text in note for note in notes)
        ]
        ranked = sorted((row for row in scored if row[0] > 0), key=lambda row: (-row[0], row[1]))
        best = [row for row in ranked if row[0] >= _MIN_SHARE_OF_BEST * ranked[0][0]]
        return self._quote((segment, text) for _, _, segment, text in _within(best, self.max_sentences, self.max_chars))

    def _walk(self, segments: Sequence[str], telling: frozenset[str]) -> list[tuple[int, str, frozenset[str]]]:
        """(segment, sentence, stems) of what is read before the reader gives up."""
        sentences: list[tuple[int, str, frozenset[str]]] = []
        relevant = False
        for index, segment in enumerate(segments[: self.max_segments]):
            if index == self.patience and not relevant:
                break
            for text in _SENTENCE_END.split(segment):
                if text := " ".join(text.split())[: self.max_chars]:
                    words = _stems(text)
                    relevant = relevant or bool(words & telling)
                    sentences.append((index, text, words))
        return sentences

    @staticmethod
    def _quote(sentences: Iterable[tuple[int, str]]) -> tuple[tuple[int, str], ...]:
        by_segment: dict[int, list[str]] = collections.defaultdict(list)
        for segment, text in sentences:
            by_segment[segment].append(text)
        return tuple((segment, " ".join(texts)) for segment, texts in by_segment.items())


def _within(
    ranked: Sequence[tuple[float, int, int, str]], max_sentences: int, max_chars: int
) -> list[tuple[float, int, int, str]]:
    """The best rows that fit both limits, repeated sentences once, back in reading order."""
    chosen: dict[str, tuple[float, int, int, str]] = {}
    for row in ranked:
        fits = sum(map(len, chosen)) + len(row[3]) <= max_chars
        if len(chosen) < max_sentences and fits:
            chosen.setdefault(row[3], row)
    return sorted(chosen.values(), key=lambda row: row[1])


def _stems(text: str) -> frozenset[str]:
    words = _WORD.findall(text.lower())
    return frozenset(word[:_STEM_CHARS] for word in words if word not in _STOP_WORDS)


def _weights(stems: frozenset[str], title: frozenset[str], sentences: Sequence[frozenset[str]]) -> Mapping[str, float]:
    count = collections.Counter(word for words in sentences for word in words & stems)
    return {
        word: math.log(1 + len(sentences) / n) * (_TITLE_WEIGHT if word in title else 1.0) for word, n in count.items()
    }
