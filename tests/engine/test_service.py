"""The engine as its callers see it: parity with the forward pass, stops, limits, errors, weights, its end."""

from __future__ import annotations

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.engine.service import Engine
from dr_jax.errors import ConfigError, DrJaxError
from dr_jax.model.letters import DEFAULT_RULES, make_mesh
from dr_jax.records import Finish, Sampling
from tests.engine.conftest import SIZES


def prompt(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 96, length).astype(np.int32)


@pytest.mark.parametrize("length", [1, 2, 17, 33, 270])
@pytest.mark.parametrize("temperature", [0.7, 0.0])
async def test_logps_equal_the_full_forward_pass(engine, params, full_logits, length, temperature):
    sampled = await engine.generate(prompt(length), Sampling(20, temperature=temperature, seed=length))
    logits_tv = full_logits(params, np.concatenate([prompt(length), sampled.tokens]))[length - 1 : -1]
    want_tv = jax.nn.log_softmax(logits_tv / (temperature or 1.0))
    assert (sampled.tokens.dtype, sampled.logps.dtype) == (np.int32, np.float32)
    np.testing.assert_allclose(sampled.logps, want_tv[np.arange(20), sampled.tokens], atol=1e-4)
    if not temperature:
        np.testing.assert_array_equal(sampled.tokens, want_tv.argmax(-1))


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (1, 40), (60, 1), (37, 16), (250, 70)])
async def test_scores_equal_the_full_forward_pass(engine, params, full_logits, head, tail):
    tokens = prompt(head + tail, 5)
    logps = await engine.score(tokens[:head], tokens[head:])
    want_tv = jax.nn.log_softmax(full_logits(params, tokens)[head - 1 : -1])
    np.testing.assert_allclose(logps, want_tv[np.arange(tail), tokens[head:]], atol=1e-4)


async def test_scores_equal_what_was_sampled(engine):
    sampled = await engine.generate(prompt(50), Sampling(30, seed=3))
    np.testing.assert_allclose(await engine.score(prompt(50), sampled.tokens), sampled.logps, atol=1e-4)


async def test_seeds(engine):
    results = [(await engine.generate(prompt(9), Sampling(12, seed=s))).tokens.tolist() for s in (1, 1, 2, -7, 2**40)]
    assert results[0] == results[1]
    assert len({tuple(tokens) for tokens in results}) == 4


async def test_a_stop_id_is_kept_with_its_logp(engine):
    free = await engine.generate(prompt(9), Sampling(12, seed=1))
    stop = int(free.tokens[5])
    first = free.tokens.tolist().index(stop)
    stopped = await engine.generate(prompt(9), Sampling(12, seed=1, stop_ids=(95 - stop, stop)))
    assert (free.finish, stopped.finish) == (Finish.LENGTH, Finish.STOP)
    np.testing.assert_array_equal(stopped.tokens, free.tokens[: first + 1])
    np.testing.assert_allclose(stopped.logps, free.logps[: first + 1], atol=1e-5)


async def test_a_stop_string_ends_with_the_token_that_completes_it(engine):
    free = await engine.generate(prompt(9), Sampling(12, seed=1))
    text = "".join(chr(32 + token) for token in free.tokens)
    stopped = await engine.generate(prompt(9), Sampling(12, seed=1, stop_strings=("never!", text[5:8])))
    assert stopped.finish is Finish.STOP
    assert stopped.tokens.tolist() == free.tokens[: text.index(text[5:8]) + 3].tolist()
    assert len(stopped.logps) == len(stopped.tokens)


async def test_tokens_are_told_as_they_are_drawn(engine):
    told: list[tuple[list[int], list[float]]] = []
    sampled = await engine.generate(prompt(9), Sampling(22, seed=1), on_tokens=lambda *news: told.append(news))
    tokens = [token for tokens, _ in told for token in tokens]
    assert 2 <= len(told) <= 22
    assert tokens == sampled.tokens[: len(tokens)].tolist()
    assert 0 < len(sampled.tokens) - len(tokens) <= 4  # the last round's come with the result
    np.testing.assert_allclose([logp for _, logps in told for logp in logps], sampled.logps[: len(tokens)], atol=1e-5)


