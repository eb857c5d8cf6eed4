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
    """Segments placed first-fit in the order of falling length into `rows` x `row_tokens`; unused rows stay padding.

    Those of `optional` take what room the others leave, and are left out where there is none. Which row a segment lands
    in depends on lengths and input order alone, so equal rollouts give equal batches.

    Raises:
      BatchError: a segment is longer than a row, or the segments need more rows than there are.
    """
    batch = PackedBatch.empty(rows, row_tokens)
    used_b = np.zeros(rows, np.int64)
    count_b = np.zeros(rows, np.int32)
    in_order = (sorted(some, key=lambda s: -len(s.token)) for some in (all_segments, optional))
    for number, segment in enumerate(itertools.chain(*in_order)):
        length = len(segment.token)
        fits = used_b + length <= row_tokens
        if not fits.any():
            if number >= len(all_segments):
                continue
            raise BatchError(
                f"a segment of {length} tokens does not fit: {rows} rows of {row_tokens} tokens are full. "
                "Raise config.batch.rows or config.batch.row_tokens"
            )
        row = int(np.argmax(fits))
        place = slice(used_b[row], used_b[row] + length)
        count_b[row] += 1
        used_b[row] += length
        batch.token_bt[row, place] = segment.token
        batch.segment_bt[row, place] = count_b[row]
        batch.position_bt[row, place] = np.arange(length)
        batch.weight_bt[row, place] = segment.weight
        batch.logp_bt[row, place] = segment.logp
        batch.advantage_bt[row, place] = segment.advantage
    return batch


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
