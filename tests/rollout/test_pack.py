"""Packing: what was sampled is what is trained, whatever the row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.errors import BatchError
from dr_jax.records import Call, Episode, Finish, Origin, Question, Role, StopReason
from dr_jax.rollout.pack import Segment, pack, pack_by_length, segments

QUESTION = Question("q", "?", ("a",))


def call(prompt, output, *, role=Role.POLICY, parent=None, logp=-0.5) -> Call:
    return Call(
        id=0, parent=parent, role=role, prompt=np.array(prompt, np.int32),
        origin=np.full(len(prompt), Origin.TEMPLATE, np.uint8), output=np.array(output, np.int32),
        logps=np.full(len(output), logp, np.float32), finish=Finish.STOP, version=0, started_s=0, ended_s=1,
    )  # fmt: skip


def episode(*calls: Call) -> Episode:
    return Episode(QUESTION, 0, calls, (), StopReason.ANSWERED)


def test_a_chain_is_one_segment_and_only_outputs_are_weighted():
    # prompt 1 2 3 -> 4 5; world adds 6 7 -> 8
    first, second = call([1, 2, 3], [4, 5], logp=-0.1), call([1, 2, 3, 4, 5, 6, 7], [8], logp=-0.2)
    (segment,) = segments(episode(first, second), 1.5)
    assert segment.token.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert segment.weight.tolist() == [0, 0, 0, 1, 1, 0, 0, 1]
    np.testing.assert_allclose(segment.logp, [0, 0, 0, -0.1, -0.1, 0, 0, -0.2])
    assert segment.advantage == 1.5


def test_a_rebuilt_context_is_a_segment_of_its_own():
    calls = call([1, 2], [3]), call([9, 2], [4])
    assert [s.token.tolist() for s in segments(episode(*calls), 0.0)] == [[1, 2, 3], [9, 2, 4]]


def test_a_changed_token_in_the_history_is_never_trained_as_if_it_had_been_sampled():
    # The second prompt holds 7 where 3 was drawn: the chain is broken, so both are kept as they were.
    calls = call([1, 2], [3]), call([1, 2, 7, 5], [4])
    assert [s.weight.tolist() for s in segments(episode(*calls), 0.0)] == [[0, 0, 1], [0, 0, 0, 0, 1]]


def test_calls_of_other_roles_are_not_trained():
    assert segments(episode(call([1], [2], role=Role.READER)), 1.0) == ()


def test_calls_of_a_reader_are_segments_of_their_own_where_they_are_asked_for():
    calls = (
        call([1, 2], [3, 4], logp=-0.1),
        call([9, 8, 7], [6, 5], role=Role.READER, logp=-0.2),
        call([9, 8, 8], [6], role=Role.READER, logp=-0.3),
        call([1, 2, 3, 4, 5], [6], logp=-0.4),
    )
    (conversation,) = segments(episode(*calls), 1.5)
    assert conversation.token.tolist() == [1, 2, 3, 4, 5, 6]
    assert conversation.weight.tolist() == [0, 0, 1, 1, 0, 1]
    first, second = segments(episode(*calls), 1.5, Role.READER)
    assert (first.token.tolist(), first.weight.tolist()) == ([9, 8, 7, 6, 5], [0, 0, 0, 1, 1])
    np.testing.assert_allclose(first.logp, [0, 0, 0, -0.2, -0.2])
    assert (second.token.tolist(), second.weight.tolist()) == ([9, 8, 8, 6], [0, 0, 0, 1])
    np.testing.assert_allclose(second.logp, [0, 0, 0, -0.3])
    assert (first.advantage, second.advantage) == (1.5, 1.5)
    batch = pack([conversation], rows=2, row_tokens=8, optional=[first, second])
    batch.check()
    assert batch.segment_bt.tolist() == [[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]  # the last found no room
    np.testing.assert_array_equal(batch.token_bt[1, :5], first.token)


def test_optional_segments_take_only_room_that_is_left():
    def of(length):
        return Segment(np.full(length, length, np.int32), np.zeros(length, np.float32), np.zeros(length, np.float32), 0)

    batch = pack([of(3), of(6)], rows=2, row_tokens=8, optional=[of(8), of(2), of(5), of(1)])
    assert batch.token_bt.tolist() == [[6] * 6 + [2, 2], [3, 3, 3, 5, 5, 5, 5, 5]]


def test_a_log_probability_a_hair_above_zero_is_clipped():
    (segment,) = segments(episode(call([1], [2], logp=1e-7)), 1.0)
    assert segment.logp.max() <= 0


def test_too_long_and_too_many_are_errors_that_name_the_setting():
    long = Segment(np.zeros(9, np.int32), np.zeros(9, np.float32), np.zeros(9, np.float32), 0.0)
    with pytest.raises(BatchError, match="9 tokens.*config.batch"):
        pack([long], rows=1, row_tokens=8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 16), max_size=20))
def test_pack_then_read_back_is_the_identity(lengths):
    made = []
    for index, length in enumerate(lengths):
        token = np.arange(length, dtype=np.int32) + 100 * index
        weight = (np.arange(length) % 2).astype(np.float32)
        made.append(Segment(token, weight, -weight, float(index)))
    batch = pack(made, rows=20, row_tokens=16)
    batch.check()
    read = {}
    for row in range(20):
        for number in range(1, batch.segment_bt[row].max() + 1):
            at = batch.segment_bt[row] == number
            read[batch.token_bt[row][at].tobytes()] = (batch.weight_bt[row][at], batch.advantage_bt[row][at])
    assert len(read) == len(made)
    for segment in made:
        weight, advantage = read[segment.token.tobytes()]
        np.testing.assert_array_equal(weight, segment.weight)
        assert (advantage == segment.advantage).all()


def test_rows_fill_from_the_top_so_that_the_rest_of_the_batch_is_padding():
    made = [Segment(np.ones(8, np.int32), np.zeros(8, np.float32), np.zeros(8, np.float32), 0.0)] * 3
    assert (pack(made, rows=6, row_tokens=16).segment_bt.max(1) > 0).tolist() == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]


def segment_of(length: int) -> Segment:
    weight = np.ones(length, np.float32)
    weight[0] = 0
    return Segment(np.full(length, length, np.int32), weight, -weight, 1.0)


def test_a_segment_goes_beside_others_or_into_the_shortest_row_that_holds_it():
    packed = pack_by_length([segment_of(n) for n in (3, 9, 4, 16, 2, 8, 8)], rows=3, lengths=(8, 16))
    for batch, length in zip(packed, (8, 16), strict=True):
        batch.check()
        assert batch.token_bt.shape == (3, length)
    short, long = ([[int(n) for n in dict.fromkeys(row.tolist()) if n] for row in batch.token_bt] for batch in packed)
    assert long == [[16], [9, 4, 3], []]  # what is open and long takes short ones first
    assert short == [[8], [8], [2]]


def test_every_length_can_hold_all_segments_and_the_longest_row_is_the_limit():
    packed = pack_by_length([segment_of(8)] * 3, rows=3, lengths=(8, 16))
    assert [int((batch.segment_bt > 0).any(1).sum()) for batch in packed] == [3, 0]
    with pytest.raises(BatchError, match="17 tokens does not fit: 3 rows of 16 tokens are full"):
        pack_by_length([segment_of(17)], rows=3, lengths=(8, 16))