async def test_closed_says_why(make_engine):
    engine = make_engine()
    assert engine.closed == ""
    await asyncio.to_thread(engine.close)
    assert engine.closed == "engine: closed"


async def test_the_context_is_a_limit(engine):
    sampled = await engine.generate(prompt(310), Sampling(1000))
    assert (sampled.finish, len(sampled.tokens)) == (Finish.LENGTH, 10)


@pytest.mark.parametrize(
    ("tokens", "sampling", "words"),
    [
        ([], Sampling(4), "prompt: empty"),
        ([3, 96], Sampling(4), "prompt: token id 96"),
        (prompt(320), Sampling(4), "prompt: 320 tokens leave no room in the context of 320"),
        ([3], Sampling(0), "max_new_tokens: got 0"),
        ([3], Sampling(4, stop_ids=(96,)), "stop_ids: [96]"),
    ],
)
async def test_a_bad_request_is_an_answer_and_harms_nobody(engine, tokens, sampling, words):
    bad, good = await asyncio.gather(engine.generate(tokens, sampling), engine.generate([3], Sampling(4)))
    assert (bad.finish, len(bad.tokens), len(bad.logps)) == (Finish.ERROR, 0, 0)
    assert bad.detail.startswith(words)
    assert good.finish is Finish.LENGTH


@pytest.mark.parametrize(("head", "tail"), [([], [1]), ([1], []), ([1], [96]), (prompt(300), prompt(21))])
async def test_what_cannot_be_scored_raises(engine, head, tail):
    with pytest.raises(ConfigError):
        await engine.score(head, tail)


async def test_who_waits_is_served_by_priority_and_then_by_arrival(engine):
    slots, done = SIZES["slots"], []

    async def one(name: str, priority: int) -> None:
        await engine.generate(prompt(9), Sampling(12, priority=priority))
        done.append(name)

    async with asyncio.TaskGroup() as all_of_them:
        for i in range(slots):
            all_of_them.create_task(engine.generate(prompt(9, i), Sampling(250, priority=9)))
        for name, priority in (("second", 5), ("third", 5), ("last", 7), ("first", -1)):
            for _ in range(slots):
                all_of_them.create_task(one(name, priority))
    assert done == [name for name in ("first", "second", "third", "last") for _ in range(slots)]


async def test_cancelling_frees_the_slot_and_the_queue(engine):
    tasks = [asyncio.create_task(engine.generate(prompt(20, i), Sampling(290))) for i in range(9)]
    await asyncio.sleep(0.02)
    for task in tasks:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert (await engine.generate(prompt(5), Sampling(5))).finish is Finish.LENGTH
    stats = engine.stats()
    assert (stats["serving"], stats["waiting"], stats["pages_available"]) == (0, 0, SIZES["pages"])


async def test_new_weights_serve_all_later_samples(engine, params, other_params, full_logits):
    old = await engine.generate(prompt(40), Sampling(10))
    handed = jax.tree.map(jnp.array, other_params)
    await asyncio.to_thread(engine.set_weights, handed, 7)
    jax.tree.map(lambda x: x.delete(), handed)  # as a learner that donates its own
    new = await engine.generate(prompt(40), Sampling(10))
    assert new.version == 7
    assert new.tokens.tolist() != old.tokens.tolist()
    logits_tv = full_logits(other_params, np.concatenate([prompt(40), new.tokens]))[39:-1]
    np.testing.assert_allclose(new.logps, jax.nn.log_softmax(logits_tv)[np.arange(10), new.tokens], atol=1e-4)
    await asyncio.to_thread(engine.set_weights, params, 8)
    again = await engine.generate(prompt(40), Sampling(10))
    np.testing.assert_array_equal(again.tokens, old.tokens)


async def test_a_request_in_flight_goes_on_under_new_weights(engine, params, other_params):
    task = asyncio.create_task(engine.generate(prompt(10), Sampling(300)))
    await asyncio.sleep(0.02)
    await asyncio.to_thread(engine.set_weights, other_params, 9)
    sampled = await task
    assert (sampled.finish, len(sampled.tokens), sampled.version) == (Finish.LENGTH, 300, 9)
    await asyncio.to_thread(engine.set_weights, params, 10)


