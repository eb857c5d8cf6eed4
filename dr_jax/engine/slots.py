"""What each slot holds, and for whom: the host's book of the cache. numpy only; one thread owns it.

A slot that is given back keeps its tokens, and its keys and values with them. A new sequence takes the slot that holds
nothing but a prefix of it (an episode's next turn extends the last one exactly); if there is none, it takes the slot
given back longest ago. Whatever longer prefix another slot holds (siblings of one question, a shared system prompt) is
copied, and a sequence waits for a slot that is about to hold it.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import numpy as np

_WORTH = 16  # tokens; a shorter prefix is not worth a copy, or a wait


class Prefix(enum.Enum):
    """What to do before the first token of a sequence is prefilled."""

    READY = enum.auto()
    WAIT = enum.auto()  # another slot is about to hold a longer prefix


class Copy(NamedTuple):
    """A prefix worth copying: the first `length` positions of slot `source`."""

    source: int
    length: int


class Slots:
    """Tokens, fill and free list of all slots."""

    def __init__(self, slots: int, context: int):
        self.token_bs = np.zeros((slots, context), np.int32)
        self.length_b = np.zeros(slots, np.int32)  # known tokens
        self.filled_b = np.zeros(slots, np.int32)  # of them, with keys and values in the cache
        self.goal_b = np.zeros(slots, np.int32)  # of them, to be prefilled: all but the last
        self._reusable_b = np.zeros(slots, np.int32)  # of them, whose keys and values may come from earlier work
        self.busy_b = np.zeros(slots, bool)
        self._stale_b = np.zeros(slots, bool)  # what is filled must not be shared or kept
        self._clock_b = np.zeros(slots, np.int64)  # when it was last taken or given back
        self._shared_bb = np.zeros((slots, slots), np.int32)  # common prefix; a lower bound, as slots grow
        self._now = 0

    def lacking(self) -> list[int]:
        """Slots with tokens still to be prefilled, in the order in which they were taken."""
        lacking_b = self.busy_b & (self.filled_b < self.goal_b)
        return sorted(np.flatnonzero(lacking_b).tolist(), key=self._clock_b.__getitem__)

    def take(self, tokens: np.ndarray, reusable: int) -> int:
        """The slot now held for `tokens`; at most the first `reusable` may come from earlier work. Needs a free
        slot."""
        goal = len(tokens) - 1
        shared_b = self._common_prefix(tokens[:goal])
        exact_b = ~self.busy_b & (self.filled_b > 0) & (shared_b >= self.filled_b)
        if exact_b.any():
            slot = int(np.argmax(np.where(exact_b, self.filled_b, -1)))
        else:
            slot = int(np.argmin(np.where(self.busy_b, np.iinfo(np.int64).max, self._clock_b)))
        self.filled_b[slot] = min(self.filled_b[slot], shared_b[slot], reusable)
        self.token_bs[slot, : len(tokens)] = tokens
        self.length_b[slot], self.goal_b[slot], self._reusable_b[slot] = len(tokens), goal, reusable
        self._shared_bb[slot], self._shared_bb[:, slot] = shared_b, shared_b
        self._shared_bb[slot, slot] = 0
        self.busy_b[slot], self._stale_b[slot] = True, False
        self._clock_b[slot] = self._tick()
        return slot

    def _common_prefix(self, tokens: np.ndarray) -> np.ndarray:
        same_bs = self.token_bs[:, : len(tokens)] == tokens[None]
        same_bs &= np.arange(len(tokens))[None] < self.length_b[:, None]
        return np.where(same_bs.all(1), len(tokens), np.argmin(same_bs, axis=1)) if len(tokens) else 0 * self.length_b

    def prefix(self, slot: int) -> Prefix | Copy:
        """What to do before `slot` is prefilled. A slot waits only for one taken earlier, so some slot never waits."""
        shared_b = np.where(self._stale_b, 0, np.minimum(self._shared_bb[slot], self._reusable_b[slot]))
        earlier_b = self.busy_b & (self._clock_b < self._clock_b[slot])
        coming_b = np.where(earlier_b & (self.filled_b < shared_b), np.minimum(shared_b, self.goal_b), 0)
        held_b = np.where(coming_b > self.filled_b, 0, np.minimum(shared_b, self.filled_b))
        source = int(np.argmax(held_b))
        if coming_b.max() >= max(self.filled_b[slot], held_b[source]) + _WORTH:
            return Prefix.WAIT
        return Copy(source, int(held_b[source])) if held_b[source] >= self.filled_b[slot] + _WORTH else Prefix.READY

    def append(self, slot: int, tokens: np.ndarray) -> None:
        """Notes tokens drawn in `slot`: all but the last have been fed, so have keys and values."""
        self.token_bs[slot, self.length_b[slot] : self.length_b[slot] + len(tokens)] = tokens
        self.length_b[slot] += len(tokens)
        self.filled_b[slot] = self.length_b[slot] - 1

    def give_back(self, slot: int) -> None:
        """Frees `slot`; what it holds may serve the next sequence."""
        self.busy_b[slot] = False
        self._clock_b[slot] = self._tick()
        if self._stale_b[slot]:
            self.filled_b[slot] = 0

    def spoil(self, slot: int) -> None:
        """Marks what `slot` holds as not to be shared or kept."""
        self._stale_b[slot] = True

    def forget(self) -> None:
        """Marks everything held as made by weights of the past. Sequences in flight go on with it."""
        self._stale_b = self.busy_b.copy()
        self.filled_b[~self.busy_b] = 0

    def _tick(self) -> int:
        self._now += 1
        return self._now
