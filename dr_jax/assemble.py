"""From settings to objects, of both columns.

`host` opens what an episode needs from the world and `Device` holds what lives on accelerators; `train`, `evaluate`
and `ask` are written in terms of these two.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import os
import pathlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from dr_jax import reading, searching
from dr_jax.agent.chat import Chat
from dr_jax.agent.episode import EpisodeContext
from dr_jax.agent.presets import PRESETS, Preset
from dr_jax.endpoint import remote
from dr_jax.engine.service import Engine
from dr_jax.errors import ConfigError
from dr_jax.interfaces import Browser, Reader, Sampler, Searcher
from dr_jax.learner import handover
from dr_jax.learner.grpo import ATTENTION, GrpoConfig
from dr_jax.learner.optim import OptimConfig
from dr_jax.model import hf, letters
from dr_jax.model.config import ModelConfig, published
from dr_jax.model.qwen2 import REMAT
from dr_jax.model.weights import Params
from dr_jax.records import Question, Sampling
from dr_jax.rollout.admission import Admission, memory_bytes
from dr_jax.rollout.watchdog import Watchdog
from dr_jax.run_config import WORLD, RunConfig, Web
from dr_jax.task import questions as question_files
from dr_jax.web import ray_workers, store
from dr_jax.web.budget import NOTHING_SPENT, Allowance, Budget, Spent, estimate_usd
from dr_jax.web.cache import Cache, CachedBrowser, CachedSearcher
from dr_jax.web.fetch import Limits
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.politeness import Manners
from dr_jax.web.search import UnblockedSearcher
from dr_jax.web.visit import MeteredVisitor, Settings
from dr_jax.world import lore, site
from dr_jax.world import questions as world_questions

WORLD_SEED = 0  # the checkpoint was pretrained in this world
WORLD_HOPS = {1: 0.4, 2: 0.4, 3: 0.14, 4: 0.06}  # share of questions by number of hops: a chain takes up to 9 turns
SERVER_KEY_VARIABLE = "DR_JAX_API_KEY"  # holds the key of an endpoint, for whoever serves and whoever asks
CHECKPOINT = pathlib.Path(__file__).parent / "world" / "checkpoint"


def check(run: RunConfig) -> None:
    """Raises `ConfigError` for every mistake that can be known before anything is opened, loaded or written."""
    preset(run)
    model_path(run)
    reading.check(run, preset(run), budget(run))
    searching.api_key(run.web)
    store.check(run.web.cache)
    if run.web.workers:
        if run.web.provider == WORLD:
            raise ConfigError("config.web.workers: the embedded web is served on this host alone; set workers to ''")
        ray_workers.check(run.web.workers)
    if run.model.remat not in REMAT:
        raise ConfigError(f"config.model.remat: got {run.model.remat!r}; allowed: {', '.join(REMAT)}")
    if run.model.attention not in ATTENTION:
        raise ConfigError(f"config.model.attention: got {run.model.attention!r}; allowed: {', '.join(ATTENTION)}")
    if run.model.attention != "blocks" and jax.default_backend() != "tpu":
        raise ConfigError(
            f"config.model.attention: {run.model.attention!r} needs a TPU; set config.model.attention='blocks'"
        )


@dataclasses.dataclass(frozen=True)
class Host:
    """What every episode of a run shares on the host side, open until `host` is left."""

    chat: Chat
    preset: Preset
    searcher: Searcher
    browser: Browser
    reader: Reader | None  # None = the policy reads
    cache: Cache
    budget: Budget
    in_flight: asyncio.Semaphore  # of episodes, those of an evaluation too
    admission: Admission
    watchdog: Watchdog

    def health(self) -> dict[str, float]:
        """Live figures of this process, by the names under which they are logged."""
        return self.admission.metrics() | self.watchdog.metrics()

    def context(
        self,
        run: RunConfig,
        sampler: Sampler,
        *,
        seed: int,
        today: str,
        temperature: float | None = None,
        priority: int = 0,
    ) -> EpisodeContext:
        """The context of some episodes; `temperature` overrides the run's (0 = greedy evaluation). Of all that wait for
        the sampler those of the lowest `priority` are served first."""
        agent = run.agent
        drawn = temperature is None
        sampling = Sampling(
            max_new_tokens=self.preset.max_turn_tokens,
            temperature=agent.temperature if drawn else temperature,
            top_p=agent.top_p if drawn else 1.0,
            top_k=agent.top_k if drawn else 0,
            priority=priority,
        )
        return EpisodeContext(
            sampler=sampler,
            chat=self.chat,
            preset=self.preset,
            searcher=self.searcher,
            browser=self.browser,
            reader=self.reader,
            reading=reading.limits(run, self.preset),
            sampling=sampling,
            seed=seed,
            today=today,
            deadline_s=agent.deadline_s,
        )


@contextlib.asynccontextmanager
async def host(
    run: RunConfig, workdir: pathlib.Path, spent: Spent = NOTHING_SPENT, *, index: int = 0, count: int = 1
) -> AsyncIterator[Host]:
    """Opens the web (or the embedded one), its cache in the workdir, and the tokenizer; closes all of it at the end.

    `spent`: by the run before it was resumed. This is host `index` of `count`, each of which has a pipeline of its own
    and its share of what the provider, the sites and the budget allow to all of them."""
    meter = budget(run, spent, index=index, count=count)
    async with contextlib.AsyncExitStack() as stack:
        web = run.web
        hosts: Mapping[str, tuple[str, int]] = {}
        if web.provider == WORLD and web.cache_mode != "replay":
            hosts = (await stack.enter_async_context(site.serve(embedded_world()))).hosts
        settings = visit_settings(web, hosts, count)
        workers = "" if web.cache_mode == "replay" else web.workers  # a replay asks nobody
        # Before the cache, so that it closes after it: a page cut short at the end must not be kept as unreadable.
        visitor = await stack.enter_async_context(ray_workers.open_visits(workers, settings))
        cache = await stack.enter_async_context(open_cache(web, workdir))
        client = await searching.open_client(web, hosts, meter, stack, index=index, count=count)
        visits = MeteredVisitor(visitor, meter, max_bytes=settings.limits.max_bytes)
        yield Host(
            chat=Chat.load(model_path(run)),
            preset=preset(run),
            searcher=UnblockedSearcher(CachedSearcher(client, cache), settings.policy),
            browser=CachedBrowser(visits, cache, max_segment_chars=web.segment_chars),
            reader=await reading.open_reader(run, preset(run), cache, meter, stack, index=index, count=count),
            cache=cache,
            budget=meter,
            in_flight=asyncio.Semaphore(run.rollout.max_in_flight),
            admission=Admission(run.rollout.max_memory_fraction * memory_bytes()),
            watchdog=await stack.enter_async_context(Watchdog()),
        )


def visit_settings(web: Web, hosts: Mapping[str, tuple[str, int]], count: int) -> Settings:
    """How pages are fetched by one of `count` hosts: all of them ask a site no more often than one would.

    Ray workers are shared by the hosts, and keep the limits of a site in one place."""
    pipelines = 1 if web.workers else count
    # The one site of the embedded web is ours: politeness limits are for other people's.
    at_once = Limits.max_concurrent if web.provider == WORLD else max(1, Limits.max_per_site // pipelines)
    return Settings(
        policy=AddressPolicy(blocked_domains=frozenset(web.blocked_domains)),
        hosts=hosts,
        limits=Limits(max_per_site=at_once),
        manners=Manners(robots=web.robots, min_delay_s=web.min_delay_s, pipelines=pipelines),
        contact=web.contact,
    )


def budget(run: RunConfig, spent: Spent = NOTHING_SPENT, *, index: int = 0, count: int = 1) -> Budget:
    """What host `index` of `count` may still spend; `spent` by all of them before the run was resumed."""
    most = run.budget
    prices = {**most.prices, searching.WORLD_PROVIDER: 0.0} if run.web.provider == WORLD else most.prices
    meter = Budget(
        Allowance.or_none(most.max_usd, most.max_calls, most.max_bytes).of_host(index, count),
        Allowance.or_none(most.max_step_usd, most.max_step_calls, most.max_step_bytes).of_host(index, count),
        prices=prices,
        spent=spent.of_host(index, count),
    )
    meter.price_usd(searching.provider(run.web).name)  # a provider without a price is a mistake to hear of now
    return meter


def cost_usd(run: RunConfig, steps: int) -> float:
    """What `steps` steps cost at most: every turn of every episode the dearest call there is, none in the cache."""
    limits, price_usd = preset(run), budget(run).price_usd
    search_usd = limits.max_queries * price_usd(searching.provider(run.web).name)
    return estimate_usd(
        max(search_usd, limits.max_urls * reading.page_usd(run, limits, price_usd)),
        questions=run.rollout.questions,
        rollouts=run.rollout.rollouts,
        calls=limits.max_turns - 1,
        steps=steps,
    )


@dataclasses.dataclass(frozen=True)
class Device:
    """What a run computes with: the network's sizes, where its arrays go, and the weights it starts from."""

    config: ModelConfig
    mesh: Mesh
    rules: letters.Rules
    params: Params  # as loaded, sharded over `mesh`; also the frozen reference model
    engine_mesh: Mesh  # of this host alone
    to_engine: Callable[[Params], Params]  # from the learner's layout to what this host can address; all hosts together
    grpo: GrpoConfig
    optim: OptimConfig


