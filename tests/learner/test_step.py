from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest

from dr_jax.batch import PackedBatch
from dr_jax.errors import ConfigError
from dr_jax.learner.grpo import GrpoConfig
from dr_jax.learner.optim import OptimConfig
from dr_jax.learner.state import abstract_state
from dr_jax.learner.step import _micro_batches, make_train_step, put_batch
from dr_jax.model import letters, weights
from dr_jax.model.config import QWEN2_5


@pytest.fixture(scope="module")
def mesh4():
    return letters.make_mesh({"data": 1, "fsdp": 2, "tensor": 2})


@pytest.fixture
def batch(segments, pack_rows):
    return pack_rows([segments[:3], segments[3:5], segments[5:8]])


@pytest.fixture
def run(make_step, fresh, ref_params, rules):
    """(metrics, gradient, params) of one step from the fresh state."""

    def one(batch: PackedBatch, mesh, micro_rows: int = 2):
        state, metrics = make_step(mesh, micro_rows)(fresh(mesh), ref_params, put_batch(batch, mesh, rules))
        gradient = jax.tree.map(lambda moment: np.asarray(moment) / 0.1, state.opt_state[1].mu)
        return jax.device_get(metrics), gradient, jax.device_get(state.params)

    return one


def assert_same(got, want, *, rtol=2e-4, atol=2e-6):
    for one, other in zip(got, want, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), one, other)


def test_metrics_have_the_names_users_know(run, batch, mesh):
    metrics, gradient, _ = run(batch, mesh)
    assert set(metrics) == {
        "loss", "kl", "entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "sampler/logp_diff_mean",
        "sampler/logp_diff_max", "sampler/k3", "grad_norm", "lr", "step/skipped", "step/weight",
    }  # fmt: skip
    assert all(value.shape == () and value.dtype == np.float32 for value in metrics.values())
    assert metrics["step/skipped"] == 0
    assert metrics["step/weight"] == batch.weight_bt.sum()
    assert metrics["kl"] > 0
    assert metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)


def test_row_order_packing_and_padding_change_nothing(run, batch, segments, pack_rows, mesh):
    want = run(batch, mesh)
    order = np.array([7, 2, 5, 0, 3, 1, 6, 4])
    shuffled = PackedBatch(*(x_bt[order] for x_bt in batch))
    one_a_row = pack_rows([[segment] for segment in segments])
    packed_otherwise = pack_rows([segments[6:8], segments[2:5], segments[:2], segments[5:6]])
    for other in (shuffled, one_a_row, packed_otherwise):
        assert_same(run(other, mesh)[:2], want[:2])


def test_one_compilation_serves_every_fill(run, make_step, segments, pack_rows, mesh):
    for count in (1, 3, 8):
        run(pack_rows([[segment] for segment in segments[:count]]), mesh)
    assert make_step(mesh, 2).whole._cache_size() == 1


def test_rows_without_trained_tokens_are_never_computed(batch, mesh, rules):
    # Rows 3 to 7 are padding and row 1 has tokens but no weight: two rows are left, one micro-batch of four.
    batch.weight_bt[1] = 0
    micro, used = _micro_batches(put_batch(batch, mesh, rules), 2, mesh, rules)
    assert micro.token_bt.shape == (4, 2, 32)
    assert used == 1
    np.testing.assert_array_equal(micro.token_bt[0], batch.token_bt[[0, 2]])


def test_sharded_equals_unsharded_whatever_the_micro_batches(run, batch, segments, pack_rows, mesh, mesh4):
    # Two micro-batches of four rows on 1 x 2 x 2 devices; and on one device three rows in micro-batches of two.
    want = run(batch, mesh)
    assert_same(run(pack_rows([[segment] for segment in segments]), mesh4, micro_rows=4), want)


