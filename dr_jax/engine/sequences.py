"""Sequences in the making and the pages each of them holds. numpy only; one thread owns it.

A new sequence holds the full pages that others made, or are about to make, for the same beginning, and new pages for
the rest. Where its tokens leave those of all others within a page, it copies that page once it is filled so far. So
whatever is shared is prefilled once, by whoever came first; the others wait for it.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from dr_jax.engine.pages import ROOT, SINK, Page, Pages, extend_hash


@dataclasses.dataclass(eq=False)
class Sequence:
    """Tokens and pages of one request. Positions below `filled` have keys and values; `goal` are to be prefilled."""

    token_s: np.ndarray  # int32 [context]
    length: int  # known tokens
    goal: int
    pages: list[Page]
    shared: int  # of them, from the first on, that were there or promised before
    filled: int = 0
    source: Page | None = None  # to be copied into the first page of its own, as far as it is the same
    common: int = 0  # tokens of `source` that are the same
    stale: bool = False  # what it fills must not be found by others

    @property
    def lacking(self) -> bool:
        return self.filled < self.goal

    @property
    def tokens(self) -> np.ndarray:
        return self.token_s[: self.length]


@dataclasses.dataclass(frozen=True)
class Copy:
    """Page `source` of the pool is to be copied over page `target`."""

    source: int
    target: int


class Sequences:
    """All open sequences of one pool."""

    def __init__(self, pages: Pages, context: int):
        self.pages = pages
        self.context = context
        self.width = -(-context // pages.size)  # pages of a sequence at most
        self.open_ones: dict[Sequence, None] = {}  # in the order they were opened
        self.tokens_kept = 0  # positions that were there already, so far
        self.tokens_copied = 0

    def open(self, tokens: np.ndarray, reusable: int) -> Sequence | None:
        """A sequence that begins with `tokens`, or None while there are too few pages.

        Only its first `reusable` positions may come from the work of others: a score needs the logits of the rest.
        """
        size, goal = self.pages.size, len(tokens) - 1
        shared, parent = self._shared(tokens[: min(goal, reusable) // size * size])
        lacking = -(-len(tokens) // size) - len(shared)
        for page in shared:
            self.pages.hold(page)
        start = len(shared) * size
        source, common = self.pages.closest(parent, tokens[start : min(start + size, goal, reusable)])
        if source:
            self.pages.hold(source)
        if lacking > self.pages.available:
            for page in [*shared, *([source] if source else [])][::-1]:
                self.pages.let_go(page)
            return None
        token_s = np.zeros(self.context, np.int32)
        token_s[: len(tokens)] = tokens
        sequence = Sequence(token_s, len(tokens), goal, shared, len(shared), source=source, common=common)
        for number in range(len(shared), len(shared) + lacking):
            page = self.pages.new(parent, token_s[number * size : min((number + 1) * size, goal)].copy(), sequence)
            sequence.pages.append(page)
            self.pages.show(page)
            parent = extend_hash(parent, page.tokens)
        self.open_ones[sequence] = None
        return sequence

    def _shared(self, tokens: np.ndarray) -> tuple[list[Page], bytes]:
        """(the pages that others have for a beginning of whole pages, the hash of what they hold)."""
        found: list[Page] = []
        hash_, size = ROOT, self.pages.size
        for start in range(0, len(tokens), size):
            longer = extend_hash(hash_, tokens[start : start + size])
            page = self.pages.find(longer)
            if page is None:
                break
            found.append(page)
            hash_ = longer
        return found, hash_

    def settle(self, sequence: Sequence) -> tuple[bool, Copy | None]:
        """(whether `sequence` can be prefilled now, or lacks nothing; what to copy for it first).

        It cannot while another one, opened earlier, fills a page for both; the earliest never waits.
        """
        size = self.pages.size
        while sequence.lacking:
            number, offset = divmod(sequence.filled, size)
            page = sequence.pages[number]
            if page.filled > offset:  # another one filled it
                reached = min(number * size + page.filled, sequence.goal)
                self.tokens_kept += reached - sequence.filled
                sequence.filled = reached
            elif page.filler not in (None, sequence):
                return False, None
            elif sequence.source is not None and number == sequence.shared:
                return self._settle_source(sequence, page)
            else:
                page.filler = sequence
                return True, None
        self._drop_source(sequence)
        return True, None

    def _settle_source(self, sequence: Sequence, page: Page) -> tuple[bool, Copy | None]:
        source = sequence.source
        if source.filled < sequence.common and source.filler is not None:
            return False, None
        held = min(source.filled, sequence.common)
        self._drop_source(sequence)
        if not held:
            return True, None
        page.filled = held
        sequence.filled += held
        self.tokens_copied += held
        return True, Copy(source.index, page.index)

    def _drop_source(self, sequence: Sequence) -> None:
        if sequence.source is not None:
            self.pages.let_go(sequence.source)
            sequence.source = None

    def fill(self, sequence: Sequence, count: int) -> None:
        """Notes that `count` more positions got keys and values."""
        end = sequence.filled + count
        for number in range(sequence.filled // self.pages.size, -(-end // self.pages.size)):
            page, start = sequence.pages[number], number * self.pages.size
            page.filled = min(end - start, self.pages.size)
            page.filler = sequence if page.filled < len(page.tokens) else None
        sequence.filled = end

    def append(self, sequence: Sequence, tokens: np.ndarray) -> None:
        """Notes tokens drawn: all but the last have been fed, so have keys and values."""
        size, start = self.pages.size, sequence.filled
        sequence.token_s[sequence.length : sequence.length + len(tokens)] = tokens
        sequence.length += len(tokens)
        sequence.filled = sequence.length - 1
        for number in range(start // size, -(-sequence.filled // size)):
            page = sequence.pages[number]
            if number and page.parent == ROOT:  # reserved before what it extends was known
                before = sequence.pages[number - 1]
                page.parent = extend_hash(before.parent, before.tokens)
            page.tokens = sequence.token_s[number * size : min((number + 1) * size, sequence.filled)].copy()
            page.filled, page.filler = len(page.tokens), None
            if not sequence.stale:
                self.pages.show(page)

    def reserve(self, sequence: Sequence, length: int) -> bool:
        """Gives `sequence` pages for `length` positions. False while there are too few."""
        lacking = -(-min(length, self.context) // self.pages.size) - len(sequence.pages)
        if lacking > self.pages.available:
            return False
        sequence.pages += [self.pages.new(ROOT, sequence.token_s[:0], sequence) for _ in range(lacking)]
        return True

    def row(self, sequence: Sequence) -> np.ndarray:
        """Its line of the block table: int32 [width], the sink beyond its last page."""
        indices = np.full(self.width, SINK, np.int32)
        indices[: len(sequence.pages)] = [page.index for page in sequence.pages]
        return indices

    def close(self, sequence: Sequence) -> None:
        """Lets go of its pages, the last one first; what they hold may serve others."""
        del self.open_ones[sequence]
        self._drop_source(sequence)
        for page in reversed(sequence.pages):
            if page.filler is sequence:
                page.filler = None
            self.pages.let_go(page)
        sequence.pages = []

    def spoil(self, sequence: Sequence) -> None:
        """What `sequence` holds must not be found again."""
        sequence.stale = True
        for page in sequence.pages:
            self.pages.hide(page)

    def forget(self) -> None:
        """What is held was made by weights of the past: nobody finds it any more, sequences in flight go on with it."""
        self.pages.forget()
        for sequence in self.open_ones:
            sequence.stale = True