def device(run: RunConfig) -> Device:
    """Checks the mesh against the network and loads the starting weights, each device its own part."""
    path = model_path(run)
    config = ModelConfig.from_hf(path)
    table = rules(run)
    letters.check_mesh(config, run.mesh, table)
    mesh = letters.make_mesh(run.mesh)
    engine_mesh, to_engine = handover.to_engine(config, run.engine.tensor, run.model.dtype)
    return Device(
        config=config,
        mesh=mesh,
        rules=table,
        engine_mesh=engine_mesh,
        to_engine=to_engine,
        params=hf.load(path, config, mesh=mesh, rules=table, dtype=run.model.dtype),
        grpo=grpo(run),
        optim=optim(run),
    )


def rules(run: RunConfig) -> letters.Rules:
    """The sharding table."""
    return letters.Rules(
        weights={letter: _axes(pair, letter)[0] for letter, pair in run.sharding.items()},
        activations={letter: _axes(pair, letter)[1] for letter, pair in run.sharding.items()},
    )


def grpo(run: RunConfig) -> GrpoConfig:
    """What is optimised."""
    return GrpoConfig(
        clip_low=run.grpo.clip_low,
        clip_high=run.grpo.clip_high,
        old_logp=run.grpo.old_logp,
        tis_cap=run.grpo.tis_cap,
        kl_coef=run.grpo.kl_coef,
        entropy_coef=run.grpo.entropy_coef,
        temperature=run.agent.temperature,
    )