def test_channels_of_activations_may_be_spread_too(fresh, ref_params, batch, config, run, mesh, mesh4, rules):
    want = run(batch, mesh)
    shared = letters.Rules(rules.weights, {**rules.activations, "d": "tensor"})
    cfg, optim = GrpoConfig(kl_coef=0.1, temperature=0.9), OptimConfig(learning_rate=1e-2, max_grad_norm=1e9)
    step = make_train_step(config, cfg, mesh4, shared, optim=optim, micro_rows=4, chunk=8, remat="products")
    state, metrics = step(fresh(mesh4), ref_params, put_batch(batch, mesh4, shared))
    assert_same((jax.device_get(metrics), jax.device_get(state.params)), (want[0], want[2]))


def test_rows_stay_on_their_devices_and_are_dealt_to_them_in_turn(segments, pack_rows, mesh4, rules):
    # Rows 0 to 4 are filled: devices get 0 2 4 and 1 3, and each micro-batch of two takes one row of each.
    batch = pack_rows([[segment] for segment in segments[:5]])
    micro, used = _micro_batches(put_batch(batch, mesh4, rules), 2, mesh4, rules)
    assert used == 3
    for i, pair in enumerate(([0, 1], [2, 3], [4, 5])):
        np.testing.assert_array_equal(micro.token_bt[i], batch.token_bt[pair])


def test_rows_of_several_lengths_are_one_step(
    run, segments, pack_rows, batch, mesh, make_step, fresh, ref_params, rules
):
    """Short rows beside long ones, micro-batches of equal tokens: the same step, from one compilation."""
    want = run(batch, mesh)
    short = pack_rows([segments[2:4], [segments[4], segments[7]]], 8, 16)
    long = pack_rows([segments[:2], segments[5:7]], 8, 32)
    step = make_step(mesh, 1)
    rows = tuple(put_batch(each, mesh, rules) for each in (short, long))
    state, metrics = step(fresh(mesh), ref_params, rows)
    assert_same((jax.device_get(metrics), jax.device_get(state.params)), (want[0], want[2]))


@pytest.mark.parametrize("on", ["one device", "four devices"])
def test_parts_are_one_step(run, batch, segments, pack_rows, mesh, mesh4, make_step, fresh, ref_params, rules, on):
    """Rows that come in parts, one of them empty: the same step, from one compilation of each program."""
    want = run(batch, mesh)
    there, micro_rows = (mesh, 2) if on == "one device" else (mesh4, 4)
    step, state, sums = make_step(there, micro_rows), fresh(there), make_step(there, micro_rows).nothing()
    for some in (segments[:3], [], segments[3:5], segments[5:]):
        part = pack_rows([some]) if some else PackedBatch.empty(8, 32)
        sums = step.add(state, ref_params, put_batch(part, there, rules), sums)
    state, metrics = step.update(state, sums)
    assert_same((jax.device_get(metrics), jax.device_get(state.params)), (want[0], want[2]))
    assert int(state.step) == 1
    assert step.add._cache_size() == step.update._cache_size() == 1


@pytest.mark.parametrize("where", ["advantage", "params"])
def test_a_step_that_is_not_finite_changes_nothing(make_step, fresh, ref_params, batch, mesh, rules, where):
    step, state = make_step(mesh, 2), fresh(mesh)
    state, _ = step(state, ref_params, put_batch(batch, mesh, rules))  # moments and counters are no longer zero
    poisoned = batch
    if where == "advantage":
        at = tuple(np.argwhere(batch.weight_bt > 0)[3])
        poisoned = batch._replace(advantage_bt=batch.advantage_bt.copy())
        poisoned.advantage_bt[at] = np.nan
    else:
        embed = state.params["embed"].at[5, 3].set(np.inf)
        state = state._replace(params={**state.params, "embed": jax.device_put(embed, state.params["embed"].sharding)})
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = step(state, ref_params, put_batch(poisoned, mesh, rules))
    assert metrics["step/skipped"] == 1
    assert state.step == 2
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, (state.params, state.opt_state)), before)


