"""What a round does: each token is prefilled once, whoever shares it; reuse changes nothing but the work."""

from __future__ import annotations

import asyncio
import contextlib

import numpy as np
import pytest

from dr_jax.engine.rounds import decode_widths, prefill_widths
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
    assert (work["tokens_kept"], work["tokens_copied"]) == (96, 3)


async def test_siblings_that_come_later_prefill_nothing(fresh):
    await fresh.generate(prompt(90), Sampling(3))
    with counted(fresh) as work:
        await asyncio.gather(*(fresh.generate(prompt(90), Sampling(30, seed=seed)) for seed in range(8)))
    assert work["tokens_prefilled"] == 0


async def test_a_waiting_episode_keeps_its_pages_without_a_slot(fresh):
    """Three turns of nine episodes, all waiting at once, in four slots: no turn prefills what an earlier one did."""
    texts = [prompt(60, seed) for seed in range(9)]
    with counted(fresh) as work:
        for turn in range(3):
            sampled = await asyncio.gather(*(fresh.generate(text, Sampling(5, seed=turn)) for text in texts))
            texts = [
                np.concatenate([text, one.tokens, prompt(12, turn + 50)])
                for text, one in zip(texts, sampled, strict=True)
            ]
    # Of a turn's 17 new tokens the last is fed when the next is drawn, and 4 were fed when they were drawn.
    assert work["tokens_prefilled"] <= 9 * (59 + 2 * (12 + 1))


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
    assert work["tokens_kept"] + work["tokens_copied"] > 3 * 60
    with counted(fresh) as work:
        made_anew = await conversation(forget=True)
    assert work["tokens_kept"] == work["tokens_copied"] == 0
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


@pytest.fixture(scope="module")
def cramped(make_engine):
    """Pages for one sequence of the whole context, where four may draw."""
    engine = make_engine(pages=20)
    yield engine
    engine.close()


async def test_short_pages_change_no_result(engine, cramped):
    """Four long sequences cannot be held at once: some are set back, evicted, computed again, and end the same."""
    requests = [(prompt(30 + 7 * i, i), Sampling(150, temperature=0.8, seed=i)) for i in range(6)]
    ample = await asyncio.gather(*(engine.generate(*request) for request in requests))
    with counted(cramped) as work:
        short = await asyncio.gather(*(cramped.generate(*request) for request in requests))
    assert work["set_back"] > 0
    for one, other in zip(ample, short, strict=True):
        assert one.finish is other.finish
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)
    assert cramped.stats()["pages_available"] == 20


async def test_an_evicted_episode_is_computed_again(cramped, full_logits, params):
    first = await cramped.generate(prompt(100), Sampling(20, seed=1))
    await cramped.generate(prompt(250, 1), Sampling(50))  # takes nearly all pages
    text = np.concatenate([prompt(100), first.tokens, prompt(10, 2)])
    with counted(cramped) as work:
        second = await cramped.generate(text, Sampling(20, temperature=0))
    assert work["tokens_prefilled"] > 100
    want_tv = full_logits(params, np.concatenate([text, second.tokens]))[len(text) - 1 : -1]
    np.testing.assert_array_equal(second.tokens, want_tv.argmax(-1))


async def test_scores_survive_short_pages(engine, cramped):
    drawing = [asyncio.create_task(cramped.generate(prompt(40, i), Sampling(200, seed=i))) for i in range(3)]
    scores = await asyncio.gather(*(cramped.score(prompt(200, i), prompt(60, 9)) for i in range(3)))
    for i, score in enumerate(scores):
        np.testing.assert_allclose(score, await engine.score(prompt(200, i), prompt(60, 9)), atol=1e-5)
    assert [len((await task).tokens) for task in drawing] == [200] * 3


async def test_a_long_prompt_does_not_stall_who_draws(fresh):
    """Two rows of 16 tokens a round: 310 tokens take ten rounds of prefill, and drawing goes on between them."""
    short = asyncio.create_task(fresh.generate(prompt(5), Sampling(8)))
    long = asyncio.create_task(fresh.generate(prompt(310, 1), Sampling(1)))
    done, _ = await asyncio.wait([short, long], return_when=asyncio.FIRST_COMPLETED)
    assert done == {short}
    await long


def test_rows_of_a_prefill():
    assert prefill_widths(1) == (1,)
    assert prefill_widths(4) == (1, 4)
    assert prefill_widths(8) == (2, 8)
    assert prefill_widths(16) == (1, 4, 16)


def test_rows_of_a_decode_step():
    assert decode_widths(16) == (16,)
    assert decode_widths(128) == (64, 128)
    assert decode_widths(96) == (96,)
    assert decode_widths(512) == (64, 128, 256, 512)
