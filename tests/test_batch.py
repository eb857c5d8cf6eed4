"""The invariants of `PackedBatch.check`, each broken once."""

from __future__ import annotations

import numpy as np
import pytest

from dr_jax.batch import PackedBatch
from dr_jax.errors import BatchError


def good_batch() -> PackedBatch:
    batch = PackedBatch.empty(3, 6)
    batch.token_bt[0] = [5, 6, 7, 8, 9, 0]
    batch.segment_bt[0] = [1, 1, 1, 2, 2, 0]
    batch.position_bt[0] = [0, 1, 2, 0, 1, 0]
    batch.weight_bt[0] = [0, 1, 1, 0, 1, 0]
    batch.logp_bt[0] = [0, -1, -2, 0, -3, 0]
    batch.advantage_bt[0] = [0.5, 0.5, 0.5, -1, -1, 0]
    batch.segment_bt[1] = 1
    batch.position_bt[1] = np.arange(6)
    return batch


def test_a_well_formed_batch_passes():
    good_batch().check()


@pytest.mark.parametrize(
    ("name", "row", "values", "message"),
    [
        ("segment_bt", 0, [1, 1, 3, 3, 3, 0], "segment_bt"),
        ("segment_bt", 0, [1, 1, 0, 2, 2, 0], "segment_bt"),
        ("segment_bt", 0, [0, 0, 1, 1, 1, 1], "segment_bt"),
        ("segment_bt", 2, [-1, 0, 0, 0, 0, 0], "segment_bt"),
        ("position_bt", 0, [0, 1, 2, 3, 4, 0], "position_bt"),
        ("position_bt", 0, [0, 1, 1, 0, 1, 0], "position_bt"),
        ("weight_bt", 0, [1, 1, 1, 0, 1, 0], "weight_bt"),
        ("weight_bt", 0, [0, 1, 1, 1, 1, 0], "weight_bt"),
        ("weight_bt", 0, [0, 1, 1, 0, 1, 1], "weight_bt"),
        ("weight_bt", 0, [0, -1, 1, 0, 1, 0], "weight_bt"),
        ("logp_bt", 0, [0, 0.5, -2, 0, -3, 0], "logp_bt"),
        ("logp_bt", 0, [0, np.nan, -2, 0, -3, 0], "logp_bt"),
        ("advantage_bt", 0, [0.5, 0.5, 0.4, -1, -1, 0], "advantage_bt"),
        ("advantage_bt", 0, [np.inf, np.inf, np.inf, -1, -1, 0], "advantage_bt"),
    ],
)
def test_each_broken_invariant_is_named_with_its_row(name, row, values, message):
    batch = good_batch()
    getattr(batch, name)[row] = values
    with pytest.raises(BatchError, match=f"{message}.*row {row}"):
        batch.check()


def test_wrong_dtype_and_wrong_shape_are_refused():
    batch = good_batch()
    with pytest.raises(BatchError, match="weight_bt"):
        batch._replace(weight_bt=batch.weight_bt.astype(np.float64)).check()
    with pytest.raises(BatchError, match="token_bt"):
        batch._replace(token_bt=batch.token_bt[0]).check()
