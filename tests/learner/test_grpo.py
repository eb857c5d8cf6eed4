from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.batch import PackedBatch
from dr_jax.errors import ConfigError
from dr_jax.learner.grpo import GrpoConfig, grpo_terms, k3, loss_gradients, token_logps
from dr_jax.learner.head import Head, Terms
from dr_jax.model import attention, qwen2

PLAIN = GrpoConfig(kl_coef=0.0)


def one_row(weight, advantage, logp) -> PackedBatch:
    empty = PackedBatch.empty(1, len(weight))
    rows = {name: np.array([values], np.float32) for name, values in
            dict(weight_bt=weight, advantage_bt=advantage, logp_bt=logp).items()}  # fmt: skip
    return empty._replace(**rows)


def loss_of(logp_bt, batch, cfg=PLAIN, ref_logp_bt=None, entropy_bt=None):
    entropy_bt = jnp.zeros_like(logp_bt) if entropy_bt is None else entropy_bt
    terms = grpo_terms(logp_bt, entropy_bt, ref_logp_bt, batch, cfg)
    return terms.loss / terms.weight, terms


def test_two_tokens_by_hand():
    # Both tokens are 1.5 times as likely as when they were sampled.
    #   a: weight 1, A = +2:  min(1.5 * 2, 1.2 * 2)   =  2.4, clipped: no gradient
    #   b: weight 3, A = -1:  min(1.5 * -1, 1.2 * -1) = -1.5, not clipped: d/dlogp = ratio * A = -1.5
    # loss = -(1 * 2.4 + 3 * -1.5) / (1 + 3) = 0.525;  dloss/dlogp = (0, -3 * -1.5 / 4) = (0, 1.125)
    batch = one_row(weight=[1, 3], advantage=[2, -1], logp=[-1.0, -2.0])
    logp_bt = jnp.array([[-1.0, -2.0]]) + math.log(1.5)
    (loss, terms), gradient_bt = jax.value_and_grad(loss_of, has_aux=True)(logp_bt, batch)
    np.testing.assert_allclose(loss, 0.525, rtol=1e-6)
    np.testing.assert_allclose(gradient_bt, [[0.0, 1.125]], rtol=1e-6)
    np.testing.assert_allclose(terms.sums["clip_ratio/high_mean"] / terms.weight, 0.25)
    assert terms.sums["clip_ratio/low_mean"] == 0
    np.testing.assert_allclose(terms.sums["sampler/logp_diff_mean"] / terms.weight, math.log(1.5), rtol=1e-6)
    np.testing.assert_allclose(terms.maxima["sampler/logp_diff_max"], math.log(1.5), rtol=1e-6)


def test_against_the_learners_own_logp_the_samplers_rounding_reaches_nothing_but_the_metric():
    # The ratio is exactly 1: loss = -(1 * 2 + 3 * -1) / 4 = 0.25, dloss/dlogp = -weight * A / 4, nothing is clipped.
    cfg = dataclasses.replace(PLAIN, old_logp="learner")
    logp_bt = jnp.array([[-1.0, -2.0]])
    for rounding in (0.0, math.log(1.5)):
        batch = one_row(weight=[1, 3], advantage=[2, -1], logp=[-1.0 - rounding, -2.0 - rounding])
        (loss, terms), gradient_bt = jax.value_and_grad(loss_of, has_aux=True)(logp_bt, batch, cfg)
        assert loss == 0.25
        np.testing.assert_array_equal(gradient_bt, [[-0.5, 0.75]])
        assert terms.sums["clip_ratio/high_mean"] == terms.sums["clip_ratio/low_mean"] == 0
        np.testing.assert_allclose(terms.sums["sampler/logp_diff_mean"] / terms.weight, rounding, rtol=1e-6)


TRUNCATED = GrpoConfig(kl_coef=0.0, old_logp="learner", tis_cap=2.0)


