"""Episodes -> `PackedBatch`. Nothing is re-tokenised: a row holds the very ids the sampler saw and drew.

Calls whose prompts extend each other share one segment (checked on ids); any other call graph simply gives more
segments. The loss mask is a by-product of who wrote each token: weight is 1 on the outputs of the calls that are
trained, 0 elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from dr_jax.batch import PackedBatch
from dr_jax.errors import BatchError
from dr_jax.records import Call, Episode, Role


@dataclasses.dataclass(frozen=True)
class Segment:
    """One run of tokens that is trained as a unit; all arrays [n]."""

    token: np.ndarray  # int32
    weight: np.ndarray  # float32
    logp: np.ndarray  # float32, nats; 0 where weight is 0
    advantage: float


def segments(episode: Episode, advantage: float, role: Role = Role.POLICY) -> tuple[Segment, ...]:
    """The trained segments of an episode: chains of the calls of `role`, merged where each prompt extends the last.

    A reader's prompts are written anew for each part of a page, so each of its calls is a segment."""
    merged: list[Segment] = []
    for call in episode.calls:
        if call.role is not role or len(call.output) == 0:
            continue
        if merged and _extends(call.prompt, merged[-1].token):
            merged[-1] = _append(merged[-1], call)
        else:
            empty = np.zeros(0, np.float32)
            merged.append(_append(Segment(np.zeros(0, np.int32), empty, empty, advantage), call))
    return tuple(merged)


def pack(
    all_segments: Sequence[Segment], *, rows: int, row_tokens: int, optional: Sequence[Segment] = ()
) -> PackedBatch:
    """Segments placed first-fit in the order of falling length into `rows` x `row_tokens`; unused rows stay padding."""
    return pack_by_length(all_segments, rows=rows, lengths=(row_tokens,), optional=optional)[0]


def pack_by_length(
    all_segments: Sequence[Segment], *, rows: int, lengths: Sequence[int], optional: Sequence[Segment] = ()
) -> tuple[PackedBatch, ...]:
    """A batch of `rows` rows for each of `lengths` (tokens, rising), so that a short segment does not pay, in
    attention, for a long row. `place` says which goes where. Raises `BatchError` where there is no room for all."""
    sizes = ([len(segment.token) for segment in some] for some in (all_segments, optional))
    placed = place(next(sizes), rows=rows, lengths=lengths, optional=next(sizes))
    return fill([*all_segments, *optional], placed, rows=rows, lengths=lengths)


def fill(
    all_segments: Sequence[Segment], placed: Sequence[Sequence[Sequence[int]]], *, rows: int, lengths: Sequence[int]
) -> tuple[PackedBatch, ...]:
    """The batches whose rows hold what `place` says; unused rows stay padding."""
    batches = tuple(PackedBatch.empty(rows, length) for length in lengths)
    for batch, filled in zip(batches, placed, strict=True):
        for row, inside in enumerate(filled):
            start = 0
            for number in inside:
                _write(all_segments[number], batch, row, start)
                start += len(all_segments[number].token)
    return batches


def place(
    tokens: Sequence[int], *, rows: int, lengths: Sequence[int], optional: Sequence[int] = ()
) -> tuple[list[list[int]], ...]:
    """For each of `lengths`, what its rows hold: the numbers of segments of so many `tokens`, counted through
    `optional`. Rows are filled from the first on; there may be fewer than `rows`.

    In the order of falling length each segment goes where there is room beside others, longest rows first, and else
    into a new row of the shortest length that holds it. Those of `optional` take what room the others leave, and are
    left out where there is none. All of that depends on lengths and input order alone, so equal rollouts give equal
    batches.

    Raises:
      BatchError: a segment is longer than the longest row, or the segments need more rows than there are.
    """
    placed: tuple[list[list[int]], ...] = tuple([] for _ in lengths)
    used_lb = np.zeros((len(lengths), rows), np.int64)
    sizes = [*tokens, *optional]
    numbers = range(len(tokens)), range(len(tokens), len(sizes))
    for number in itertools.chain(*(sorted(some, key=lambda n: -sizes[n]) for some in numbers)):
        fits_lb = np.asarray(lengths)[:, None] - used_lb >= sizes[number]
        open_lb = fits_lb & (used_lb > 0)
        open_l, fits_l = open_lb.any(1), fits_lb.any(1)
        if not fits_l.any():
            if number >= len(tokens):
                continue
            raise BatchError(
                f"a segment of {sizes[number]} tokens does not fit: {rows} rows of {lengths[-1]} tokens are full. "
                "Raise config.batch.rows or config.batch.row_tokens"
            )
        which = int(np.flatnonzero(open_l)[-1]) if open_l.any() else int(np.argmax(fits_l))
        row = int(np.argmax((open_lb if open_l.any() else fits_lb)[which]))
        if row == len(placed[which]):
            placed[which].append([])
        placed[which][row].append(number)
        used_lb[which, row] += sizes[number]
    return placed


def _write(segment: Segment, batch: PackedBatch, row: int, start: int) -> None:
    at = (row, slice(start, start + len(segment.token)))
    batch.segment_bt[at] = batch.segment_bt[row].max() + 1
    batch.token_bt[at] = segment.token
    batch.position_bt[at] = np.arange(len(segment.token))
    batch.weight_bt[at] = segment.weight
    batch.logp_bt[at] = segment.logp
    batch.advantage_bt[at] = segment.advantage


def _extends(prompt: np.ndarray, prefix: np.ndarray) -> bool:
    return len(prompt) >= len(prefix) and bool(np.array_equal(prompt[: len(prefix)], prefix))


def _append(segment: Segment, call: Call) -> Segment:
    gap = len(call.prompt) - len(segment.token)
    zeros, ones = np.zeros(gap, np.float32), np.ones(len(call.output), np.float32)
    return Segment(
        token=np.concatenate([call.prompt, call.output]).astype(np.int32),
        weight=np.concatenate([segment.weight, zeros, ones]),
        # A log-softmax may round to a hair above 0.
        logp=np.concatenate([segment.logp, zeros, np.minimum(call.logps, 0)]).astype(np.float32),
        advantage=segment.advantage,
    )