def optim(run: RunConfig) -> OptimConfig:
    """The optimizer's numbers."""
    return OptimConfig(
        learning_rate=run.optim.lr,
        warmup_steps=run.optim.warmup_steps,
        beta1=run.optim.b1,
        beta2=run.optim.b2,
        weight_decay=run.optim.weight_decay,
        max_grad_norm=run.optim.grad_clip,
        momentum_dtype=run.optim.momentum_dtype,
    )


def engine(run: RunConfig, device: Device, host: Host) -> Engine:
    """The sampler, on a mesh of its own: `engine.tensor` devices of this host. Use as a context manager."""
    letters.check_mesh(device.config, device.engine_mesh.shape, letters.DEFAULT_RULES)
    settings = run.engine
    return Engine(
        device.config,
        device.to_engine(device.params),
        mesh=device.engine_mesh,
        rules=letters.DEFAULT_RULES,
        slots=settings.slots,
        context=settings.context,
        pages=settings.pages,
        prefill_rows=settings.prefill_rows,
        prefill_chunk=settings.prefill_chunk,
        decode_steps=settings.decode_steps,
        attention=settings.attention,
        compiler=settings.compiler,
        decode_text=host.chat.decode,
    )


def with_checkpoint(run: RunConfig, checkpoint: str | None) -> RunConfig:
    """The run, checked, with `checkpoint` in place of the model that it starts from where one is given."""
    if checkpoint:
        run = dataclasses.replace(run, model=dataclasses.replace(run.model, path=checkpoint))
    check(run)
    return run


