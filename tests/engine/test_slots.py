"""The book of the cache: whatever it says is held, is held; siblings wait for one another; nothing waits forever."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.engine.slots import Copy, Prefix, Slots

SYSTEM = np.arange(100)


def tokens(*tail: int, head: np.ndarray = SYSTEM) -> np.ndarray:
    return np.concatenate([head, np.array(tail, int)]).astype(np.int32)


def fill(slots: Slots, slot: int) -> None:
    slots.filled_b[slot] = slots.goal_b[slot]


def serve(slots: Slots, sequence: np.ndarray, *drawn: int) -> int:
    """Takes a slot, prefills it, draws, gives it back."""
    slot = slots.take(sequence, reusable=len(sequence) - 1)
    fill(slots, slot)
    slots.append(slot, np.array(drawn, np.int32))
    slots.give_back(slot)
    return slot


def test_the_next_turn_takes_its_own_slot_and_lacks_only_what_is_new():
    slots = Slots(3, 200)
    others = [serve(slots, tokens(1), 7), serve(slots, tokens(2), 7)]
    first = serve(slots, tokens(3), 50, 51)  # 103 tokens, the last one was never fed
    assert first not in others
    again = slots.take(tokens(3, 50, 51, 60, 61), reusable=104)
    assert again == first
    assert slots.filled_b[again] == 102
    assert slots.goal_b[again] == 104


def test_a_new_sequence_takes_the_slot_given_back_longest_ago_and_copies_the_longest_prefix():
    slots = Slots(3, 200)
    oldest = serve(slots, np.arange(500, 550, dtype=np.int32), 7)
    source = serve(slots, tokens(1, 2), 3)
    serve(slots, tokens(9), 3)
    slot = slots.take(tokens(1, 2, 3, 4, 5), reusable=104)  # extends `source` exactly
    assert slot == source
    sibling = slots.take(tokens(1, 2, 30, 40), reusable=103)
    assert sibling == oldest
    assert slots.prefix(sibling) == Copy(source, 102)


def test_siblings_wait_for_the_one_that_prefills_their_prompt():
    slots = Slots(3, 200)
    first, second, third = (slots.take(tokens(1), reusable=100) for _ in range(3))
    assert slots.prefix(first) is Prefix.READY
    assert slots.prefix(second) is slots.prefix(third) is Prefix.WAIT
    slots.filled_b[first] = 60
    assert slots.prefix(second) is Prefix.WAIT
    fill(slots, first)
    assert slots.prefix(second) == Copy(first, 100)


def test_a_short_prefix_is_worth_neither_a_wait_nor_a_copy():
    slots = Slots(2, 200)
    slots.take(tokens(1, head=SYSTEM[:15]), reusable=15)
    second = slots.take(tokens(2, head=SYSTEM[:15]), reusable=15)
    assert slots.prefix(second) is Prefix.READY


def test_a_sequence_does_not_wait_for_little_more_than_is_held():
    slots = Slots(3, 200)
    serve(slots, tokens(1, 2, 3))
    slots.take(tokens(4, 5, 6, 7), reusable=103)
    second = slots.take(tokens(4, 5, 6, 8), reusable=103)  # 103 coming, 100 held
    assert isinstance(slots.prefix(second), Copy)


def test_scores_reuse_only_what_needs_no_logits():
    slots = Slots(2, 200)
    serve(slots, tokens(1, 2, 3, 4), 5)
    slot = slots.take(tokens(1, 2, 3, 4), reusable=99)
    assert slots.prefix(slot) == Copy(0, 99)


def test_new_weights_forget_what_is_held_and_what_is_in_flight_when_it_ends():
    slots = Slots(2, 200)
    serve(slots, tokens(1), 5)
    in_flight = slots.take(tokens(2), reusable=100)
    fill(slots, in_flight)
    slots.forget()
    fresh = slots.take(tokens(1, 5), reusable=101)
    assert slots.filled_b[fresh] == 0
    assert slots.prefix(fresh) is Prefix.READY
    assert slots.filled_b[in_flight] == 100
    slots.give_back(in_flight)
    assert slots.filled_b[in_flight] == 0


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_is_said_to_be_held_is_held(data):
    """A model of the true cache contents, driven by random traffic over sequences that share prefixes."""
    slots, truth = Slots(3, 96), [[] for _ in range(3)]
    heads = [np.arange(40) % 7, np.r_[np.arange(40) % 7, np.arange(20)], np.arange(30) % 5]
    live: set[int] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        free = 3 - len(live)
        action = data.draw(st.sampled_from(["take"] * bool(free) + ["work", "end"] * bool(live) + ["forget"]))
        if action == "take":
            head = data.draw(st.sampled_from(heads))
            tail = data.draw(st.lists(st.integers(0, 1), min_size=2, max_size=12))
            sequence = np.concatenate([head, tail]).astype(np.int32)
            live.add(slots.take(sequence, reusable=data.draw(st.integers(0, len(sequence) - 1))))
        elif action == "work":
            work(slots, truth, data.draw(st.integers(1, 40)))
        elif action == "end":
            slot = data.draw(st.sampled_from(sorted(live)))
            slots.give_back(slot)
            live.discard(slot)
        else:
            slots.forget()
            for slot in set(range(3)) - live:
                truth[slot] = []
        for slot in range(3):
            filled = slots.filled_b[slot]
            assert truth[slot][:filled] == slots.token_bs[slot, :filled].tolist()
            assert slots.filled_b[slot] <= slots.length_b[slot]


def work(slots: Slots, truth: list[list[int]], count: int) -> None:
    """One round as the engine does it: settle prefixes, prefill a chunk of the first ready slot, else draw."""
    lacking = slots.lacking()
    for slot in lacking:
        match slots.prefix(slot):
            case Prefix.WAIT:
                assert slot != lacking[0], "the first in line waits"
                continue
            case Copy(source, length):
                assert len(truth[source]) >= length
                truth[slot] = truth[source][:length]
                slots.filled_b[slot] = length
        start = slots.filled_b[slot]
        end = min(start + count, slots.goal_b[slot])
        truth[slot] = truth[slot][:start] + slots.token_bs[slot, start:end].tolist()
        slots.filled_b[slot] = end
        return
    for slot in np.flatnonzero(slots.busy_b):
        new = np.arange(min(count, 96 - slots.length_b[slot]), dtype=np.int32) % 3
        if len(new):
            truth[slot] = slots.token_bs[slot, : slots.length_b[slot]].tolist() + new[:-1].tolist()
            slots.append(slot, new)
