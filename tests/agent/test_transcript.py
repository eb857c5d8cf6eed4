from __future__ import annotations

import numpy as np

from dr_jax.agent.chat import Prompt
from dr_jax.agent.transcript import Transcript, seed_of
from dr_jax.records import Finish, Origin, Role, Sampling
from dr_jax.testing import ScriptedSampler


def piece(tokens, origin):
    return Prompt(np.asarray(tokens, np.int32), np.full(len(tokens), origin, np.uint8))


def transcript(script):
    ticks = iter(range(100))
    sampler = ScriptedSampler(script, version=3)
    return Transcript(
        piece([1, 2], Origin.TEMPLATE), sampler=sampler, sampling=Sampling(8), seed=7, clock=lambda: float(next(ticks))
    )


async def test_what_is_sampled_becomes_part_of_the_next_prompt():
    record = transcript([[3, 4], [6]])
    await record.generate()
    record.append(piece([5], Origin.WORLD))
    await record.generate()
    first, second = record.all_calls()
    assert first.prompt.tolist() == [1, 2]
    assert second.prompt.tolist() == [1, 2, 3, 4, 5]
    assert second.origin.tolist() == [0, 0, 2, 2, 1]
    assert (second.id, second.parent, second.version) == (1, 0, 3)
    assert (second.started_s, second.ended_s) == (2.0, 3.0)
    assert record.after_opening().tolist() == [3, 4, 5, 6]
    assert (second.prompt.dtype, second.origin.dtype, second.output.dtype) == (np.int32, np.uint8, np.int32)


async def test_all_calls_lie_in_one_array():
    record = transcript([[3, 4], [6], [8]])
    for turn in range(3):
        await record.generate()
        record.append(piece([5] * turn, Origin.WORLD))
    bases = {id(array.base) for call in record.calls for array in (call.prompt, call.output)}
    assert len(bases) == 1
    assert [call.prompt.tolist() for call in record.calls] == [[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 6, 5]]
    assert [call.output.tolist() for call in record.calls] == [[3, 4], [6], [8]]
    assert record.calls[2].origin.tolist() == [0, 0, 2, 2, 2, 1]


async def test_an_error_leaves_no_call():
    record = transcript([])
    assert (await record.generate()).finish is Finish.ERROR
    assert record.calls == []
    assert record.prompt.tokens.tolist() == [1, 2]


def test_seeds_are_the_same_in_every_process():
    assert seed_of(7, "q1", 0) == 952694101
    assert seed_of("1") != seed_of(1)
    assert all(0 <= seed_of(i) < 2**31 for i in range(100))


async def test_what_is_asked_beside_the_conversation_is_recorded_in_order_of_its_name():
    record = transcript(lambda prompt, sampling: [3])
    await record.generate()
    other = piece([9], Origin.WORLD)
    for name in (("b", 0), ("a", 1), ("a", 0), ("a", 0)):  # the last is the same draw again
        await record.aside(Role.READER, name, other, max_new_tokens=5)
    await record.generate()
    await record.aside(Role.JUDGE, ("a", 0), other, max_new_tokens=5)
    seeds = [sampling.seed for sampling in record._sampler.samplings]
    names = [
        (0,),
        (1, "reader", "b", 0),
        (1, "reader", "a", 1),
        *[(1, "reader", "a", 0)] * 2,
        (1,),
        (2, "judge", "a", 0),
    ]
    assert seeds == [seed_of(7, *name) for name in names]
    calls = record.all_calls()
    assert [(call.id, call.parent, call.role) for call in calls] == [
        (0, None, Role.POLICY), (1, 0, Role.READER), (2, 0, Role.READER), (3, 0, Role.READER),
        (4, 0, Role.POLICY), (5, 4, Role.JUDGE),
    ]  # fmt: skip
    assert record.prompt.tokens.tolist() == [1, 2, 3, 3]