@contextlib.asynccontextmanager
async def answering(
    run: RunConfig, workdir: pathlib.Path, server: str | None = None
) -> AsyncIterator[tuple[Host, Sampler]]:
    """The host and a sampler that answers questions: the engine, or the model that the endpoint `server` has."""
    on_device = None if server else device(run)
    async with contextlib.AsyncExitStack() as stack:
        world = await stack.enter_async_context(host(run, workdir))
        if on_device:
            yield world, await stack.enter_async_context(engine(run, on_device, world))
        else:
            key = os.environ.get(SERVER_KEY_VARIABLE, "")
            yield world, await stack.enter_async_context(remote.open_sampler(server, api_key=key))


def questions(run: RunConfig) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """(train, held-out) questions; the held-out ones cut to `eval.questions`."""
    train = _questions(run.questions.train, run.questions.world_count)
    heldout = _questions(run.questions.heldout, run.eval.questions)
    if len(train) < run.rollout.questions:
        raise ConfigError(
            f"config.questions.train: {run.questions.train} holds {len(train)} questions, fewer than one step's "
            f"{run.rollout.questions}. Use a larger file or lower config.rollout.questions."
        )
    return train, heldout[: run.eval.questions]


def preset(run: RunConfig) -> Preset:
    """The preset that the run names, checked against the engine's context."""
    if run.agent.preset not in PRESETS:
        raise ConfigError(f"config.agent.preset: unknown {run.agent.preset!r}; allowed: {', '.join(PRESETS)}")
    chosen = PRESETS[run.agent.preset]
    if chosen.context_tokens > run.engine.context:
        raise ConfigError(
            f"config.engine.context: {run.engine.context} is less than the {chosen.context_tokens} tokens that preset "
            f"{chosen.name!r} may use. Raise it, or choose a smaller preset."
        )
    return chosen


def model_path(run: RunConfig) -> pathlib.Path:
    """The Hugging Face directory that the run starts from."""
    return hf_directory(run.model.path, "config.model.path")


def hf_directory(name: str, setting: str) -> pathlib.Path:
    """The Hugging Face directory `name`; ConfigError in the name of the `setting` where there is none."""
    path = CHECKPOINT if name == WORLD else pathlib.Path(name)
    if not (path / "config.json").is_file():
        raise ConfigError(
            f"{setting}: no Hugging Face checkpoint at {path} (no config.json). Download one, for example "
            "Qwen/Qwen2.5-7B-Instruct, or use 'world' for the tiny model that comes with dr_jax."
        )
    return path


def model_config(run: RunConfig) -> ModelConfig:
    """Sizes of the network: of the checkpoint, or the published ones where the path only names it."""
    known = published(pathlib.Path(run.model.path).name)
    return known if known and not pathlib.Path(run.model.path).exists() else ModelConfig.from_hf(model_path(run))


@functools.cache
def embedded_world() -> lore.World:
    """The embedded world: frozen data, so that one copy serves the process."""
    return lore.make_world(WORLD_SEED)


def _questions(source: str, count: int) -> tuple[Question, ...]:
    kind, _, split = source.partition(":")
    if kind == WORLD:
        return world_questions.questions(embedded_world(), split, WORLD_SEED, count, WORLD_HOPS)
    return question_files.load(source)


def open_cache(web: Web, workdir: pathlib.Path) -> Cache:
    """The run's own file, or the server that its hosts share."""
    where = web.cache or workdir / "web.sqlite"
    return Cache(where, web.cache_mode, web.cache_ttl_s, password=os.environ.get("REDIS_PASSWORD", ""))


def _axes(pair: Any, letter: str) -> tuple[Any, Any]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ConfigError(
            f"config.sharding.{letter}: got {pair!r}, need (mesh axis of weights, mesh axis of activations)"
        )
    return pair
