"""`PackedBatch`: the one thing the host hands to the device.

A `NamedTuple` of numpy arrays is a pytree for free, so the host half runs without JAX. Column t of every array speaks
of token t; the shift by one between a token and the logits that predict it happens once, in
`learner.grpo._ahead`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dr_jax.errors import BatchError

_DTYPES = {
    "token_bt": np.int32, "segment_bt": np.int32, "position_bt": np.int32,
    "weight_bt": np.float32, "logp_bt": np.float32, "advantage_bt": np.float32,
}  # fmt: skip


class PackedBatch(NamedTuple):
    """Packed rows, all `[b, t]`. Several segments (rollouts) may share a row; segment 0 is padding."""

    token_bt: np.ndarray  # int32
    segment_bt: np.ndarray  # int32: 1..k in order, then 0 to the end of the row
    position_bt: np.ndarray  # int32: restarts at 0 with each segment
    weight_bt: np.ndarray  # float32: loss weight; 0 = never trained
    logp_bt: np.ndarray  # float32, nats: the sampler's log-probability where weight > 0, else 0
    advantage_bt: np.ndarray  # float32: constant inside a segment, 0 on padding

    @classmethod
    def empty(cls, rows: int, length: int) -> PackedBatch:
        """All padding: `rows` x `length`."""
        return cls(**{name: np.zeros((rows, length), dtype) for name, dtype in _DTYPES.items()})

    def check(self) -> None:
        """Raises `BatchError` on the first broken invariant, naming the array and the row."""
        for name, dtype in _DTYPES.items():
            array = getattr(self, name)
            if array.dtype != dtype or array.ndim != 2 or array.shape != self.token_bt.shape:
                raise BatchError(f"{name}: got {array.dtype}{array.shape}, need {np.dtype(dtype)}{self.token_bt.shape}")
        same = self.segment_bt[:, 1:] == self.segment_bt[:, :-1]
        _require(_segments_in_order(self.segment_bt), "segment_bt: must be 1..k in order, then 0 to the end of the row")
        starts = np.concatenate([np.ones_like(same[:, :1], bool), ~same], axis=1)
        counted = np.where(starts, 0, np.pad(self.position_bt[:, :-1] + 1, ((0, 0), (1, 0))))
        real = self.segment_bt > 0
        _require(((self.position_bt == counted) | ~real).all(1), "position_bt: must restart at 0 and count up by 1")
        trained = self.weight_bt > 0
        _require((self.weight_bt >= 0).all(1), "weight_bt: must not be negative")
        _require((~trained | (real & ~starts)).all(1), "weight_bt: positive on padding or on a segment's first token")
        legal = np.isfinite(self.logp_bt) & (self.logp_bt <= 0)
        _require((~trained | legal).all(1), "logp_bt: trained tokens need a finite log-probability <= 0")
        _require(np.isfinite(self.advantage_bt).all(1), "advantage_bt: not finite")
        flat = self.advantage_bt[:, 1:] == self.advantage_bt[:, :-1]
        _require((flat | ~same | ~real[:, 1:]).all(1), "advantage_bt: must be constant inside a segment")


def _segments_in_order(segment_bt: np.ndarray) -> np.ndarray:
    """True for rows such as 1 1 2 2 2 3 0 0, and for all-zero rows."""
    step = np.diff(segment_bt, axis=1, prepend=0)
    padding = segment_bt == 0
    padding_to_the_end = (np.diff(padding.astype(np.int8), axis=1) >= 0).all(1)
    return (padding | (step == 0) | (step == 1)).all(1) & (segment_bt >= 0).all(1) & padding_to_the_end


def _require(ok_b: np.ndarray, sentence: str) -> None:
    if not ok_b.all():
        raise BatchError(f"{sentence} (row {int(np.argmin(ok_b))})")
