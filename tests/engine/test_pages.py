"""The book of pages: found by content, counted, evicted in order, none lost."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.engine.pages import ROOT, Page, Pages, extend_hash

SIZE = 4


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def filled(pages: Pages, parent: bytes, *ids: int) -> Page:
    page = pages.new(parent, tokens(*ids), object())
    page.filled, page.filler = len(ids), None
    pages.show(page)
    return page


def test_a_full_page_is_found_by_everything_up_to_its_end():
    pages = Pages(4, SIZE)
    first = filled(pages, ROOT, 1, 2, 3, 4)
    second = filled(pages, first.hash, 5, 6, 7, 8)
    assert pages.find(extend_hash(ROOT, tokens(1, 2, 3, 4))) is first
    assert pages.find(extend_hash(first.hash, tokens(5, 6, 7, 8))) is second
    assert pages.find(extend_hash(ROOT, tokens(5, 6, 7, 8))) is None


def test_the_closest_page_is_the_one_that_begins_alike_the_longest():
    pages = Pages(4, SIZE)
    filled(pages, ROOT, 1, 9)
    best = filled(pages, ROOT, 1, 2, 3)
    promised = pages.new(ROOT, tokens(7, 7, 7), object())
    pages.show(promised)
    assert pages.closest(ROOT, tokens(1, 2, 4, 4)) == (best, 2)
    assert pages.closest(ROOT, tokens(1, 2, 3, 4)) == (best, 3)
    assert pages.closest(ROOT, tokens(2)) == (None, 0)
    assert pages.closest(b"elsewhere", tokens(1)) == (None, 0)
    assert pages.closest(ROOT, tokens(7, 7)) == (promised, 2)  # it will have them
    promised.filler = None  # it will not
    assert pages.closest(ROOT, tokens(7, 7)) == (None, 0)


def test_who_is_let_go_longest_ago_is_evicted_first():
    pages = Pages(3, SIZE)
    a, b, c = (filled(pages, ROOT, i, i, i, i) for i in range(3))
    for page in (b, a, c):
        pages.let_go(page)
    pages.hold(b)  # found again
    pages.let_go(b)
    for gone in (a, c, b):
        assert pages.new(ROOT, tokens(), object()).index == gone.index
        assert pages.find(extend_hash(ROOT, gone.tokens)) is None
    assert pages.available == 0


def test_what_is_held_is_never_evicted_and_hidden_pages_are_unused_at_once():
    pages = Pages(2, SIZE)
    held, hidden = filled(pages, ROOT, 1, 1, 1, 1), filled(pages, ROOT, 2, 2)
    pages.hide(hidden)
    pages.let_go(hidden)
    assert (pages.available, pages.idle) == (1, 0)
    assert pages.new(ROOT, tokens(), object()).index == hidden.index
    assert pages.find(held.hash) is held


def test_a_page_that_was_not_filled_keeps_what_it_has():
    pages = Pages(2, SIZE)
    page = pages.new(ROOT, tokens(1, 2, 3, 4), object())
    pages.show(page)
    promise = page.hash
    page.filled = 2
    pages.let_go(page)
    assert pages.find(promise) is None
    assert pages.closest(ROOT, tokens(1, 2, 3, 4)) == (page, 2)


def test_forgetting_hides_everything_and_frees_what_nobody_holds():
    pages = Pages(2, SIZE)
    held, idle = filled(pages, ROOT, 1, 1, 1, 1), filled(pages, ROOT, 2, 2)
    pages.let_go(idle)
    hash_ = held.hash
    pages.forget()
    assert (pages.find(hash_), pages.closest(ROOT, tokens(2))) == (None, (None, 0))
    assert (pages.available, pages.idle) == (1, 0)
    pages.let_go(held)
    assert (pages.available, pages.idle) == (2, 0)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_page_is_lost_and_eviction_is_in_order(data):
    """Against a model: holders counted by hand, idle pages in a list."""
    count = 5
    pages, holders, idle = Pages(count, SIZE), {}, []
    for _ in range(data.draw(st.integers(1, 60))):
        can = ["new"] * bool(pages.available) + ["hold"] * bool(holders or idle) + ["let_go"] * bool(holders)
        match data.draw(st.sampled_from([*can, "forget"])):
            case "new":
                evicts = len(holders) + len(idle) == count
                page = filled(pages, ROOT, *data.draw(st.lists(st.integers(0, 1), max_size=SIZE)))
                assert page.index not in {other.index for other in holders}
                if evicts:
                    assert page.index == idle.pop(0).index
                holders[page] = 1
            case "hold":
                page = data.draw(st.sampled_from([*holders, *idle]))
                pages.hold(page)
                holders[page] = holders.get(page, 0) + 1
                idle = [other for other in idle if other is not page]
            case "let_go":
                page = data.draw(st.sampled_from(list(holders)))
                pages.let_go(page)
                holders[page] -= 1
                if not holders[page]:
                    del holders[page]
                    idle += [page] if page.found else []
            case "forget":
                pages.forget()
                idle = []
        assert {page: page.holders for page in holders} == holders
        assert pages.available == count - len(holders)
        assert pages.idle == len(idle)