def test_a_token_that_older_weights_drew_weighs_what_it_is_worth_now_up_to_the_cap_by_hand():
    # Token a is 1.5 times as likely as when it was drawn, token b 3 times, token c half: weights 1.5, 2 (cap), 0.5.
    #   loss = -(1 * 2 * 1.5 + 3 * -1 * 2 + 2 * 1 * 0.5) / (1 + 3 + 2) = 1 / 3;   dloss/dlogp = -weight * A * tis / 6
    batch = one_row(weight=[1, 3, 2], advantage=[2, -1, 1], logp=[-1.0, -2.0, -1.0])
    logp_bt = batch.logp_bt + jnp.log(jnp.array([[1.5, 3.0, 0.5]]))
    (loss, terms), gradient_bt = jax.value_and_grad(loss_of, has_aux=True)(logp_bt, batch, TRUNCATED)
    np.testing.assert_allclose(loss, 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient_bt, [[-3 / 6, 6 / 6, -1 / 6]], rtol=1e-6)
    np.testing.assert_allclose(terms.sums["sampler/truncated_mean"] / terms.weight, 3 / 6)
    k3_sum = (1.5 - math.log(1.5) - 1) + 3 * (3 - math.log(3) - 1) + 2 * (0.5 - math.log(0.5) - 1)
    np.testing.assert_allclose(terms.sums["sampler/k3"] / terms.weight, k3_sum / 6, rtol=1e-5)
    # At the cap itself nothing is cut.
    exactly = batch.logp_bt + jnp.log(jnp.array([[2.0, 2.0, 2.0]])) * 0.999
    assert loss_of(exactly, batch, TRUNCATED)[1].sums["sampler/truncated_mean"] == 0


def test_truncation_leaves_kl_and_entropy_alone():
    # A = 0: the loss is that of KL and entropy, whatever the sampler's log-probabilities.
    cfg = dataclasses.replace(TRUNCATED, kl_coef=0.1, entropy_coef=0.01)
    logp_bt = jnp.array([[-1.0, -2.0]])
    ref_logp_bt, entropy_bt = logp_bt + jnp.array([[math.log(2.0), 0.0]]), jnp.array([[2.0, 1.0]])
    batches = [one_row(weight=[1, 3], advantage=[0, 0], logp=logp) for logp in ([-1.0, -2.0], [-3.0, -0.5])]
    same, far = (loss_of(logp_bt, batch, cfg, ref_logp_bt, entropy_bt)[0] for batch in batches)
    np.testing.assert_allclose(same, (0.1 * (1 - math.log(2)) - 0.01 * 5) / 4, rtol=1e-5)
    assert far == same


