"""The book of sequences: whatever it says is held, is held; siblings wait for one another; nothing waits forever."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.engine.pages import Pages
from dr_jax.engine.sequences import Copy, Sequence, Sequences

SIZE = 8


def tokens(length: int, *tail: int) -> np.ndarray:
    return np.concatenate([np.arange(length), np.array(tail, int)]).astype(np.int32)


def make(pages: int = 40, context: int = 96) -> Sequences:
    return Sequences(Pages(pages, SIZE), context)


def opened(book: Sequences, sequence: np.ndarray) -> Sequence:
    return book.open(sequence, reusable=len(sequence) - 1)


def prefill(book: Sequences, sequence: Sequence) -> int:
    """Number of tokens it had to be prefilled with, once it could be."""
    can_start, _ = book.settle(sequence)
    assert can_start
    count = sequence.goal - sequence.filled
    if count:
        book.fill(sequence, count)
    return count


def test_the_next_turn_lacks_only_what_is_new():
    book = make()
    first = opened(book, tokens(30))
    assert prefill(book, first) == 29
    book.append(first, tokens(3))
    book.close(first)
    again = opened(book, np.concatenate([tokens(30), tokens(3), tokens(5)]))
    assert prefill(book, again) == 37 - 32  # the last token drawn was never fed; of 38, all but the last are wanted
    assert (book.tokens_kept, book.tokens_copied) == (32, 0)


def test_a_part_of_a_page_is_copied():
    book = make()
    first = opened(book, tokens(21, 50, 51))
    prefill(book, first)
    sibling = opened(book, tokens(21, 60, 61))
    can_start, copy = book.settle(sibling)
    assert can_start
    assert copy == Copy(first.pages[2].index, sibling.pages[2].index)
    assert sibling.filled == 21
    assert [page.holders for page in first.pages] == [2, 2, 1]


def test_siblings_wait_for_the_one_that_prefills_their_prompt():
    book = make()
    first, second, third = (opened(book, tokens(30)) for _ in range(3))
    assert book.settle(first) == (True, None)
    assert book.settle(second) == book.settle(third) == (False, None)
    book.fill(first, 20)
    assert book.settle(second) == (False, None)
    book.fill(first, 9)
    for sibling in (second, third):
        assert book.settle(sibling) == (True, Copy(first.pages[3].index, sibling.pages[3].index))
        assert not sibling.lacking


def test_a_sibling_goes_on_where_a_cancelled_one_left_off():
    book = make()
    first, second, third = (opened(book, tokens(30)) for _ in range(3))
    book.settle(first)
    book.fill(first, 12)
    book.close(first)
    assert book.settle(second) == (True, None)
    assert second.filled == 12
    assert book.settle(third) == (False, None)


def test_a_score_reuses_only_what_needs_no_logits():
    book = make()
    prefill(book, opened(book, tokens(40)))
    score = book.open(tokens(40), reusable=19)
    book.settle(score)
    assert score.filled == 19


def test_too_few_pages_take_nothing():
    book = make(pages=5)
    first = opened(book, tokens(20))
    prefill(book, first)
    before = [page.holders for page in first.pages]
    assert opened(book, tokens(16, *range(50, 80))) is None
    assert [page.holders for page in first.pages] == before
    assert book.pages.available == 2
    assert not book.reserve(first, 41)
    assert book.reserve(first, 40)
    book.close(first)
    assert book.pages.available == 5


def test_new_weights_forget_what_is_held_and_what_is_in_flight_when_it_ends():
    book = make()
    in_flight = opened(book, tokens(30))
    prefill(book, in_flight)
    book.forget()
    fresh = opened(book, tokens(30))
    assert prefill(book, fresh) == 29
    assert book.reserve(in_flight, 49)
    book.append(in_flight, tokens(20))
    book.close(in_flight)
    assert prefill(book, opened(book, np.concatenate([tokens(30), tokens(20)]))) == 20


def test_what_is_spoilt_is_not_found():
    book = make()
    spoilt = opened(book, tokens(30))
    prefill(book, spoilt)
    book.spoil(spoilt)
    book.close(spoilt)
    assert prefill(book, opened(book, tokens(30))) == 29
    assert book.pages.idle == 0


HEADS = [np.arange(40) % 7, np.r_[np.arange(40) % 7, np.arange(20)], np.arange(30) % 5]


class World:
    """A model of the true contents of the pool, moved as the engine moves it."""

    def __init__(self, pages: int):
        self.book = make(pages=pages)
        self.truth: dict[int, list[int]] = {}  # page -> tokens whose keys and values it has, by position
        self.count = pages

    def write(self, sequence: Sequence, position: int) -> None:
        index = sequence.pages[position // SIZE].index
        held = self.truth.setdefault(index, [])
        del held[position % SIZE :]
        assert len(held) == position % SIZE, "a position before it was never written"
        held.append(int(sequence.token_s[position]))

    def prefill(self, most: int) -> None:
        """One round as the engine does it; the first that lacks something always gets on."""
        lacking = [sequence for sequence in self.book.open_ones if sequence.lacking]
        before = [(sequence, sequence.filled) for sequence in lacking]
        ready = []
        for sequence in lacking:
            can_start, copy = self.book.settle(sequence)
            if copy:
                self.truth[copy.target] = list(self.truth[copy.source])
            if can_start and sequence.lacking:
                ready.append(sequence)
        for sequence in ready:
            count = min(most, sequence.goal - sequence.filled)
            for position in range(sequence.filled, sequence.filled + count):
                self.write(sequence, position)
            self.book.fill(sequence, count)
        assert not lacking or any(sequence.filled > filled for sequence, filled in before), "all wait"

    def draw(self, sequence: Sequence, new: list[int]) -> None:
        if not self.book.reserve(sequence, sequence.length + len(new) - 1):
            return
        start = sequence.length - 1
        for number, token in enumerate(new):
            sequence.token_s[start + 1 + number] = token
            self.write(sequence, start + number)
        self.book.append(sequence, np.array(new, np.int32))

    def check(self) -> None:
        held: dict[int, int] = {}
        for sequence in self.book.open_ones:
            for number, page in enumerate(sequence.pages):
                held[page.index] = held.get(page.index, 0) + 1
                want = sequence.token_s[number * SIZE : min(sequence.filled, (number + 1) * SIZE)].tolist()
                assert self.truth.get(page.index, [])[: len(want)] == want
            if sequence.source is not None:
                held[sequence.source.index] = held.get(sequence.source.index, 0) + 1
        assert self.book.pages.available == self.count - len(held)
        pages = {page.index: page for sequence in self.book.open_ones for page in sequence.pages}
        assert all(pages[index].holders == count for index, count in held.items() if index in pages)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_whatever_is_said_to_be_held_is_held(data):
    """Random traffic over sequences that share beginnings, in a pool that is too small for them."""
    world = World(data.draw(st.integers(12, 40)))
    book = world.book
    for _ in range(data.draw(st.integers(1, 30))):
        live = list(book.open_ones)
        can = ["open"] * (len(live) < 5) + ["prefill", "draw", "close"] * bool(live) + ["forget"]
        match data.draw(st.sampled_from(can)):
            case "open":
                tail = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=12))
                sequence = np.concatenate([data.draw(st.sampled_from(HEADS)), tail]).astype(np.int32)
                book.open(sequence, reusable=data.draw(st.integers(0, len(sequence) - 1)))
            case "prefill":
                world.prefill(data.draw(st.integers(1, 40)))
            case "draw":
                able = [sequence for sequence in live if not sequence.lacking and sequence.length < 90]
                if able:
                    new = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
                    world.draw(data.draw(st.sampled_from(able)), new)
            case "close":
                book.close(data.draw(st.sampled_from(live)))
            case "forget":
                book.forget()
        world.check()
    for sequence in list(book.open_ones):
        book.close(sequence)
    assert book.pages.available == world.count
