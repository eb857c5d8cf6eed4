"""Who reads the pages: chosen by name, checked before anything is opened, paid for and replayed like the rest."""

from __future__ import annotations

import contextlib
import dataclasses
import random

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dr_jax import assemble, reading
from dr_jax.agent import episode
from dr_jax.agent.presets import PRESETS
from dr_jax.agent.reader import ExtractiveReader
from dr_jax.errors import ConfigError
from dr_jax.records import StopReason
from dr_jax.run_config import RunConfig
from dr_jax.testing import ScriptedSampler
from dr_jax.world import demonstrations
from dr_jax.world import questions as world_questions

KEY = "canary-4f9d2c"


def changed(run: RunConfig, section: str, **fields) -> RunConfig:
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **fields)})


def by_endpoint(run: RunConfig, **fields) -> RunConfig:
    fields = {"endpoint": "http://llm.test/v1", "model": "small", "key_variable": "LLM_API_KEY"} | fields
    priced = changed(run, "budget", prices={"reader_input": 1.0, "reader_output": 2.0})
    return changed(changed(priced, "web", reader="endpoint"), "reading", **fields)


@contextlib.asynccontextmanager
async def llm(run: RunConfig):
    """The config of a run whose reader is at a server that finds in each part its last line, and what it was asked."""
    asked = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.headers.get("Authorization"), await request.json()))
        shown = asked[-1][1]["messages"][1]["content"]
        line = shown.partition("\n</current_page_content>")[0].rpartition("\n")[2]
        said = f"<extracted_info>{line}</extracted_info>\n<page_down>no</page_down>"
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        return web.json_response({"choices": [{"message": {"content": said}}], "usage": usage})

    site = web.Application()
    site.router.add_post("/v1/chat/completions", answer)
    async with TestServer(site) as server:
        yield by_endpoint(run, endpoint_address=f"127.0.0.1:{server.port}"), asked


async def demonstrate(run, host, chain):
    """The episode of a careful author on `chain`: it searches and browses, whatever it reads."""
    world = assemble.embedded_world()
    written = demonstrations.turns(world, chain, demonstrations.CAREFUL, random.Random(0))
    context = host.context(run, ScriptedSampler(map(host.chat.markup, written)), seed=0, today="2026-01-01")
    return await episode.run(world_questions.question(world, chain), 0, context)


async def test_an_endpoint_reads_the_embedded_web_and_its_tape_is_replayed_without_it(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", KEY)
    chains = world_questions.sample_chains(assemble.embedded_world(), "heldout", 3, 4, {2: 1.0, 4: 1.0})
    async with llm(run) as (settings, asked):
        assemble.check(settings)
        async with assemble.host(settings, tmp_path) as host:
            live = [await demonstrate(settings, host, chain) for chain in chains]
            spent = host.budget.run
    assert all(e.stop is StopReason.ANSWERED and e.infra_failures == 0 for e in live)
    assert asked
    assert {key for key, _ in asked} == {f"Bearer {KEY}"}
    assert spent.usd == pytest.approx(len(asked) * (100 * 1.0 + 10 * 2.0) / 1e6)
    browses = [use.observation for e in live for use in e.tool_uses if use.tool == "browse_webpage"]
    assert any("page_summary" in observation for observation in browses)

    monkeypatch.delenv("LLM_API_KEY")  # and nobody listens there any more
    replay = changed(settings, "web", cache_mode="replay")
    assemble.check(replay)
    async with assemble.host(replay, tmp_path) as host:
        again = [await demonstrate(replay, host, chain) for chain in chains]
        assert host.budget.run.usd == 0
    assert [[u.observation for u in e.tool_uses] for e in again] == [[u.observation for u in e.tool_uses] for e in live]


async def test_each_name_is_another_reader(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", KEY)
    async with assemble.host(run, tmp_path) as host:
        assert isinstance(host.reader, ExtractiveReader)
    async with assemble.host(changed(run, "web", reader="policy"), tmp_path) as host:
        assert host.reader is None
        context = host.context(changed(run, "web", reader="policy"), ScriptedSampler([]), seed=0, today="2026-01-01")
        assert (context.reading.max_segments, context.reading.max_notes_chars) == (4, 2048)


async def test_hosts_share_what_the_endpoint_takes_at_once(run, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", KEY)
    async with llm(run) as (settings, _):
        few = changed(settings, "reading", max_concurrent=3)
        async with assemble.host(few, tmp_path, index=2, count=3) as host:
            assert host.reader is not None
        with pytest.raises(ConfigError, match="config.reading.max_concurrent: 3 .* of 4 hosts; give 4 or more"):
            async with assemble.host(few, tmp_path, index=3, count=4):
                pass


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"endpoint": ""}, "reading.endpoint: reader 'endpoint' needs an http"),
        ({"endpoint": "http://api.example/v1"}, "reading.endpoint: .* would send the key in the clear; use https"),
        ({"model": ""}, "reading.model: is empty"),
        ({"key_variable": "NO_SUCH_KEY"}, "config.reading.key_variable: .* export NO_SUCH_KEY=..."),
        ({"parameters": {"n": 3}}, "reading.parameters: n cannot be set here"),
        ({"endpoint_address": "localhost"}, "config.reading.endpoint_address: got 'localhost' .*need 'ip:port'"),
        ({"train": True}, "config.reading.train: web.reader is 'endpoint', which has nothing to train"),
    ],
)
def test_an_endpoint_that_cannot_be_asked_is_named(run, monkeypatch, fields, message):
    monkeypatch.setenv("LLM_API_KEY", KEY)
    assemble.check(by_endpoint(run))
    with pytest.raises(ConfigError, match=message):
        assemble.check(by_endpoint(run, **fields))


def test_other_mistakes_are_named(run, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", KEY)
    with pytest.raises(ConfigError, match="no price for 'reader_input'; give US dollars per million tokens"):
        assemble.check(changed(by_endpoint(run), "budget", prices={}))
    policy = changed(run, "web", reader="policy")
    assemble.check(changed(policy, "reading", train=True))
    with pytest.raises(ConfigError, match="config.reading.max_tokens: 1025 is more than half of the 2048 tokens"):
        assemble.check(changed(policy, "reading", max_tokens=1025))
    with pytest.raises(ConfigError, match="config.reading.train: web.reader is 'extractive'"):
        assemble.check(changed(run, "reading", train=True))


def test_what_reading_can_cost_is_in_the_estimate(run, monkeypatch):
    monkeypatch.setenv("LLM_API_KEY", KEY)
    assert assemble.cost_usd(run, 10) == 0
    settings, preset = by_endpoint(run), PRESETS["quickstart"]
    page_usd = reading.page_usd(settings, preset, assemble.budget(settings).price_usd)
    assert 4 * (2000 * 1.0 + 96 * 2.0) / 1e6 < page_usd < 4 * (20_000 * 1.0 + 96 * 2.0) / 1e6
    assert assemble.cost_usd(settings, 10) == pytest.approx(10 * 16 * 8 * 9 * 5 * page_usd)