def test_without_drift_truncation_changes_nothing():
    rng = np.random.default_rng(0)
    batch = one_row(rng.uniform(0, 2, 20), rng.normal(size=20), -rng.uniform(0, 5, 20))
    plain = dataclasses.replace(TRUNCATED, tis_cap=0.0)
    on_policy_bt = jnp.asarray(batch.logp_bt)
    got, want = (
        jax.value_and_grad(lambda logp_bt, cfg=cfg: loss_of(logp_bt, batch, cfg)[0])(on_policy_bt)
        for cfg in (TRUNCATED, plain)
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_truncation_of_a_token_that_was_all_but_impossible_stays_finite():
    batch = one_row(weight=[1, 1, 0], advantage=[-1, 1, 1], logp=[-200.0, -0.1, -np.inf])
    value, gradient_bt = jax.value_and_grad(lambda x: loss_of(x, batch, TRUNCATED)[0])(
        jnp.array([[-0.1, -200.0, -1.0]])
    )
    np.testing.assert_allclose(gradient_bt, [[1.0, -math.exp(-20) / 2, 0.0]], rtol=1e-5)
    assert np.isfinite(value)


def test_kl_and_entropy_enter_the_loss_by_hand():
    # On policy, A = 0. The reference finds token a twice as likely: k3 = 2 - ln 2 - 1; token b equally likely: 0.
    # loss = (1 * 0.1 * (1 - ln 2) + 3 * 0) / 4 - 0.01 * (1 * 2.0 + 3 * 1.0) / 4
    batch = one_row(weight=[1, 3], advantage=[0, 0], logp=[-1.0, -2.0])
    logp_bt = jnp.array([[-1.0, -2.0]])
    cfg = GrpoConfig(kl_coef=0.1, entropy_coef=0.01)
    ref_logp_bt = logp_bt + jnp.array([[math.log(2.0), 0.0]])
    loss, terms = loss_of(logp_bt, batch, cfg, ref_logp_bt, entropy_bt=jnp.array([[2.0, 1.0]]))
    np.testing.assert_allclose(loss, 0.1 * (1 - math.log(2)) / 4 - 0.01 * 5 / 4, rtol=1e-5)
    np.testing.assert_allclose(terms.sums["kl"] / terms.weight, (1 - math.log(2)) / 4, rtol=1e-5)
    np.testing.assert_allclose(terms.sums["entropy"] / terms.weight, 5 / 4, rtol=1e-6)


def test_low_clip_stops_a_penalty_that_has_done_its_work():
    # ratio 0.5 < 1 - 0.2 with A = -1: min(-0.5, -0.8) = -0.8, no gradient. With A = +1: min(0.5, 0.8) = 0.5, gradient.
    batch = one_row(weight=[1, 1], advantage=[-1, 1], logp=[-1.0, -1.0])
    logp_bt = jnp.full((1, 2), -1.0 + math.log(0.5))
    (loss, terms), gradient_bt = jax.value_and_grad(loss_of, has_aux=True)(logp_bt, batch)
    np.testing.assert_allclose(loss, (0.8 - 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient_bt, [[0.0, -0.25]], rtol=1e-6)
    np.testing.assert_allclose(terms.sums["clip_ratio/low_mean"] / terms.weight, 0.5)


def test_on_policy_gradient_is_reinforce():
    rng = np.random.default_rng(0)
    weight, advantage, logp = rng.uniform(0, 2, 20), rng.normal(size=20), -rng.uniform(0, 5, 20)
    batch = one_row(weight, advantage, logp)
    gradient_bt = jax.grad(lambda logp_bt: loss_of(logp_bt, batch)[0])(jnp.asarray(batch.logp_bt))
    np.testing.assert_allclose(gradient_bt[0], -weight * advantage / weight.sum(), rtol=1e-5)


def test_zero_weight_gives_exactly_zero_gradient():
    # Not even values no one would write there may leak: infinities become NaN when multiplied by 0.
    batch = one_row(weight=[0, 1, 0, 0], advantage=[1, 1, np.inf, 1], logp=[np.nan, -1.0, -1.0, -np.inf])
    logp_bt = jnp.array([[0.0, -1.0, 500.0, -1.0]])
    cfg = GrpoConfig(kl_coef=0.1, entropy_coef=0.1)

    def loss(logp_bt):
        ref_logp_bt = jnp.array([[jnp.nan, -1.0, -jnp.inf, jnp.inf]])
        return loss_of(logp_bt, batch, cfg, ref_logp_bt, entropy_bt=logp_bt)[0]

    value, gradient_bt = jax.value_and_grad(loss)(logp_bt)
    assert np.isfinite(value)
    assert (np.asarray(gradient_bt)[0, [0, 2, 3]] == 0).all()
    assert gradient_bt[0, 1] != 0


def test_a_group_of_equal_rewards_gives_a_finite_zero():
    batch = one_row(weight=[1, 1, 1], advantage=[0, 0, 0], logp=[-1.0, -2.0, -3.0])
    (loss, _), gradient_bt = jax.value_and_grad(loss_of, has_aux=True)(jnp.array([[-9.0, -0.1, -3.0]]), batch)
    assert loss == 0
    assert (np.asarray(gradient_bt) == 0).all()


def test_k3_is_never_negative_and_right_where_it_is_small():
    delta = np.concatenate([sign * np.geomspace(1e-9, 1e-2, 2000) for sign in (1, -1)]).astype(np.float32)
    got = np.asarray(k3(delta))
    assert (got >= 0).all()
    exact = delta.astype(np.float64)
    want = exact**2 / 2 + exact**3 / 6 + exact**4 / 24
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-10)


def test_k3_golden_values():
    delta = jnp.array([0.0, math.log(2.0), -math.log(2.0), 1.0, -1.0, 3.0, 100.0, -5.0, -100.0])
    want = [0.0, 1 - math.log(2), math.log(2) - 0.5, math.e - 2, 1 / math.e, 10.0, 10.0, 4.0067379, 10.0]
    np.testing.assert_allclose(k3(delta), want, rtol=1e-6, atol=1e-7)
    assert np.isfinite(jax.vmap(jax.grad(k3))(delta)).all()


def test_far_off_policy_stays_finite():
    batch = one_row(weight=[1, 1], advantage=[-1, 1], logp=[-200.0, -0.1])
    value, gradient_bt = jax.value_and_grad(lambda logp_bt: loss_of(logp_bt, batch)[0])(jnp.array([[-0.1, -200.0]]))
    assert np.isfinite(value)
    assert np.isfinite(gradient_bt).all()


@pytest.mark.parametrize(
    "bad", [{"clip_low": 0.0}, {"clip_low": 1.5}, {"clip_high": -0.1}, {"kl_coef": -1.0}, {"temperature": 0.0},
            {"tis_cap": 0.5, "old_logp": "learner"}, {"tis_cap": -1.0, "old_logp": "learner"},
            {"tis_cap": 2.0, "old_logp": "sampler"}]
)  # fmt: skip
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        GrpoConfig(**bad)


@pytest.fixture(scope="module")
def naive(config, rules, mesh):
    """Log-probabilities and entropy of one segment alone, the obvious way; 16 columns, so that it compiles once."""

    @jax.jit
    def padded(params, token_t, temperature):
        token_bt, position_bt = token_t[None], jnp.arange(len(token_t))[None]
        attend = attention.packed(jnp.ones_like(token_bt))
        x_btd, _ = qwen2.forward(params, config, token_bt, position_bt, attend=attend, rules=rules)
        logp_tv = jax.nn.log_softmax(qwen2.unembed(params, config, x_btd)[0, :-1] / temperature)
        logp_t = jnp.take_along_axis(logp_tv, token_t[1:, None], axis=1)[:, 0]
        return jnp.pad(logp_t, (1, 0)), jnp.pad(-(jnp.exp(logp_tv) * logp_tv).sum(-1), (1, 0))

    def compute(params, token, temperature):
        token_t = np.pad(token, (0, 16 - len(token))).astype(np.int32)
        return tuple(x_t[: len(token)] for x_t in padded(params, token_t, temperature))

    return compute


def everything_trained(batch: PackedBatch) -> PackedBatch:
    follows_bt = (batch.segment_bt > 0) & (batch.position_bt > 0)
    return batch._replace(weight_bt=follows_bt.astype(np.float32))


@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 8), (0.7, 512)])
def test_packed_chunked_logps_are_those_of_each_segment_alone(
    config, rules, mesh, params, segments, pack_rows, naive, temperature, chunk
):
    rows = [segments[:3], segments[3:5]]
    batch = everything_trained(pack_rows(rows, total_rows=2))
    head = Head(config, rules, temperature, chunk)
    with jax.set_mesh(mesh):
        logp_bt, entropy_bt = jax.jit(lambda params: token_logps(head, params, batch))(params)
        for row, packed in enumerate(rows):
            alone = [naive(params, token, temperature) for token, *_ in packed]
            logp_t, entropy_t = (np.concatenate(parts) for parts in zip(*alone, strict=True))
            padding = 32 - len(logp_t)
            np.testing.assert_allclose(logp_bt[row], np.pad(logp_t, (0, padding)), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(entropy_bt[row], np.pad(entropy_t, (0, padding)), rtol=1e-5, atol=1e-5)


def test_what_is_not_trained_is_left_out_and_changes_nothing_else(config, rules, mesh, params, segments, pack_rows):
    some = pack_rows([segments[:2], segments[2:4]], total_rows=2)
    with jax.set_mesh(mesh):
        logps = jax.jit(lambda batch: token_logps(Head(config, rules, chunk=4), params, batch))
        got, want = logps(some), logps(everything_trained(some))
    for some_bt, all_bt in zip(got, want, strict=True):
        np.testing.assert_allclose(some_bt, np.where(some.weight_bt > 0, all_bt, 0), rtol=1e-6)
    assert (some.weight_bt > 0).any(1).all()


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_those_of_plain_log_softmax(config, rules, mesh, params, segments, pack_rows, naive, tied):
    if not tied:
        config = dataclasses.replace(config, tie_embeddings=False)
        params = {**params, "unembed": params["embed"].T.copy()}  # so that `naive`, which is tied, says the same
    token, *_ = segments[0]
    batch = everything_trained(pack_rows([segments[:1]], total_rows=1, length=16))
    weight_t = np.linspace(-1, 1, len(token)).astype(np.float32)
    batch = batch._replace(advantage_bt=np.pad(weight_t, (0, 3))[None], logp_bt=np.pad(weight_t[::-1], (0, 3))[None])

    def linear(logp_bt, entropy_bt, ref_logp_bt, batch):
        loss = (batch.weight_bt * (batch.advantage_bt * logp_bt + batch.logp_bt * entropy_bt)).sum()
        return Terms(loss + (batch.weight_bt * ref_logp_bt).sum(), {}, {}, batch.weight_bt.sum())

    def plain(params):
        logp_t, entropy_t = naive(params, token, 0.7)
        return (logp_t * weight_t + entropy_t * weight_t[::-1]).sum()

    head, ref_logp_bt = Head(config, rules, temperature=0.7, chunk=4), np.arange(16, dtype=np.float32)[None]
    with jax.set_mesh(mesh):
        terms, got = jax.jit(lambda params: loss_gradients(head, params, batch, ref_logp_bt, linear))(params)
        value, want = jax.jit(jax.value_and_grad(plain))({name: params[name] for name in params if name != "unembed"})
    np.testing.assert_allclose(terms.loss, value + sum(range(1, len(token))), rtol=1e-5)  # each token met its own
    assert terms.weight == len(token) - 1
    if not tied:
        got["embed"] += got.pop("unembed").T
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, want)
