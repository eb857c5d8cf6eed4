"""The programs of a run, abstractly: the functions that a run jits, with shapes and placements for arguments.

Nothing is allocated and no weights are read: sizes come from `config.json`, or from the published ones by name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from dr_jax import assemble, chips
from dr_jax.batch import PackedBatch
from dr_jax.engine import cache, decode, ragged
from dr_jax.errors import ConfigError
from dr_jax.learner import handover
from dr_jax.learner.state import TrainState, abstract_state
from dr_jax.learner.step import make_train_step
from dr_jax.model import joined, letters, weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.weights import Params
from dr_jax.plan import kernels
from dr_jax.run_config import RunConfig

AnyMesh = Mesh | AbstractMesh


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel multiplies, and what it reads."""

    flops: float
    hbm_bytes: float


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function and what it is called with."""

    name: str
    function: Any
    args: tuple[Any, ...]
    mesh: AnyMesh
    dynamic_trips: int  # of its one loop whose trips only the data fixes, at their most
    scope: AnyMesh | None = None  # the mesh that the caller sets
    reads: int = 1  # how often it must read its arguments, at the least
    attention: kernels.Attention | None = None  # where it attends by a kernel of `kernels`: one chip's share
    paged: Work | None = None  # of the engine's attention kernel on one chip, whose loops only the data fixes


@dataclasses.dataclass(frozen=True)
class Resident:
    """What lies on the chips between programs, as abstract arrays."""

    state: TrainState
    reference: Params | None
    batch: PackedBatch
    gradients: Params | None  # summed over the parts of a step; None where a step is one program
    engine_params: Params
    kv_cache: Any  # as `decode.abstract_pool`


@dataclasses.dataclass(frozen=True)
class Setup:
    """A config, checked, with its meshes: of compile-only TPU devices, or abstract ones where there is no compiler."""

    run: RunConfig
    model: ModelConfig
    rules: letters.Rules
    piece: chips.Slice
    learner: AnyMesh
    engine: AnyMesh
    hosts: AnyMesh  # the learner's devices, as engines side by side


def has_compiler() -> bool:
    """Whether the TPU compiler is installed. It needs no TPU."""
    return importlib.util.find_spec("libtpu") is not None


def setup(run: RunConfig, *, compiler: bool) -> Setup:
    """Raises `ConfigError` where the config names no slice, or the network does not divide over its meshes."""
    if not run.topology:
        raise ConfigError("config.topology: '' names no slice; set it, e.g. --config.topology=v5p:2x2x1")
    piece, model, rules = chips.find(run.topology), assemble.model_config(run), assemble.rules(run)
    letters.check_mesh(model, run.mesh, rules)
    tensor = run.engine.tensor
    engine_shape = {"data": 1, "fsdp": 1, "tensor": tensor}
    letters.check_mesh(model, engine_shape, letters.DEFAULT_RULES)
    if piece.chips % tensor:
        raise ConfigError(f"config.engine.tensor: {tensor} does not divide the {piece.chips} chips of {run.topology}")
    host = piece.part(tensor)
    hosts_shape = {"data": piece.chips // tensor, "fsdp": 1, "tensor": tensor}
    if not compiler:
        return Setup(run, model, rules, piece, *map(_abstract_mesh, (run.mesh, engine_shape, hosts_shape)))
    shape = tuple(run.mesh.values())
    placed = mesh_utils.create_device_mesh(
        shape, list(devices(piece)), allow_split_physical_axes=True
    )  # as jax.make_mesh
    return Setup(
        run, model, rules, piece,
        learner=mesh(placed, run.mesh),
        engine=mesh(np.array(devices(host)), engine_shape),  # which some compilers want whole
        hosts=mesh(placed.ravel(), hosts_shape),
    )  # fmt: skip


def resident(s: Setup) -> Resident:
    """Every array that outlives a program."""
    run, optim, dtype = s.run, assemble.optim(s.run), jnp.dtype(s.run.model.dtype)
    rows = NamedSharding(s.learner, letters.spec("bt", s.rules.activations))
    shape = (run.batch.rows, run.batch.row_tokens)
    return Resident(
        state=abstract_state(s.model, optim, s.learner, s.rules),
        reference=_params(s.model, dtype, s.learner, s.rules) if run.grpo.kl_coef else None,
        batch=PackedBatch(
            *(jax.ShapeDtypeStruct(shape, x.dtype, sharding=rows) for x in PackedBatch.empty(1, 1))
        ),
        gradients=_params(s.model, jnp.dtype("float32"), s.learner, s.rules) if run.batch.parts > 1 else None,
        engine_params=_engine_params(s, dtype),
        kv_cache=decode.abstract_pool(
            s.model, pages=_pages(s), page_tokens=cache.PAGE, attention=run.engine.attention, dtype=dtype,
            mesh=s.engine, rules=letters.DEFAULT_RULES,
        ),
    )  # fmt: skip


def programs(s: Setup) -> list[Program]:
    """Learner step, prefill, decode and weight hand-over, as a run calls them."""
    run = s.run
    there, settings = resident(s), run.engine
    engine = decode.build(
        s.model, mesh=s.engine, rules=letters.DEFAULT_RULES, steps=settings.decode_steps, attention=settings.attention,
        compiler=settings.compiler,
    )  # fmt: skip
    everywhere = NamedSharding(s.engine, PartitionSpec())

    def numbers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=everywhere)

    rows, chunk = settings.prefill_rows, settings.prefill_chunk
    width = cache.enough(1, settings.context)
    idle = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), decode.inert(settings.slots, width)
    )
    served, chunks = (there.engine_params, there.kv_cache), numbers(rows, chunk)
    prefill, drawing = _paged(s, rows, chunk), _paged(s, settings.slots, 1, settings.decode_steps)
    trips = width if drawing is None else settings.decode_steps
    return [
        *_learner(s, there),
        Program("prefill", engine.extend, (*served, numbers(rows, width), chunks, chunks), s.engine, width,
                scope=s.engine, paged=prefill),
        Program("decode", engine.generate, (*served, idle), s.engine, trips, scope=s.engine,
                reads=settings.decode_steps, paged=drawing),
        Program("hand_over", handover.program(s.model, s.hosts, run.model.dtype), (there.state.params,), s.hosts, 1),
    ]  # fmt: skip


def _learner(s: Setup, there: Resident) -> list[Program]:
    """The step: one program, or where it comes in parts `TrainStep.add`, once with all rows, and `TrainStep.update`.

    A part costs milliseconds beside its micro-batches (16 of the 7B on a v5p-128 0.1 s of 481 s, by this plan), and
    parts make no more of those."""
    run = s.run
    step = make_train_step(
        s.model, assemble.grpo(run), s.learner, s.rules, optim=assemble.optim(run), micro_rows=run.batch.micro_rows,
        compute_dtype=run.model.dtype, remat=run.model.remat, kernel=run.model.attention,
        compiler=run.model.compiler,
    )  # fmt: skip
    rows = there.state, there.reference, there.batch
    trips, attention = run.batch.rows // run.batch.micro_rows, _attention(s)
    if there.gradients is None:
        return [Program("learner_step", step.whole, rows, s.learner, trips, attention=attention)]
    everywhere = NamedSharding(s.learner, PartitionSpec())
    terms, _ = jax.eval_shape(step.nothing)
    sums = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), terms), there.gradients
    return [
        Program("learner_step", step.add, (*rows, sums), s.learner, trips, attention=attention),
        Program("learner_update", step.update, (there.state, sums), s.learner, 1),
    ]


def _attention(s: Setup) -> kernels.Attention | None:
    """What one chip attends to of a micro-batch."""
    placed = s.rules.activations

    def share(letter: str) -> int:
        return math.prod(s.run.mesh[axis] for axis in letters.axes_of(placed[letter]))

    if s.run.model.attention not in kernels.PRODUCTS:
        return None
    return kernels.Attention(
        s.run.model.attention, s.piece.kind, s.run.batch.micro_rows // share("b"), s.run.batch.row_tokens,
        s.model.num_heads // share("n"), s.model.num_kv_heads // share("k"), s.model.head_dim,
    )  # fmt: skip


def _paged(s: Setup, rows: int, tokens: int, steps: int = 1) -> Work | None:
    """What the engine's kernel does on one chip, as many rows at full context as there are pages for; None where there
    is no kernel."""
    settings, model = s.run.engine, s.model
    if settings.attention != "ragged":
        return None
    rows = min(rows, _pages(s) * cache.PAGE // settings.context)
    times = steps * model.num_layers / settings.tensor
    positions = times * ragged.fetched(rows, tokens, settings.context)
    per_position = 2 * model.num_kv_heads * model.head_dim * jnp.dtype(s.run.model.dtype).itemsize
    scores = times * rows * tokens * settings.context
    return Work(flops=4 * scores * model.num_heads * model.head_dim, hbm_bytes=positions * per_position)


def _pages(s: Setup) -> int:
    return s.run.engine.pages or cache.enough(s.run.engine.slots, s.run.engine.context)


def _engine_params(s: Setup, dtype: Any) -> Params:
    params = _params(s.model, dtype, s.engine, letters.DEFAULT_RULES)
    params["blocks"]["attn"] = joined.program(s.engine, letters.DEFAULT_RULES).eval_shape(params["blocks"]["attn"])
    return params


def _params(model: ModelConfig, dtype: Any, mesh: AnyMesh, rules: letters.Rules) -> Params:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        weights.abstract(model, dtype),
        weights.shardings(model, mesh, rules),
    )


def devices(piece: chips.Slice) -> list[Any]:
    """Compile-only devices. libtpu asks the cloud who it is unless it is told, and would take a lock."""
    told = dict(
        TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-16", TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0", ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )  # fmt: skip
    for name, value in told.items():
        os.environ.setdefault(name, value)
    extra: dict[str, Any] = {"chip_config_name": "megacore"} if piece.kind == "v4" else {}
    if piece.sides == (1, 1):
        extra["chips_per_host_bounds"] = (1, 1, 1)
    wrap = (*piece.rings, False)[:3]
    return topologies.get_topology_desc(platform="tpu", topology_name=piece.name, wrap=wrap, **extra).devices


def mesh(placed: np.ndarray, shape: Mapping[str, int]) -> Mesh:
    """The devices as a mesh of these axes."""
    return Mesh(placed.reshape(tuple(shape.values())), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def _abstract_mesh(shape: Mapping[str, int]) -> AbstractMesh:
    return AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