async def test_weights_of_another_model_are_refused(engine, params):
    wrong = params | {"embed": jnp.zeros((97, 32))}
    with pytest.raises(ConfigError, match="other names or shapes"):
        await asyncio.to_thread(engine.set_weights, wrong, 11)
    assert (await engine.generate([1], Sampling(3))).finish is Finish.LENGTH


async def test_logits_that_are_not_finite_are_one_typed_outcome(engine, params):
    before = await engine.generate(prompt(40), Sampling(10))
    broken = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
    await asyncio.to_thread(engine.set_weights, broken, 12)
    sampled = await engine.generate(prompt(40), Sampling(10))
    assert (sampled.finish, len(sampled.tokens)) == (Finish.ERROR, 0)
    assert "not finite" in sampled.detail
    with pytest.raises(DrJaxError, match="not finite"):
        await engine.score([1], [2])
    await asyncio.to_thread(engine.set_weights, params, 13)
    after = await engine.generate(prompt(40), Sampling(10))
    np.testing.assert_array_equal(after.tokens, before.tokens)


async def breaking(engine, name: str, times: int) -> None:
    """Lets a program of `engine` fail on the device, `times` times, with the pool donated to it and lost."""

    def fail(_):
        raise ZeroDivisionError("a bit has flipped")

    def lost(pool):
        number = jax.pure_callback(fail, jax.ShapeDtypeStruct((), jnp.float32), pool.k_pkhs[0, 0, 0, 0])
        return jax.tree.map(lambda pages: pages + number, pool)

    lost = jax.jit(lost, donate_argnums=0)
    rounds, left = engine._rounds, [times]
    works = getattr(rounds._programs, name)

    def program(params, pool, *rest):
        if not left[0]:
            return works(params, pool, *rest)
        left[0] -= 1
        return jax.block_until_ready(lost(pool)), None

    rounds._programs = rounds._programs._replace(**{name: program})


@pytest.mark.parametrize("name", ["extend", "generate", "score"])
async def test_a_device_error_ends_the_requests_that_it_met_and_no_other(make_engine, engine, name):
    async with make_engine(slots=2) as breakable:
        await breakable.generate([1], Sampling(2))  # it is warm
        await breaking(breakable, name, times=1)
        requests = [(prompt(20 + i, i), Sampling(12, seed=i)) for i in range(5)]
        drawing = [asyncio.create_task(breakable.generate(*request)) for request in requests]
        scoring = asyncio.create_task(breakable.score(prompt(30), prompt(10, 1)))
        results = await asyncio.gather(*drawing)
        scored = (await asyncio.gather(scoring, return_exceptions=True))[0]
        failed = [result for result in results if result.finish is Finish.ERROR]
        if name == "score":
            assert isinstance(scored, DrJaxError)
            assert "device error" in str(scored)
        else:
            np.testing.assert_allclose(scored, await engine.score(prompt(30), prompt(10, 1)), atol=1e-5)
        assert len(failed) == 0 if name == "score" else 1 <= len(failed) <= 2
        for request, result in zip(requests, results, strict=True):
            if result.finish is Finish.ERROR:
                assert "a bit has flipped" in result.detail
                assert len(result.tokens) == 0
            else:
                np.testing.assert_array_equal(result.tokens, (await engine.generate(*request)).tokens)
        stats = breakable.stats()
        assert stats["device_errors"] == 1
        assert (stats["serving"], stats["waiting"], stats["pages_available"]) == (0, 0, SIZES["pages"])


async def test_a_device_that_stays_broken_ends_the_engine(make_engine):
    async with make_engine() as broken:
        await broken.generate([1], Sampling(2))
        await breaking(broken, "generate", times=100)
        results = await asyncio.gather(*(broken.generate(prompt(5, i), Sampling(5)) for i in range(30)))
        assert {result.finish for result in results} == {Finish.ERROR}
        assert (await broken.generate([1], Sampling(2))).detail.startswith("engine: JaxRuntimeError")


