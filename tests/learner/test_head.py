from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.batch import PackedBatch
from dr_jax.errors import ConfigError
from dr_jax.learner.head import Head, Terms, gradients, logps
from dr_jax.model import letters, weights


@pytest.fixture(scope="module")
def hidden():
    """Hidden states of two rows of 32 positions, what they have to predict, and which of it is trained."""
    rng = np.random.default_rng(3)
    wanted_bt = np.zeros((2, 32), bool)
    wanted_bt[0, 5:18], wanted_bt[1, [0, 9, 31]] = (
        True,
        True,
    )  # 16: two chunks of 8, or 13 on one device and 3 on another
    return rng.normal(size=(2, 32, 16)).astype(np.float32), rng.integers(0, 96, (2, 32)).astype(np.int32), wanted_bt


def rows_of(target_bt, wanted_bt) -> PackedBatch:
    batch = PackedBatch.empty(*target_bt.shape)
    advantage_bt = np.linspace(-2, 3, target_bt.size, dtype=np.float32).reshape(target_bt.shape)
    return batch._replace(token_bt=target_bt, weight_bt=wanted_bt.astype(np.float32), advantage_bt=advantage_bt)


def loss_of(logp_bt, entropy_bt, ref_logp_bt, batch):
    loss_bt = batch.weight_bt * batch.advantage_bt * (jnp.exp(logp_bt) - 0.1 * entropy_bt)
    seen_bt = jnp.where(batch.weight_bt > 0, -logp_bt, 0.0)
    return Terms(loss_bt.sum(), {"logp": -seen_bt.sum()}, {"worst": seen_bt.max()}, batch.weight_bt.sum())


def plainly(config, params, x_btd, batch, temperature):
    logp_btv = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", x_btd, params["embed"]) / temperature)
    logp_bt = jnp.take_along_axis(logp_btv, batch.token_bt[..., None], axis=2)[..., 0]
    return logp_bt, -(jnp.exp(logp_btv) * logp_btv).sum(-1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 1), (2, 1, 2), (1, 1, 4)])
def test_terms_and_gradients_are_those_of_the_whole_logits_on_any_mesh(config, params, hidden, shape, rules):
    x_btd, target_bt, wanted_bt = hidden
    batch, mesh = (
        rows_of(target_bt, wanted_bt),
        letters.make_mesh(dict(zip(("data", "fsdp", "tensor"), shape, strict=True))),
    )
    head = Head(config, rules, temperature=0.8, chunk=8)

    def plain(weights, x_btd):
        terms = loss_of(*plainly(config, weights, x_btd, batch, 0.8), None, batch)
        return terms.loss, terms

    with jax.set_mesh(mesh):
        terms, by_weights, by_x_btd = jax.jit(
            lambda params, x_btd: gradients(head, params, x_btd, batch, None, loss_of)
        )(params, x_btd)
    (_, want), (by_params, by_x) = jax.value_and_grad(plain, (0, 1), has_aux=True)(params, x_btd)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), terms, want)
    assert by_weights.keys() == {"embed"}
    np.testing.assert_allclose(by_weights["embed"], by_params["embed"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_x_btd, by_x, rtol=1e-4, atol=1e-5)


def test_positions_may_be_spread_over_devices(config, params, hidden, rules):
    x_btd, target_bt, wanted_bt = hidden
    batch, mesh = rows_of(target_bt, wanted_bt), letters.make_mesh({"data": 2, "context": 4})
    spread = letters.Rules(
        {**rules.weights, "v": None, "d": None}, {**rules.activations, "b": "data", "t": "context", "v": None}
    )
    head = Head(config, spread, chunk=4)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda params, x_btd: logps(head, params, x_btd, target_bt, wanted_bt))(params, x_btd)
        terms, *_ = jax.jit(lambda params, x_btd: gradients(head, params, x_btd, batch, None, loss_of))(params, x_btd)
    want = plainly(config, params, x_btd, batch, 1.0)
    for got_bt, want_bt in zip(got, want, strict=True):
        np.testing.assert_allclose(got_bt, np.where(wanted_bt, want_bt, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(terms.loss, loss_of(*want, None, batch).loss, rtol=1e-5)


def test_what_is_not_trained_is_not_multiplied(config, params, hidden, rules, mesh):
    """The sixteen wanted tokens fill two chunks; a token in any other would make a gradient of the weight NaN."""
    x_btd, target_bt, wanted_bt = hidden
    x_btd = np.where(wanted_bt[..., None], x_btd, np.nan)
    head, batch = Head(config, rules, chunk=8), rows_of(target_bt, wanted_bt)
    with jax.set_mesh(mesh):
        terms, by_weights, by_x_btd = jax.jit(
            lambda params, x_btd: gradients(head, params, x_btd, batch, None, loss_of)
        )(params, x_btd)
    assert np.isfinite(terms.loss)
    assert np.isfinite(by_weights["embed"]).all()
    np.testing.assert_array_equal((np.asarray(by_x_btd) != 0).any(-1), wanted_bt)


def test_a_device_with_nothing_to_train_gives_zeros(config, params, hidden, rules, mesh):
    x_btd, target_bt, wanted_bt = hidden
    batch = rows_of(target_bt, np.zeros_like(wanted_bt))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda p, x_btd: gradients(Head(config, rules), p, x_btd, batch, None, loss_of))(params, x_btd)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(found))


def test_full_logits_never_exist(config, rules, mesh, hidden):
    x_btd, target_bt, wanted_bt = hidden
    wide = dataclasses.replace(config, vocab_size=4096)  # no other array comes near 2 x 32 x 4096
    full = 2 * 32 * wide.vocab_size

    def largest(chunk: int) -> int:
        def loss(params):
            return gradients(
                Head(wide, rules, chunk=chunk), params, x_btd, rows_of(target_bt, wanted_bt), None, loss_of
            )

        return max(sizes(jax.make_jaxpr(loss)(weights.abstract(wide, jnp.float32)).jaxpr))

    with jax.set_mesh(mesh):
        assert largest(chunk=16) < full / 2, "something as large as half of [b, t, v] is computed or kept"
        assert largest(chunk=64) >= full, "this test no longer sees the logits at all"


def test_a_trained_token_costs_three_products_with_the_head_and_another_of_the_reference(config, rules, mesh, hidden):
    x_btd, target_bt, wanted_bt = hidden
    head, batch = Head(config, rules, chunk=8), rows_of(target_bt, wanted_bt)
    with jax.set_mesh(mesh):
        policy = jax.make_jaxpr(lambda p: gradients(head, p, x_btd, batch, None, loss_of))(
            weights.abstract(config, "f4")
        )
        reference = jax.make_jaxpr(lambda p: logps(head, p, x_btd, target_bt, wanted_bt))(
            weights.abstract(config, "f4")
        )
    assert str(policy).count("dot_general") == 3
    assert str(reference).count("dot_general") == 1


def sizes(jaxpr):
    """Elements of every intermediate array, inside loops and branches too."""
    for equation in jaxpr.eqns:
        yield from (out.aval.size for out in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_chunk_must_divide_the_tokens_of_a_device(config, rules, mesh, params, hidden):
    x_btd, target_bt, wanted_bt = hidden
    with jax.set_mesh(mesh), pytest.raises(ConfigError, match="chunk: 5 does not divide the 64 tokens of a device"):
        jax.eval_shape(lambda params: logps(Head(config, rules, chunk=5), params, x_btd, target_bt, wanted_bt), params)
