"""One optimizer step, sharded: `jax.jit` with explicit shardings, which is what pjit is today."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dr_jax.batch import PackedBatch
from dr_jax.errors import ConfigError
from dr_jax.learner.grpo import GrpoConfig, grpo_terms, loss_gradients, token_logps
from dr_jax.learner.head import Head, Terms
from dr_jax.learner.optim import OptimConfig, adamw, learning_rate
from dr_jax.learner.sft import sft_terms
from dr_jax.learner.state import TrainState, state_shardings
from dr_jax.model import weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, axes_of, spec
from dr_jax.model.weights import Params

LOSSES = {"grpo": grpo_terms, "sft": sft_terms}

Metrics = dict[str, jax.Array]
Batch = PackedBatch | Sequence[PackedBatch]  # several: of rows of other lengths
Sums = tuple[Terms, Params]  # terms and gradient of their loss numerator over some rows, all f32
GradientsOf = Callable[[Params, Params | None, PackedBatch], Sums]


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One optimizer step: called, `(state, ref_params, batch) -> (state, metrics)`, one program; `state` is donated,
    metrics are f32 scalars.

    Or in parts, while other rows are still being made: `nothing`, to which each part is `add`ed, then one `update`.
    That is the same step, but for the order of sums. All of them are jitted.
    """

    whole: Callable[[TrainState, Params | None, Batch], tuple[TrainState, Metrics]]
    nothing: Callable[[], Sums]
    add: Callable[[TrainState, Params | None, Batch, Sums], Sums]  # the sums are donated
    update: Callable[[TrainState, Sums], tuple[TrainState, Metrics]]  # the state is donated

    def __call__(self, state: TrainState, ref_params: Params | None, batch: Batch) -> tuple[TrainState, Metrics]:
        return self.whole(state, ref_params, batch)


