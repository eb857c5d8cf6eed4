"""Settings become objects that work together, and the embedded world's checkpoint is a real Qwen2 directory."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from dr_jax import assemble
from dr_jax.agent import episode
from dr_jax.agent.chat import Chat
from dr_jax.agent.presets import PRESETS
from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind, StopReason
from dr_jax.run_config import RunConfig
from dr_jax.testing import ScriptedSampler
from dr_jax.web.budget import Spent
from dr_jax.world import demonstrations
from dr_jax.world import questions as world_questions


def changed(run: RunConfig, section: str, **fields) -> RunConfig:
    return dataclasses.replace(run, **{section: dataclasses.replace(getattr(run, section), **fields)})


async def demonstrate(run, host, chain):
    """The episode of a careful author on `chain`, through the real search, fetcher and reader."""
    import random

    world = assemble.embedded_world()
    written = demonstrations.turns(world, chain, demonstrations.CAREFUL, random.Random(0))
    context = host.context(run, ScriptedSampler(map(host.chat.markup, written)), seed=0, today="2026-01-01")
    return await episode.run(world_questions.question(world, chain), 0, context)


async def test_production_clients_research_the_embedded_web_and_replay_it_without_one(run, tmp_path):
    chains = world_questions.sample_chains(assemble.embedded_world(), "heldout", 3, 6, {2: 1.0, 4: 1.0})
    async with assemble.host(run, tmp_path) as host:
        live = [await demonstrate(run, host, chain) for chain in chains]
    assert [e.reward for e in live] == [1.0] * 6
    assert all(e.stop is StopReason.ANSWERED and e.infra_failures == 0 for e in live)
    assert any(use.tool == "browse_webpage" for e in live for use in e.tool_uses)

    replay = changed(run, "web", cache_mode="replay")
    async with assemble.host(replay, tmp_path) as host:
        again = [await demonstrate(replay, host, chain) for chain in chains]
        unseen = await host.browser.browse("http://lore.test/never_asked_for")
    assert [[u.observation for u in e.tool_uses] for e in again] == [[u.observation for u in e.tool_uses] for e in live]
    assert unseen == Failure(FailureKind.NOT_RECORDED, unseen.detail)


async def test_a_search_engine_of_ones_own_is_asked_at_its_private_address_and_needs_no_key(run, tmp_path):
    async def answer(request: web.Request) -> web.Response:
        result = {"url": "http://kite.example/", "title": request.query["q"], "content": "A film."}
        return web.json_response({"query": request.query["q"], "results": [result]})

    site = web.Application()
    site.router.add_get("/search", answer)
    async with TestServer(site) as server:
        own = changed(
            run, "web", provider="searxng", endpoint="http://searx.test/search",
            endpoint_address=f"127.0.0.1:{server.port}", key_variable="",
        )  # fmt: skip
        async with assemble.host(own, tmp_path) as host:
            hits = await host.searcher.search("Kite", top_k=3)
            page = await host.browser.browse(f"http://searx.test:{server.port}/search?q=Kite")
    assert [(hit.title, hit.snippet) for hit in hits] == [("Kite", "A film.")]
    assert isinstance(page, Failure)  # what the search client may reach, a model's URL may not


async def test_any_other_search_api_is_asked_as_the_config_describes_it(run, tmp_path):
    async def answer(request: web.Request) -> web.Response:
        asked = await request.json()
        return web.json_response({"items": [{"link": "http://kite.example/", "name": asked["text"]}]})

    site = web.Application()
    site.router.add_post("/find", answer)
    async with TestServer(site) as server:
        wire = {"query": "text", "results": "items", "title": "name", "url": "link"}
        own = changed(
            run, "web", provider="json", endpoint="http://find.test/find", wire=wire,
            endpoint_address=f"127.0.0.1:{server.port}",
        )  # fmt: skip
        own = changed(own, "budget", prices={"json": 0.0})
        assemble.check(own)
        async with assemble.host(own, tmp_path) as host:
            hits = await host.searcher.search("Kite", top_k=3)
    assert [(hit.title, hit.url) for hit in hits] == [("Kite", "http://kite.example/")]
    with pytest.raises(ConfigError, match=r"search\.wire: .*queri"):
        assemble.check(changed(own, "web", wire=wire | {"queri": "text"}))
    with pytest.raises(ConfigError, match="no price for 'json'"):
        assemble.check(changed(own, "budget", prices={}))


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:http", ":"])
async def test_an_address_that_cannot_be_dialled_is_named(run, tmp_path, address):
    own = changed(run, "web", provider="searxng", endpoint="http://searx.test/search", endpoint_address=address)
    with pytest.raises(ConfigError, match=r"endpoint_address|hosts"):
        async with assemble.host(own, tmp_path):
            pass


def test_heldout_questions_share_nothing_with_training(run):
    train, heldout = assemble.questions(run)
    assert (len(train), len(heldout)) == (3000, 200)
    assert not {q.id for q in train} & {q.id for q in heldout}


def test_the_checkpoint_renders_chat_as_its_own_template_does(run):
    from transformers import AutoTokenizer

    preset, chat = PRESETS["quickstart"], Chat.load(assemble.CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(str(assemble.CHECKPOINT))
    turn = "<think> look</think>\n<tool_call>\n{}\n</tool_call>"
    messages = [{"role": "system", "content": preset.system}, {"role": "user", "content": "Who is the mayor?"}]
    messages += [{"role": "assistant", "content": turn}, {"role": "tool", "content": "[found]"}]
    text = tokenizer.apply_chat_template(messages, tools=list(preset.tools), add_generation_prompt=True, tokenize=False)

    opening = chat.opening(preset, "Who is the mayor?", today="2026-01-01").tokens
    output = np.array(chat.markup(turn.removeprefix(preset.prefill) + "<|im_end|>"))
    ours = np.concatenate([opening, output, chat.reply(preset, output, "[found]").tokens])
    assert chat.decode(ours) == text + preset.prefill
    assert tokenizer(text + preset.prefill)["input_ids"] == ours.tolist()


def test_the_checkpoint_is_the_same_network_for_transformers(run):
    from dr_jax.model import hf

    device = assemble.device(run)
    assert hf.verify(assemble.CHECKPOINT, device.config, device.params) < 1e-3


@pytest.mark.parametrize(
    ("section", "fields", "message"),
    [
        ("agent", {"preset": "deepresearcher"}, "config.engine.context: 2048 is less than the 32767 tokens"),
        ("agent", {"preset": "nobody"}, "config.agent.preset: unknown 'nobody'; allowed: deepresearcher"),
        ("model", {"path": "/nowhere"}, "config.model.path: no Hugging Face checkpoint at /nowhere"),
        ("model", {"remat": "some"}, "config.model.remat: got 'some'; allowed: none"),
        ("model", {"attention": "some"}, "config.model.attention: got 'some'; allowed: blocks, flash, splash"),
        ("model", {"attention": "splash"}, "config.model.attention: 'splash' needs a TPU; set .*='blocks'"),
        ("model", {"attention": "flash"}, "config.model.attention: 'flash' needs a TPU; set .*='blocks'"),
        ("questions", {"world_count": 3}, "config.questions.train: world:train holds 3 questions, fewer than"),
    ],
)
def test_each_mistake_is_named(run, section, fields, message):
    wrong = changed(run, section, **fields)
    with pytest.raises(ConfigError, match=message):
        (assemble.questions if section == "questions" else assemble.check)(wrong)


def test_a_provider_without_its_key_says_which_variable_to_set(run, tmp_path, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="export SERPER_API_KEY"):
        assemble.check(changed(run, "web", provider="serper"))


def test_hosts_share_what_the_run_may_spend(run):
    limited = changed(run, "budget", max_calls=10, max_usd=0.5, max_step_calls=3)
    meters = [assemble.budget(limited, Spent(calls=4), index=index, count=4) for index in range(4)]
    for meter in meters:
        meter.begin_step()
    assert [sum(meter.take("serper") is None for _ in range(9)) for meter in meters] == [1, 1, 1, 0]  # of the step
    meters = [
        assemble.budget(changed(limited, "budget", max_step_calls=0), Spent(4), index=i, count=4) for i in range(4)
    ]
    assert sum(meter.take("serper") is None for meter in meters for _ in range(9)) == 6


def test_four_hosts_ask_a_site_no_more_often_than_one(run):
    web = dataclasses.replace(run.web, provider="searxng")
    alone, shared = (assemble.visit_settings(web, {}, count) for count in (1, 4))
    assert (alone.limits.max_per_site, alone.manners.pipelines) == (4, 1)
    assert (shared.limits.max_per_site, shared.manners.pipelines) == (1, 4)
    # Ray workers are asked by all hosts, and hold the limits of a site in one place.
    assert assemble.visit_settings(dataclasses.replace(web, workers="head:6379"), {}, 4) == alone


async def test_more_hosts_than_searches_at_once_is_a_mistake(run, tmp_path):
    few = changed(run, "web", max_concurrent_searches=2)
    with pytest.raises(ConfigError, match="let none start"):
        async with assemble.host(few, tmp_path, index=2, count=3):
            pass


def test_workers_elsewhere_are_checked_before_the_start(run):
    with pytest.raises(ConfigError, match=r"web\.workers: got 'auto'"):
        assemble.check(changed(run, "web", workers="auto", provider="searxng", endpoint="https://searx.example/search"))
    with pytest.raises(ConfigError, match=r"web\.workers: .*this host alone"):
        assemble.check(changed(run, "web", workers="head:6379"))


async def test_a_host_says_how_it_is(run, tmp_path):
    async with assemble.host(run, tmp_path) as host:
        figures = host.health()
    assert set(figures) == {
        "memory/resident_bytes", "memory/held_back_s", "loop/stops", "loop/longest_stop_s",
    }  # fmt: skip
    assert figures["memory/resident_bytes"] > 0