def test_a_batch_that_trains_nothing_is_skipped_with_a_finite_zero(make_step, fresh, ref_params, mesh, rules):
    state = fresh(mesh)
    before = jax.device_get(state.params)
    state, metrics = make_step(mesh, 2)(state, ref_params, put_batch(PackedBatch.empty(8, 32), mesh, rules))
    assert metrics["loss"] == metrics["grad_norm"] == 0
    assert metrics["step/skipped"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params), before)


def test_bf16_compute_keeps_f32_state_and_no_kl_needs_no_reference(make_step, fresh, batch, mesh, rules, run):
    step = make_step(mesh, 2, kl_coef=0.0, compute_dtype="bfloat16")
    state, metrics = step(fresh(mesh), None, put_batch(batch, mesh, rules))
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.opt_state[1].mu))} == {np.dtype(np.float32)}
    np.testing.assert_allclose(metrics["entropy"], run(batch, mesh)[0]["entropy"], rtol=0.05)
    assert metrics["step/skipped"] == 0
    assert "kl" not in metrics
    flat = batch._replace(advantage_bt=np.zeros_like(batch.advantage_bt))  # every group had equal rewards
    _, metrics = step(state, None, put_batch(flat, mesh, rules))
    assert metrics["loss"] == metrics["grad_norm"] == metrics["step/skipped"] == 0


def test_mistakes_are_refused_before_anything_runs(config, batch, fresh, mesh, mesh4, rules):
    settings = dict(optim=OptimConfig(), micro_rows=3)
    with pytest.raises(ConfigError, match="loss: got 'dpo', allowed are grpo, sft"):
        make_train_step(config, GrpoConfig(), mesh, rules, **settings, loss="dpo")
    with pytest.raises(ConfigError, match="micro_rows: got 3, need a multiple of the 2 devices"):
        make_train_step(config, GrpoConfig(), mesh4, rules, **settings)
    step = make_train_step(config, GrpoConfig(), mesh, rules, **settings)
    with pytest.raises(ConfigError, match="micro_rows: 3 does not divide a batch of 8 rows"):
        step(fresh(mesh), fresh(mesh).params, put_batch(batch, mesh, rules))
    with pytest.raises(ConfigError, match="kl_coef: 0.001 needs the reference model"):
        step(fresh(mesh), None, put_batch(batch, mesh, rules))


def test_the_program_does_not_grow_with_depth(config, mesh, rules):
    """What has to be compiled for 12 layers is what has to be for 6, operation by operation."""

    def operations(layers: int) -> list[str]:
        deep, cfg, optim = dataclasses.replace(config, num_layers=layers), GrpoConfig(), OptimConfig()
        step = make_train_step(deep, cfg, mesh, rules, optim=optim, micro_rows=2, chunk=8, remat="attention")
        batch = PackedBatch(*(jax.ShapeDtypeStruct((4, 32), x.dtype) for x in PackedBatch.empty(1, 1)))
        text = step.whole.lower(
            abstract_state(deep, optim, mesh, rules), weights.abstract(deep, "float32"), batch
        ).as_text()
        return re.findall(r"(?:stablehlo|mhlo|chlo|func|sdy)\.\w+", text)

    assert operations(6) == operations(12)


def test_the_7b_step_traces_with_its_real_shapes(mesh4, rules):
    config, cfg = QWEN2_5["7B"], GrpoConfig()
    step = make_train_step(
        config, cfg, mesh4, rules, optim=OptimConfig(), micro_rows=2, compute_dtype="bfloat16", remat="full"
    )
    state = abstract_state(config, OptimConfig(), mesh4, rules)
    batch = PackedBatch(*(jax.ShapeDtypeStruct((4, 1024), x.dtype) for x in PackedBatch.empty(1, 1)))
    out, metrics = step.whole.eval_shape(state, weights.abstract(config, "bfloat16"), batch)
    assert jax.tree.map(lambda leaf: leaf.shape, out.params) == jax.tree.map(lambda leaf: leaf.shape, state.params)
    assert metrics["kl"].shape == ()
