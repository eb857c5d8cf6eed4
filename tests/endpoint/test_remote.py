"""The sampler over a server: ours gives what the engine gives; others are told apart by what they answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dr_jax.endpoint import remote, server
from dr_jax.endpoint.remote import Logps, open_sampler
from dr_jax.errors import ConfigError, DrJaxError
from dr_jax.records import Finish, Sampling

PROMPT = [*range(300, 340)]
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)


@pytest.fixture
async def sampler(url):
    async with open_sampler(url, score=True) as sampler:
        yield sampler


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        dataclasses.replace(GREEDY, temperature=1.0, seed=5),
        dataclasses.replace(GREEDY, temperature=0.7, seed=2**31 - 1, top_p=0.9, top_k=40),
        dataclasses.replace(GREEDY, temperature=1.3, seed=-7, stop_ids=(*range(0, 2048, 300),)),
        dataclasses.replace(GREEDY, temperature=1.0, seed=3, stop_strings=("e", "\n")),
        dataclasses.replace(GREEDY, max_new_tokens=5000, temperature=1.0, seed=1),
    ],
)
async def test_through_our_server_it_is_the_engine(sampler, engine, sampling):
    prompt = np.asarray([*range(2000)], np.int32) if sampling.max_new_tokens == 5000 else PROMPT
    there, here = await asyncio.gather(sampler.generate(prompt, sampling), engine.generate(prompt, sampling))
    assert there.tokens.tolist() == here.tokens.tolist()
    np.testing.assert_allclose(there.logps, here.logps, atol=1e-4)
    assert (there.finish, there.version, there.detail) == (here.finish, here.version, "")
    assert (there.tokens.dtype, there.logps.dtype) == (np.int32, np.float32)


@pytest.mark.parametrize(("head", "tail"), [(1, 1), (1, 39), (30, 10), (39, 1)])
async def test_scores_are_the_engines(sampler, engine, head, tail):
    there = await sampler.score(PROMPT[:head], PROMPT[head : head + tail])
    here = await engine.score(PROMPT[:head], PROMPT[head : head + tail])
    np.testing.assert_allclose(there, here, atol=1e-4)
    assert there.dtype == np.float32


async def test_many_at_once(sampler, engine):
    seeds = [dataclasses.replace(GREEDY, temperature=1.0, seed=seed) for seed in range(40)]
    there = await asyncio.gather(*(sampler.generate(PROMPT, one) for one in seeds))
    here = await asyncio.gather(*(engine.generate(PROMPT, one) for one in seeds))
    assert [s.tokens.tolist() for s in there] == [s.tokens.tolist() for s in here]


async def test_a_bad_request_is_a_typed_outcome(sampler):
    for prompt, sampling, words in (
        ([], GREEDY, "prompt: got []"),
        ([1, 5000], GREEDY, "token id 5000"),
        ([1] * 2048, GREEDY, "2048 tokens; allowed: 1 to 2047"),
        ([1], dataclasses.replace(GREEDY, temperature=7.0), "temperature: got 7.0"),
    ):
        sampled = await sampler.generate(prompt, sampling)
        assert (sampled.finish, len(sampled.tokens), len(sampled.logps)) == (Finish.ERROR, 0, 0)
        assert sampled.detail.startswith("server: bad_request: HTTP 400")
        assert words in sampled.detail
    with pytest.raises(DrJaxError, match="token id 5000"):
        await sampler.score([1], [5000])
    with pytest.raises(ConfigError, match="first token of all"):
        await sampler.score([], [1])


async def test_cancelling_frees_the_engine(sampler, engine, eventually):
    task = asyncio.create_task(sampler.generate([5], dataclasses.replace(GREEDY, max_new_tokens=2000, temperature=2.0)))
    await eventually(lambda: engine.stats()["serving"])
    task.cancel()
    await eventually(lambda: not engine.stats()["serving"])


class Foreign:
    """Another project's server as its documentation describes it: the tokens are the engine's, what it says of them is
    its own. `faults` are answered first."""

    def __init__(self, engine, *, logps: Logps = Logps.OURS, ids: bool = True, scores: bool = True):
        self.engine, self.logps, self.ids, self.scores = engine, logps, ids, scores
        self.faults: list[web.Response] = []
        self.asked = 0

    async def models(self, request):
        return web.json_response({"object": "list", "data": [{"id": "m"}]})

    async def generate(self, prompt, **how):
        return await self.engine.generate(prompt, Sampling(**how))

    async def completions(self, request):
        self.asked += 1
        if self.faults:
            return self.faults.pop(0)
        body = await request.json()
        assert body["model"] == "m"
        prompt = body["prompt"]
        sampled = await self.generate(
            prompt, max_new_tokens=body["max_tokens"], temperature=body.get("temperature", 1.0),
            top_p=body.get("top_p", 1.0), top_k=max(body.get("top_k", 0), 0),
            seed=body.get("seed", 0), stop_ids=tuple(body.get("stop_token_ids", ())),
        )  # fmt: skip
        logps = sampled.logps
        if self.logps is Logps.RAW:
            logps = await self.engine.score(prompt, sampled.tokens)
        elif self.logps is Logps.CUT and body.get("top_k") == 1:
            logps = np.zeros(len(logps))
        choice = {"index": 0, "text": "", "finish_reason": str(sampled.finish)}
        choice["logprobs"] = {"token_logprobs": [float(logp) for logp in logps]}
        if self.ids:
            choice["token_ids"] = sampled.tokens.tolist()
        if "prompt_logprobs" in body and self.scores:
            scored = (await self.engine.score(prompt[:1], prompt[1:])).tolist()
            entries = [{str(id): {"logprob": logp, "rank": 1}} for id, logp in zip(prompt[1:], scored, strict=True)]
            choice["prompt_logprobs"] = [None, *entries]
        return web.json_response({"id": "cmpl-1", "choices": [choice]})

    async def sglang(self, request):
        body = await request.json()
        how, prompt = body["sampling_params"], body["input_ids"]
        sampled = await self.generate(
            prompt, max_new_tokens=how["max_new_tokens"], temperature=how["temperature"], top_p=how.get("top_p", 1.0),
            top_k=max(how.get("top_k", 0), 0), seed=how.get("sampling_seed", 0),
            stop_ids=tuple(how.get("stop_token_ids", ())),
        )  # fmt: skip
        pairs = zip(sampled.logps.tolist(), sampled.tokens.tolist(), strict=True)
        reason = {"type": str(sampled.finish), "matched": 1}
        about = {"finish_reason": reason, "output_token_logprobs": [[logp, id, None] for logp, id in pairs]}
        if body.get("logprob_start_len") == 0:
            scored = (await self.engine.score(prompt[:1], prompt[1:])).tolist()
            about["input_token_logprobs"] = [[None, prompt[0], None]]
            about["input_token_logprobs"] += [[logp, id, None] for logp, id in zip(scored, prompt[1:], strict=True)]
        return web.json_response({"text": "", "output_ids": sampled.tokens.tolist(), "meta_info": about})

    @contextlib.asynccontextmanager
    async def running(self):
        app = web.Application(client_max_size=2**24)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/generate", self.sglang)
        async with TestServer(app) as running:
            yield str(running.make_url("/"))


@pytest.mark.parametrize("wire", remote.WIRES)
async def test_each_wire_carries_tokens_and_scores(engine, wire):
    sampling = dataclasses.replace(GREEDY, temperature=0.8, seed=4, stop_ids=(*range(0, 2048, 300),))
    async with Foreign(engine).running() as url, open_sampler(url, wire=wire, score=True) as sampler:
        there, here = await asyncio.gather(sampler.generate(PROMPT, sampling), engine.generate(PROMPT, sampling))
        assert (there.tokens.tolist(), there.finish) == (here.tokens.tolist(), here.finish)
        np.testing.assert_allclose(there.logps, here.logps, atol=1e-4)
        scored = await sampler.score(PROMPT[:5], PROMPT[5:])
        np.testing.assert_allclose(scored, await engine.score(PROMPT[:5], PROMPT[5:]), atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "fits", "not_fits"),
    [
        (Logps.OURS, dict(temperature=0.5, top_p=0.9), None),
        (Logps.RAW, dict(temperature=1.0, top_p=0.9), dict(temperature=0.5)),
        (Logps.CUT, dict(temperature=0.5), dict(top_p=0.9, temperature=1.0)),
    ],
)
async def test_what_a_servers_log_probabilities_mean_is_found_out(engine, kind, fits, not_fits):
    async with Foreign(engine, logps=kind).running() as url, open_sampler(url) as sampler:
        assert sampler.logps is kind
        assert (await sampler.generate(PROMPT, dataclasses.replace(GREEDY, **fits))).finish is Finish.LENGTH
        if not_fits:
            refused = await sampler.generate(PROMPT, dataclasses.replace(GREEDY, **not_fits))
            assert refused.finish is Finish.ERROR
            assert "its log-probabilities are those of" in refused.detail


async def test_a_server_without_token_ids_is_refused_at_the_start(engine):
    async with Foreign(engine, ids=False).running() as url:
        with pytest.raises(ConfigError, match=r"It must give token ids: vLLM 0\.10\.2 or later"):
            async with open_sampler(url):
                pass


async def test_a_server_that_cannot_score_is_refused_where_scores_are_needed(engine):
    async with Foreign(engine, scores=False).running() as url:
        with pytest.raises(ConfigError, match="cannot score"):
            async with open_sampler(url, score=True):
                pass
        async with open_sampler(url) as sampler:
            assert (await sampler.generate(PROMPT, GREEDY)).finish is Finish.LENGTH
            with pytest.raises(ConfigError, match="does not give log-probabilities of prompts"):
                await sampler.score([1], [2])
            assert sampler.logps is Logps.RAW  # unknown: only what every kind gives


@pytest.mark.parametrize(("status", "asked"), [(429, 2), (503, 2), (500, 1), (400, 1), (401, 1)])
async def test_asking_again_where_it_can_help(engine, status, asked):
    foreign = Foreign(engine)
    async with foreign.running() as url, open_sampler(url) as sampler:
        foreign.faults, foreign.asked = [web.Response(status=status, text='{"error": {"message": "why"}}')], 0
        sampled = await sampler.generate(PROMPT, GREEDY)
    assert foreign.asked == asked
    assert sampled.finish is (Finish.LENGTH if asked == 2 else Finish.ERROR)
    assert asked == 2 or f"HTTP {status} why" in sampled.detail


@pytest.mark.parametrize(
    "body", ['{"error": "why"}', '{"object": "error", "message": "why"}', '{"error": {"message": "why", "code": 400}}']
)
async def test_what_a_server_says_of_an_error_is_passed_on(engine, body):
    foreign = Foreign(engine)
    async with foreign.running() as url, open_sampler(url) as sampler:
        foreign.faults = [web.Response(status=400, text=body)]
        assert (await sampler.generate(PROMPT, GREEDY)).detail == "server: bad_request: HTTP 400 why"


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("[", "protocol_error: the answer is not JSON"),
        ("{}", "no token ids"),
        ('{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": []}, "finish_reason": "stop"}]}', "with (0,)"),
        ('{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [null]}, "finish_reason": "stop"}]}', "ids"),
        ('{"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [-1]}, "finish_reason": "abort"}]}', "abort"),
    ],
)
async def test_an_answer_of_another_form_is_a_typed_outcome(engine, answer, words):
    foreign = Foreign(engine)
    async with foreign.running() as url, open_sampler(url) as sampler:
        foreign.faults = [web.Response(text=answer)]
        sampled = await sampler.generate(PROMPT, GREEDY)
    assert sampled.finish is Finish.ERROR
    assert words in sampled.detail


async def test_a_server_that_does_not_answer_in_time(sampler, engine):
    sampler._timeout_s = 0.05
    sampled = await sampler.generate([5], dataclasses.replace(GREEDY, max_new_tokens=2000, temperature=2.0))
    assert (sampled.finish, sampled.detail.partition(":")[2].split(":")[0]) == (Finish.ERROR, " timeout")


@pytest.mark.parametrize(
    ("url", "how", "words"),
    [
        ("http://models.example/v1", dict(api_key="k"), "the key in the clear; use https"),
        ("http://models.example/v1", {}, "anybody on the way could change the results; use https"),
        ("models.example", {}, "such as http://127.0.0.1:8000/v1 needs an http.s. URL"),
        ("ftp://models.example", {}, "needs an http.s. URL"),
        ("http://127.0.0.1", dict(wire="grpc"), "allowed: completions, sglang"),
    ],
)
async def test_mistakes_are_named_before_anything_is_sent(url, how, words):
    with pytest.raises(ConfigError, match=words):
        async with open_sampler(url, **how):
            pass


async def test_the_key_is_sent_and_a_wrong_one_named(model):
    async with server.serve(model, api_key="sesame") as url:
        async with open_sampler(url, api_key="sesame") as sampler:
            assert sampler.model == "world"
        with pytest.raises(ConfigError, match="auth: HTTP 401"):
            async with open_sampler(url, api_key="other"):
                pass