def put_batch(batch: PackedBatch, mesh: Mesh, rules: Rules) -> PackedBatch:
    """The rows of all hosts, one host after another, as global arrays. Each host passes the same number of rows.

    They are dealt to the chips in turn, so that rows that are filled first are shared out evenly. The devices of a row
    may be of several hosts: it lies on all devices of its own host first, and goes on from there.
    """
    devices = sorted(mesh.devices.flat, key=lambda device: (device.process_index, device.id))
    hosts = len({device.process_index for device in devices})
    there = NamedSharding(Mesh(np.array(devices).reshape(hosts, -1), ("host", "device")), PartitionSpec("host"))
    placed = NamedSharding(mesh, spec("bt", rules.activations))
    chips = max(_row_shards(mesh, rules) // hosts, 1)
    dealt = (x_bt.reshape(-1, chips, x_bt.shape[1]).swapaxes(0, 1).reshape(x_bt.shape) for x_bt in batch)
    return PackedBatch(*(jax.device_put(jax.make_array_from_process_local_data(there, x_bt), placed) for x_bt in dealt))


def make_train_step(
    config: ModelConfig,
    cfg: GrpoConfig,
    mesh: Mesh,
    rules: Rules,
    *,
    optim: OptimConfig,
    micro_rows: int,
    loss: str = "grpo",
    compute_dtype: str = "float32",
    remat: str = "none",
    kernel: str = "blocks",
    chunk: int = 512,
    compiler: Mapping[str, Any] | None = None,
) -> TrainStep:
    """The step. Gradients are summed over micro-batches of `micro_rows` rows and divided once by the weight of all
    rows, so neither the split into rows nor into micro-batches or parts changes them. Rows without trained tokens sort
    to the end and are never computed; the number of micro-batches is traced, so one compilation serves every fill.
    `batch` may be several, of rows of other lengths: then a micro-batch of each has as many tokens as `micro_rows` of
    the longest rows.
    `compiler`: options for XLA, which has to know all of them.
    A step whose loss or gradient is not finite, or which trains no token, changes nothing but `state.step`, and reports
    `step/skipped` 1. `ref_params` may be None where the KL coefficient is 0.
    """
    _check(mesh, rules, micro_rows, loss)
    use_ref = loss == "grpo" and cfg.kl_coef > 0
    placed = state_shardings(config, optim, mesh, rules)
    gradients_of = _gradients_of(
        config, cfg, rules, loss=loss, use_ref=use_ref, chunk=chunk, remat=remat, kernel=kernel
    )
    nothing = functools.partial(_nothing, config, cfg, loss=loss, use_ref=use_ref)

    def add(state: TrainState, ref_params: Params | None, batch: Batch, so_far: Sums) -> Sums:
        if use_ref and ref_params is None:
            raise ConfigError(f"kl_coef: {cfg.kl_coef} needs the reference model's params; pass them, or set kl_coef 0")
        params, ref_params = jax.tree.map(lambda leaf: leaf.astype(compute_dtype), (state.params, ref_params))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            batches = (batch,) if isinstance(batch, PackedBatch) else batch
            tokens = micro_rows * max(each.token_bt.shape[1] for each in batches)
            for each in batches:
                micro, used = _micro_batches(each, tokens // each.token_bt.shape[1], mesh, rules)
                so_far = _accumulate(gradients_of, params, ref_params, micro, used, placed.params, so_far)
            return so_far

    def update(state: TrainState, so_far: Sums) -> tuple[TrainState, Metrics]:
        return _update(state, *so_far, optim, config)

    def whole(state: TrainState, ref_params: Params | None, batch: Batch) -> tuple[TrainState, Metrics]:
        return update(state, add(state, ref_params, batch, nothing()))

    rows = NamedSharding(mesh, spec("bt", rules.activations))
    everywhere = NamedSharding(mesh, PartitionSpec())
    sums, stepped = (everywhere, placed.params), (placed, everywhere)
    jit = functools.partial(jax.jit, compiler_options=dict(compiler or {}))
    return TrainStep(
        whole=jit(whole, in_shardings=(placed, None, rows), out_shardings=stepped, donate_argnames="state"),
        nothing=jax.jit(nothing, out_shardings=sums),
        add=jit(add, in_shardings=(placed, None, rows, sums), out_shardings=sums, donate_argnames="so_far"),
        update=jit(update, in_shardings=(placed, sums), out_shardings=stepped, donate_argnames="state"),
    )


def _gradients_of(
    config: ModelConfig, cfg: GrpoConfig, rules: Rules, loss: str, use_ref: bool, chunk: int, remat: str, kernel: str
) -> GradientsOf:
    """The loss's terms and gradient over a micro-batch."""
    head = Head(config, rules, cfg.temperature, chunk)
    how = dict(remat=remat, kernel=kernel)

    def loss_of(logp_bt: jax.Array, entropy_bt: jax.Array, ref_logp_bt: jax.Array | None, batch: PackedBatch) -> Terms:
        if not (loss == "grpo" and cfg.entropy_coef):
            entropy_bt = jax.lax.stop_gradient(entropy_bt)
        return LOSSES[loss](logp_bt, entropy_bt, ref_logp_bt, batch, cfg)

    def gradients_of(params: Params, ref_params: Params | None, batch: PackedBatch) -> tuple[Terms, Params]:
        ref_logp_bt = token_logps(head, ref_params, batch, **how)[0] if use_ref else None
        return loss_gradients(head, params, batch, ref_logp_bt, loss_of, **how)

    return gradients_of


def _nothing(config: ModelConfig, cfg: GrpoConfig, *, loss: str, use_ref: bool) -> Sums:
    """The sums over no row."""
    x_bt = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    terms = jax.eval_shape(
        functools.partial(LOSSES[loss], cfg=cfg), x_bt, x_bt, x_bt if use_ref else None, PackedBatch.empty(1, 1)
    )
    shapes = terms, weights.abstract(config, jnp.float32)
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)


def _check(mesh: Mesh, rules: Rules, micro_rows: int, loss: str) -> None:
    if loss not in LOSSES:
        raise ConfigError(f"loss: got {loss!r}, allowed are {', '.join(LOSSES)}")
    devices = _row_shards(mesh, rules)
    if micro_rows < 1 or micro_rows % devices:
        raise ConfigError(f"micro_rows: got {micro_rows}, need a multiple of the {devices} devices that share rows")


def _row_shards(mesh: Mesh, rules: Rules) -> int:
    """Into how many parts the mesh cuts the rows of a batch."""
    return math.prod(mesh.shape[axis] for axis in axes_of(rules.activations["b"]))


def _micro_batches(batch: PackedBatch, micro_rows: int, mesh: Mesh, rules: Rules) -> tuple[PackedBatch, jax.Array]:
    """(`[micro, micro_rows, t]` arrays, how many micro-batches hold a trained token); those come first.

    No row leaves its device: each brings its own trained rows to the front, and gives every micro-batch the next few.
    """
    rows, length = batch.token_bt.shape
    if rows % micro_rows:
        raise ConfigError(f"micro_rows: {micro_rows} does not divide a batch of {rows} rows; pad it with empty rows")
    shards = _row_shards(mesh, rules)
    share = micro_rows // shards
    by_rows, by_length = spec("bt", rules.activations)
    sharding = NamedSharding(mesh, PartitionSpec(None, by_rows, by_length))
    trained_xb = (batch.weight_bt > 0).any(axis=1).reshape(shards, -1)  # x: parts that lie on different devices
    order_xb = jnp.argsort(~trained_xb, axis=1, stable=True)

    def split(x_bt: jax.Array) -> jax.Array:
        x_xbt = jnp.take_along_axis(x_bt.reshape(shards, -1, length), order_xb[..., None], axis=1)
        x_mbt = x_xbt.reshape(shards, -1, share, length).swapaxes(0, 1).reshape(-1, micro_rows, length)
        return jax.lax.with_sharding_constraint(x_mbt, sharding)

    return PackedBatch(*map(split, batch)), (trained_xb.sum(1).max() + share - 1) // share


def _accumulate(
    gradients_of: GradientsOf,
    params: Params,
    ref_params: Params | None,
    micro: PackedBatch,
    used: jax.Array,
    placed: Params,
    so_far: Sums,
) -> Sums:
    """Terms and gradient, summed over the first `used` micro-batches and `so_far`."""

    def one(i: jax.Array) -> Sums:
        terms, grads = gradients_of(params, ref_params, PackedBatch(*(x_mbt[i] for x_mbt in micro)))
        grads = jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(grads), placed)
        return terms, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)

    def body(i: jax.Array, so_far: Sums) -> Sums:
        (terms, grads), (more, more_grads) = so_far, one(i)
        return terms.plus(more), jax.tree.map(jnp.add, grads, more_grads)

    return jax.lax.fori_loop(0, used, body, so_far)


def _update(
    state: TrainState, terms: Terms, grads: Params, optim: OptimConfig, config: ModelConfig
) -> tuple[TrainState, Metrics]:
    weight = jnp.where(terms.weight > 0, terms.weight, 1.0)
    loss = terms.loss / weight
    grads = jax.tree.map(lambda leaf: leaf / weight, grads)
    norm = jnp.sqrt(sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(grads)))
    rate = learning_rate(optim, state.step)
    directions, opt_state = adamw(optim, config).update(grads, state.opt_state, state.params)
    params = jax.tree.map(lambda leaf, direction: leaf - rate * direction, state.params, directions)
    sound = jnp.isfinite(loss) & jnp.isfinite(norm) & (terms.weight > 0)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old), (params, opt_state), (state.params, state.opt_state)
    )
    metrics = {name: value / weight for name, value in terms.sums.items()} | terms.maxima
    metrics |= {
        "loss": loss,
        "grad_norm": norm,
        "lr": rate,
        "step/skipped": 1.0 - sound.astype(jnp.float32),
        "step/weight": terms.weight,
    }
    return TrainState(params, opt_state, state.step + 1, state.rng), metrics
