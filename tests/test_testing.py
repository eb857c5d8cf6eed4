from __future__ import annotations

import asyncio

import numpy as np
import pytest

from dr_jax.records import Failure, FailureKind, Finish, Page, Sampled, Sampling
from dr_jax.testing import QWEN_CONTROL_TOKENS, ScriptedSampler, TinyWeb, byte_tokenizer, run_in_no_time


async def test_a_script_is_played_in_turn_and_then_is_over():
    sampler = ScriptedSampler([[1, 2], [3, 4, 5]], version=3, vocab_size=8)
    first = await sampler.generate([9], Sampling(2, seed=5))
    assert (first.tokens.tolist(), first.finish, first.version) == ([1, 2], Finish.STOP, 3)
    assert first.logps.tolist() == pytest.approx([-np.log(8)] * 2)
    second = await sampler.generate([9, 9], Sampling(2))
    assert (second.tokens.tolist(), second.finish) == ([3, 4], Finish.LENGTH)
    third = await sampler.generate([9], Sampling(2))
    assert (third.finish, third.detail) == (Finish.ERROR, "the script has no output for call 2")
    assert [prompt.tolist() for prompt in sampler.prompts] == [[9], [9, 9], [9]]
    assert sampler.samplings[0].seed == 5


async def test_a_script_may_be_a_function_of_the_prompt():
    made = Sampled(np.array([7], np.int32), np.array([-1.0], np.float32), Finish.STOP, 1)
    sampler = ScriptedSampler(lambda prompt, sampling: made if len(prompt) > 1 else [sampling.seed])
    assert (await sampler.generate([1], Sampling(4, seed=6))).tokens.tolist() == [6]
    assert await sampler.generate([1, 2], Sampling(4)) is made


async def test_delays_are_chosen_per_call():
    sampler = ScriptedSampler(lambda prompt, sampling: prompt, delay_s=lambda call: 0.02 * (call == 0))
    done = []

    async def generate(token):
        done.append((await sampler.generate([token], Sampling(1))).tokens.tolist())

    await asyncio.gather(generate(1), generate(2))
    assert done == [[2], [1]]


async def test_score_has_a_value_per_token():
    assert (await ScriptedSampler([], vocab_size=8).score([1], [2, 3])).tolist() == pytest.approx([-np.log(8)] * 2)


async def test_the_tiny_web_finds_and_serves_its_pages():
    page = Page("http://a", "Kite", ("A film.",))
    gone = Failure(FailureKind.STATUS, status=410)
    web = TinyWeb({"http://a": page, "http://b": gone})
    (hit,) = await web.search("FILM kite", top_k=5)
    assert (hit.title, hit.url, hit.snippet) == ("Kite", "http://a", "A film.")
    assert len(await web.search("http", top_k=1)) == 1
    assert await web.search("zebra", top_k=5) == ()
    assert await web.browse("http://a") is page
    assert await web.browse("http://b") is gone
    assert (await web.browse("http://c")).status == 404
    assert web.requests == ["FILM kite", "http", "zebra", "http://a", "http://b", "http://c"]


def test_the_byte_tokenizer_has_a_token_for_every_byte():
    tokenizer = byte_tokenizer()
    text = "é\x00 ∀ <|im_end|>x"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode()) - len("<|im_end|>") + 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == 256 + len(QWEN_CONTROL_TOKENS)


def test_hours_pass_in_no_time_and_in_order():
    async def main():
        loop, seen = asyncio.get_running_loop(), []

        async def sleeper(seconds):
            await asyncio.sleep(seconds)
            seen.append((seconds, loop.time()))

        async with asyncio.TaskGroup() as tasks:
            for seconds in (7200.5, 0.001, 3600.0):
                tasks.create_task(sleeper(seconds))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1e6):
                await asyncio.sleep(2e6)
        return seen, loop.time()

    seen, end_s = run_in_no_time(main())
    assert [seconds for seconds, _ in seen] == [0.001, 3600.0, 7200.5]
    assert [at_s for _, at_s in seen] == pytest.approx([0.001, 3600.0, 7200.5])
    assert end_s == pytest.approx(7200.5 + 1e6)


def test_a_deadlock_in_no_time_is_an_error():
    async def main():
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="a deadlock"):
        run_in_no_time(main())
