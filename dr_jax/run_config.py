"""The settings of one run, as frozen dataclasses: what a file in `configs/` must say, checked before anything starts.

A config file builds an `ml_collections.ConfigDict`; `resolve` turns it into a `RunConfig` and is the last to see it.
Fields have no defaults here: a config file states every one, with a unit or a reason, so that one file is one run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

from dr_jax import chips
from dr_jax.errors import ConfigError

WORLD = "world"  # in a config: the embedded web, its questions, and the tiny checkpoint that goes with it


@dataclasses.dataclass(frozen=True)
class Questions:
    train: str  # JSONL or parquet file, or 'world:train'
    heldout: str  # the same, for evaluation only; or 'world:heldout'
    world_count: int  # how many train questions to draw from the embedded world (0 = not the world)


@dataclasses.dataclass(frozen=True)
class Web:
    provider: str  # 'world' = the embedded web on loopback; otherwise a search provider such as 'serper'
    key_variable: str  # name of the environment variable that holds the provider's key; unused where it needs none
    endpoint: str  # where the provider is asked, for one of your own such as 'searxng'; '' = the provider's public one
    endpoint_address: str  # 'ip:port' to dial for it where it is a private address; '' = as its name resolves
    wire: Mapping[str, Any]  # of provider 'json', any other API: the arguments of web.search_wire.json_provider
    region: str  # whose results are wanted: an ISO 3166 country such as 'us'; not every provider can be told
    language: str  # ISO 639, such as 'en'
    max_concurrent_searches: int  # all hosts together, as is the rate
    max_searches_per_s: float  # that are started; 0 = no limit but what the provider says
    cache: str  # '' = web.sqlite in the workdir; 'redis://host:port/0' where hosts share it (password: REDIS_PASSWORD)
    cache_mode: str  # live | record | replay
    cache_ttl_s: float
    workers: str  # '' = pages are fetched and parsed on this host; 'host:6379' = on the nodes of that Ray cluster
    contact: str  # e-mail or URL a web master can reach you at; sent in the user agent
    robots: bool  # obey robots.txt
    min_delay_s: float  # between the starts of two requests to one site
    blocked_domains: tuple[str, ...]  # never read or shown, nor anything below them; e.g. sites that print a benchmark
    reader: str  # 'extractive' = no model; 'policy' = the model in training; 'endpoint' = another one, behind an API
    segment_chars: int  # a page is read in segments of at most this many characters


@dataclasses.dataclass(frozen=True)
class Reading:
    """Of `web.reader` 'policy' and 'endpoint': a language model that is shown a page segment by segment."""

    max_segments: int  # of one page
    patience: int  # segments in which nothing was found, after which a page is given up
    max_tokens: int  # of one answer
    train: bool  # 'policy': its reading is trained too, each call with the advantage of its episode
    endpoint: str  # 'endpoint': base URL of any OpenAI-compatible API, such as 'https://api.openai.com/v1'
    endpoint_address: str  # 'ip:port' to dial for it where it is a private address; '' = as its name resolves
    model: str  # as the endpoint names it
    key_variable: str  # name of the environment variable that holds its key; '' = it asks for none
    parameters: Mapping[str, Any]  # sent along, over temperature 0 and max_tokens; None leaves one of them out
    max_concurrent: int  # requests to the endpoint by all hosts together


@dataclasses.dataclass(frozen=True)
class Budget:
    max_usd: float  # at list price, by the whole run on all hosts; 0 = no limit, as below
    max_calls: int  # searches, pages and readings by an endpoint that the cache does not answer
    max_bytes: int  # of answers, decoded
    max_step_usd: float  # the same for one step, the evaluation after it included
    max_step_calls: int
    max_step_bytes: int
    prices: Mapping[str, float]  # US dollars by service, over web.budget.PRICES; 'reader_input': a million tokens


@dataclasses.dataclass(frozen=True)
class Agent:
    preset: str  # a row of agent.presets.PRESETS
    temperature: float
    top_p: float
    top_k: int  # 0 = all
    deadline_s: float  # wall clock of one episode


@dataclasses.dataclass(frozen=True)
class Rollout:
    questions: int  # questions per step
    rollouts: int  # rollouts of each question
    max_in_flight: int  # episodes running at once
    max_memory_fraction: float  # of the host's memory; while this process holds more, no episode starts
    max_policy_lag: int  # steps that an episode's weights may be older than those it trains; 0 = none run ahead
    max_infra_fraction: float  # above it a step is not trained on and the run halts


@dataclasses.dataclass(frozen=True)
class EngineSettings:
    slots: int  # sequences decoded at once
    context: int  # tokens of one sequence, at most
    pages: int  # of engine.cache.PAGE tokens, for all sequences and what is kept for later; 0 = slots of full context
    tensor: int  # devices one engine replica spans
    prefill_rows: int
    prefill_chunk: int  # tokens
    decode_steps: int  # tokens decoded between two looks of the host
    attention: str  # a row of engine.decode.ATTENTION: 'blocks' anywhere, 'ragged' on TPUs
    compiler: Mapping[str, Any]  # options of the TPU's compiler for the engine, by name; {} = its own choice


@dataclasses.dataclass(frozen=True)
class Model:
    path: str  # Hugging Face directory; 'world' = the tiny checkpoint that comes with the embedded world
    dtype: str  # of the parameters: float32 | bfloat16
    remat: str  # a row of model.qwen2.REMAT
    attention: str  # of the learner, a row of learner.grpo.ATTENTION: 'blocks' anywhere, 'flash', 'splash' on TPUs
    compiler: Mapping[str, Any]  # options of the TPU's compiler for the learner step, by name; {} = its own choice


@dataclasses.dataclass(frozen=True)
class Batch:
    rows: int  # packed rows of one step, all hosts together
    row_tokens: int
    shorter_rows: tuple[int, ...]  # tokens, rising: lengths of row beside row_tokens for what fits; () = none. They
    # save attention where it is paid by the row ('splash'), and are filled less well
    micro_rows: int  # rows of one gradient-accumulation step; of shorter rows as many more as make up its tokens
    parts: (
        int  # of a step's groups: each is learned once its episodes have ended, the others still run; 1 = all at once
    )


@dataclasses.dataclass(frozen=True)
class Grpo:
    advantage: str  # 'std' as the reference, 'mean' as Dr. GRPO
    equal_groups: str  # 'keep' as the reference; 'skip' leaves groups whose rewards are all equal out of the batch
    clip_low: float
    clip_high: float
    old_logp: str  # 'learner' (as the reference; exact resume) or 'sampler' (a row of learner.grpo.OLD_LOGPS)
    tis_cap: float  # with 'learner': most a token counts for being likelier now than when it was drawn; 0 = off
    kl_coef: float  # k3 KL to the frozen starting point, in the loss; 0 = no reference model is kept
    entropy_coef: float


@dataclasses.dataclass(frozen=True)
class Optim:
    lr: float
    warmup_steps: int
    b1: float
    b2: float
    weight_decay: float
    grad_clip: float  # global norm
    momentum_dtype: str  # of Adam's first moment: float32 | bfloat16


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    every_steps: int
    keep: int


@dataclasses.dataclass(frozen=True)
class Eval:
    every_steps: int  # besides before the first and after the last step; 0 = only those two
    questions: int  # held-out questions, greedy decoding


@dataclasses.dataclass(frozen=True)
class Export:
    dtype: str  # of the exported safetensors
    max_shard_gb: float


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """One run. `mesh` maps axis -> devices; `sharding` maps a letter to its (weights, activations) mesh axes.

    `topology` names the TPU slice that the mesh is for, such as 'v5p:4x4x4' (see `chips`); '' = whatever is there.
    """

    seed: int
    steps: int
    questions: Questions
    web: Web
    reading: Reading
    budget: Budget
    agent: Agent
    rollout: Rollout
    engine: EngineSettings
    model: Model
    topology: str
    mesh: Mapping[str, int]
    sharding: Mapping[str, tuple[Any, Any]]
    batch: Batch
    grpo: Grpo
    optim: Optim
    checkpoint: Checkpoint
    eval: Eval
    export: Export


_POSITIVE = (
    "steps", "rollout.questions", "rollout.rollouts", "rollout.max_in_flight", "engine.slots", "engine.context",
    "engine.tensor", "engine.prefill_rows", "engine.prefill_chunk", "engine.decode_steps", "batch.rows",
    "batch.row_tokens", "batch.micro_rows", "batch.parts", "optim.lr", "optim.grad_clip", "checkpoint.every_steps",
    "checkpoint.keep",
    "eval.questions", "export.max_shard_gb", "agent.deadline_s", "agent.top_p", "web.segment_chars",
    "web.max_concurrent_searches", "web.cache_ttl_s", "reading.max_segments", "reading.patience", "reading.max_tokens",
    "reading.max_concurrent", "rollout.max_memory_fraction",
)  # fmt: skip
_NOT_NEGATIVE = (
    "seed", "agent.temperature", "agent.top_k", "rollout.max_infra_fraction", "grpo.clip_low", "grpo.clip_high",
    "grpo.kl_coef", "grpo.entropy_coef", "optim.warmup_steps", "optim.weight_decay", "eval.every_steps",
    "questions.world_count", "engine.pages", "web.min_delay_s", "budget.max_usd", "budget.max_calls",
    "budget.max_bytes", "budget.max_step_usd", "budget.max_step_calls", "budget.max_step_bytes",
    "web.max_searches_per_s", "rollout.max_policy_lag", "grpo.tis_cap",
)  # fmt: skip
_CHOICES = {
    "web.cache_mode": ("live", "record", "replay"),
    "web.reader": ("extractive", "policy", "endpoint"),
    "model.dtype": ("float32", "bfloat16"),
    "optim.momentum_dtype": ("float32", "bfloat16"),
    "export.dtype": ("float32", "bfloat16"),
    "grpo.advantage": ("std", "mean"),
    "grpo.equal_groups": ("keep", "skip"),
    "grpo.old_logp": ("learner", "sampler"),
}


def resolve(config: Mapping[str, Any]) -> RunConfig:
    """The checked settings of a `ConfigDict` or nested dict.

    Raises:
      ConfigError: a field is unknown (with the nearest name), missing, of the wrong type, or out of range.
    """
    run = _build(RunConfig, dict(config), "config")
    for field in _POSITIVE:
        _require(run, field, lambda value: value > 0, "must be above 0")
    for field in _NOT_NEGATIVE:
        _require(run, field, lambda value: value >= 0, "must not be negative")
    for field, choices in _CHOICES.items():
        _require(run, field, lambda value, allowed=choices: value in allowed, f"allowed: {', '.join(choices)}")
    _check_sizes(run)
    if run.topology:
        _check_topology(run)
    return run


def as_dict(run: RunConfig) -> dict[str, Any]:
    """Plain nested JSON-able values, the same for equal settings."""
    return json.loads(json.dumps(dataclasses.asdict(run)))


def difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "config") -> list[str]:
    """One line for each leaf in which two `as_dict` results differ: 'config.optim.lr: 1e-06 -> 1e-05'."""
    lines = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += difference(before, after, f"{prefix}.{name}")
        elif before != after:
            lines.append(f"{prefix}.{name}: {before} -> {after}")
    return lines


def _check_sizes(run: RunConfig) -> None:
    if run.batch.rows % run.batch.micro_rows:
        raise ConfigError(
            f"config.batch.micro_rows: {run.batch.micro_rows} does not divide config.batch.rows = {run.batch.rows}"
        )
    lengths = (*run.batch.shorter_rows, run.batch.row_tokens)
    for shorter in run.batch.shorter_rows:
        if shorter < 1 or run.batch.row_tokens % shorter or run.batch.rows % _micro_rows(run, shorter):
            raise ConfigError(
                f"config.batch.shorter_rows: {shorter} does not divide config.batch.row_tokens = "
                f"{run.batch.row_tokens}, or its micro-batch does not divide config.batch.rows = {run.batch.rows}"
            )
    if list(lengths) != sorted(set(lengths)):
        raise ConfigError(
            f"config.batch.shorter_rows: got {run.batch.shorter_rows}, need rising lengths below row_tokens"
        )
    if run.engine.context > run.batch.row_tokens:
        raise ConfigError(
            f"config.batch.row_tokens: {run.batch.row_tokens} is less than config.engine.context = "
            f"{run.engine.context}: a full episode would not fit one row. Raise row_tokens or lower the context."
        )
    if run.batch.rows < run.rollout.questions * run.rollout.rollouts:
        raise ConfigError(
            f"config.batch.rows: {run.batch.rows} is less than questions x rollouts = "
            f"{run.rollout.questions * run.rollout.rollouts}: long episodes could overflow the batch. Raise batch.rows "
            "(rows that stay empty cost nothing)."
        )
    if run.rollout.questions % run.batch.parts:
        raise ConfigError(
            f"config.batch.parts: {run.batch.parts} does not divide config.rollout.questions = {run.rollout.questions}"
        )
    if run.rollout.max_policy_lag and run.grpo.old_logp == "learner" and not run.grpo.tis_cap:
        raise ConfigError(
            f"config.grpo.tis_cap: 0 with config.rollout.max_policy_lag = {run.rollout.max_policy_lag}: what older "
            "weights drew would be trained on as if these had. Set config.grpo.tis_cap=2.0, or "
            "config.grpo.old_logp='sampler'."
        )


def _micro_rows(run: RunConfig, length: int) -> int:
    return run.batch.micro_rows * run.batch.row_tokens // length


def _check_topology(run: RunConfig) -> None:
    """The slice exists, the mesh covers it, and an engine does not reach beyond one host."""
    piece = chips.find(run.topology)
    have = math.prod(run.mesh.values())
    if have != piece.chips:
        raise ConfigError(
            f"config.mesh: {' x '.join(f'{axis}={size}' for axis, size in run.mesh.items())} is {have} devices, "
            f"{run.topology} ({piece.product}) has {piece.chips} chips. Make the product {piece.chips}."
        )
    if run.engine.tensor > min(piece.chips, piece.chip.host_chips):
        raise ConfigError(
            f"config.engine.tensor: {run.engine.tensor} chips, a host of {run.topology} has "
            f"{min(piece.chips, piece.chip.host_chips)} at most. An engine lives on one host: lower it."
        )


def _require(run: RunConfig, field: str, holds: typing.Callable[[Any], bool], rule: str) -> None:
    value: Any = run
    for name in field.split("."):
        value = getattr(value, name)
    if not holds(value):
        raise ConfigError(f"config.{field}: got {value!r}; {rule}")


def _build(kind: type, values: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"fields here: {', '.join(hints)}"
            raise ConfigError(f"{path}.{name}: no such setting; {hint}")
    missing = [name for name in hints if name not in values]
    if missing:
        raise ConfigError(f"{path}.{missing[0]}: missing; add it to the config file (see configs/quickstart.py)")
    return kind(**{name: _value(hint, values[name], f"{path}.{name}") for name, hint in hints.items()})


def _value(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: got {value!r}, need a section with its own fields")
        return _build(typing.cast(type, hint), dict(value), path)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)) or not all(type(item) is kind for item in value):
            one = {str: "('a',)", int: "(1,)"}[kind]
            raise ConfigError(f"{path}: got {value!r}, need a tuple of {kind.__name__}; {one} for one, () for none")
        return tuple(value)
    if typing.get_origin(hint) is not None:  # mesh and sharding: the model room checks their letters and axes
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path}: got {value!r}, need a table")
        return dict(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path}: got {value!r} ({type(value).__name__}), need {hint.__name__}")
    return value
