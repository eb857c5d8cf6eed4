"""What a round does: each token is prefilled once, whoever shares it; reuse changes nothing but the work."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest

from dr_jax.records import Finish, Sampling


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, length).astype(np.int32)


@pytest.fixture
def fresh(engine, params):
    """The engine, with nothing kept from earlier tests."""
    engine.set_weights(params, 0)
    return engine


@contextlib.contextmanager
def counted(engine):
    """A dict that holds, after the block, by how much each count grew."""
    before, grown = engine.stats(), {}
    yield grown
    after = engine.stats()
    grown.update({name: after[name] - before.get(name, 0) for name in after})


async def test_siblings_prefill_their_prompt_once(fresh):
    with counted(fresh) as work:
        await asyncio.gather(*(fresh.generate(prompt(90), Sampling(3, seed=seed)) for seed in range(8)))
    assert work["tokens_prefilled"] == 89
    assert work["tokens_kept"] + work["tokens_copied"] == 7 * 89


async def test_the_next_turn_prefills_only_what_is_new(fresh):
    first = await fresh.generate(prompt(90), Sampling(10))
    others = [fresh.generate(prompt(50, seed), Sampling(3)) for seed in range(1, 4)]
    await asyncio.gather(*others)
    with counted(fresh) as work:
        await fresh.generate(np.concatenate([prompt(90), first.tokens, prompt(20, 9)]), Sampling(10))
    # The last drawn token was never fed, and the last of the prompt is fed when the first token is drawn.
    assert work["tokens_prefilled"] == 20
    assert work["tokens_kept"] == 99


async def test_questions_share_the_system_prompt(fresh):
    system = prompt(100)
    questions = [np.concatenate([system, prompt(30, seed)]) for seed in range(1, 4)]
    with counted(fresh) as work:
        await asyncio.gather(*(fresh.generate(question, Sampling(3)) for question in questions))
    assert work["tokens_prefilled"] == 129 + 2 * 29


async def test_tokens_do_not_depend_on_reuse(fresh, params):
    async def conversation(forget: bool):
        turns, text = [], prompt(40)
        for turn in range(4):
            if forget:
                await asyncio.to_thread(fresh.set_weights, params, 0)
            sampled = await fresh.generate(text, Sampling(25, temperature=0.8, seed=turn))
            turns.append(sampled)
            text = np.concatenate([text, sampled.tokens, prompt(15, turn + 100)])
        return turns

    with counted(fresh) as work:
        kept = await conversation(forget=False)
    assert work["tokens_kept"] > 3 * 60
    with counted(fresh) as work:
        made_anew = await conversation(forget=True)
    assert work["tokens_kept"] == 0
    for one, other in zip(kept, made_anew, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


async def test_tokens_depend_neither_on_company_nor_on_order(fresh, params):
    requests = [
        (prompt(5 + 23 * i, i), Sampling(8 + 5 * i, temperature=0.9, top_p=1.0 if i % 2 else 0.9, seed=i))
        for i in range(9)
    ]

    async def run(order):
        await asyncio.to_thread(fresh.set_weights, params, 0)
        results = await asyncio.gather(*(fresh.generate(*requests[i]) for i in order))
        return dict(zip(order, results, strict=True))

    together, backwards = await run(range(9)), await run(range(8, -1, -1))
    for i, request in enumerate(requests):
        alone = await fresh.generate(*request)
        for result in (together[i], backwards[i]):
            np.testing.assert_array_equal(result.tokens, alone.tokens)
            np.testing.assert_allclose(result.logps, alone.logps, atol=1e-5)


async def test_more_requests_than_slots_all_finish(fresh):
    results = await asyncio.gather(*(fresh.generate(prompt(4, i), Sampling(1 + i % 7, seed=i)) for i in range(40)))
    assert [len(result.tokens) for result in results] == [1 + i % 7 for i in range(40)]
    assert {result.finish for result in results} == {Finish.LENGTH}
    assert fresh.stats()["serving"] == fresh.stats()["waiting"] == 0


async def test_dropped_overshoot_of_a_stop_string_is_not_kept(fresh, params):
    """Tokens drawn beyond a stop string leave keys and values behind; the next turn must not use them."""
    plain = await fresh.generate(prompt(30), Sampling(12, temperature=0))
    stop = "".join(chr(32 + token) for token in plain.tokens[3:5])
    first = await fresh.generate(prompt(30), Sampling(12, temperature=0, stop_strings=(stop,)))
    assert first.tokens.tolist() == plain.tokens[:5].tolist()
    text = np.concatenate([prompt(30), first.tokens, prompt(12, 4)])
    second = await fresh.generate(text, Sampling(6, temperature=0))
    await asyncio.to_thread(fresh.set_weights, params, 0)
    anew = await fresh.generate(text, Sampling(6, temperature=0))
    np.testing.assert_array_equal(second.tokens, anew.tokens)