async def test_cancelled_at_any_moment_no_page_is_lost(engine, params):
    """Requests that share a beginning, cut off after some turns of the event loop: as they wait, prefill and draw."""
    await asyncio.to_thread(engine.set_weights, params, 14)
    shared = prompt(60)
    for turns in (0, 1, 2, 5, 20, 100):
        tasks = [
            asyncio.create_task(engine.generate(np.append(shared, prompt(40, i)), Sampling(200, seed=i)))
            for i in range(7)
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results[::2])
        assert {result.finish for result in results[1::2]} == {Finish.LENGTH}
    await engine.generate([1], Sampling(2))  # a round after the last cancellation
    stats = engine.stats()
    assert (stats["serving"], stats["waiting"], stats["pages_available"]) == (0, 0, SIZES["pages"])


async def test_new_weights_begin_with_nothing_that_older_ones_made(engine, params, other_params):
    for version, (weights, prefilled) in enumerate(((params, 49), (params, 49), (other_params, 49)), 15):
        await asyncio.to_thread(engine.set_weights, weights, version)
        for fresh in (prefilled, 0):  # and what these made serves them again
            before = engine.stats()["tokens_prefilled"]
            assert (await engine.generate(prompt(50), Sampling(1))).version == version
            assert engine.stats()["tokens_prefilled"] - before == fresh
    await asyncio.to_thread(engine.set_weights, params, 18)


async def test_a_crash_of_the_device_thread_answers_everyone(make_engine, params):
    def explode(tokens):
        raise ZeroDivisionError("boom")

    engine = make_engine(decode_text=explode)
    long = [engine.generate(prompt(9, i), Sampling(300)) for i in range(7)]
    fatal = engine.generate(prompt(9), Sampling(300, stop_strings=("x",)))
    results = await asyncio.gather(fatal, *long)
    assert {result.finish for result in results} == {Finish.ERROR}
    assert {result.detail for result in results} == {"engine: ZeroDivisionError: boom"}
    assert (await engine.generate([1], Sampling(3))).finish is Finish.ERROR
    for call in (lambda: engine.set_weights(params, 1), lambda: asyncio.run(engine.score([1], [2]))):
        with pytest.raises(DrJaxError, match="boom"):
            await asyncio.to_thread(call)
    engine.close()


async def test_closing_answers_whoever_waits_and_ends_the_thread(make_engine):
    engine = make_engine(max_waiting=6)
    tasks = [asyncio.create_task(engine.generate(prompt(9, i), Sampling(300))) for i in range(7)]
    await asyncio.sleep(0)
    refused = await tasks[6]
    assert "max_waiting" in refused.detail
    await asyncio.to_thread(engine.close)
    for result in await asyncio.gather(*tasks[:6]):
        assert (result.finish, result.detail) == (Finish.ERROR, "engine: closed")
    assert (await engine.generate([1], Sampling(3))).detail == "engine: closed"
    assert not engine._thread.is_alive()
    engine.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(slots=0), "engine.slots: got 0"),
        (dict(decode_steps=0), "engine.decode_steps: got 0"),
        (dict(pages=19), "engine.pages: got 19; one sequence of the whole context (320 tokens) needs 20 of 16 tokens"),
        (dict(page_tokens=0), "engine.page_tokens: got 0"),
        (dict(attention="paged"), "engine.attention: got 'paged', allowed are blocks, ragged"),
        (dict(context=1025, pages=90), "engine.context: got 1025, this model goes up to 1024"),
        (dict(mesh=dict(data=1, fsdp=1, tensor=4)), "mesh.tensor: 2 kv heads do not divide"),
        (dict(mesh=dict(data=2, fsdp=1, tensor=1)), "mesh axis data (letter b) has size 2"),
    ],
)
def test_bad_settings_are_named(make_engine, changes, words):
    if "mesh" in changes:
        changes = changes | dict(mesh=make_mesh(changes["mesh"]))
    with pytest.raises(ConfigError) as error:
        make_engine(**changes)
    assert words in str(error.value)


def test_weights_of_another_model_do_not_start(config, params, mesh):
    with pytest.raises(ConfigError, match="other names or shapes"):
        Engine(config, {"embed": params["embed"]}, mesh=mesh, rules=DEFAULT_RULES, slots=1, context=8)
