"""Drawing: log-probabilities before truncation, exact truncation, and draws that depend on (seed, index) alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax.engine import draw as drawing
from dr_jax.engine.draw import Draw

B = 20_000  # rows of most tests, so that they share a compilation
draw, truncate = jax.jit(drawing.draw), jax.jit(drawing.truncate)
LOGITS = np.array([2.0, 1.0, 0.0, -1.0, -30.0], np.float32)  # probabilities 0.644, 0.237, 0.087, 0.032, 0


def knobs(b: int, *, temperature=1.0, top_p=1.0, top_k=0, seed=0, index=0) -> Draw:
    return Draw(
        jnp.full(b, temperature, jnp.float32),
        jnp.full(b, top_p, jnp.float32),
        jnp.full(b, top_k, jnp.int32),
        jnp.broadcast_to(jnp.asarray(seed, jnp.uint32), (b,)),
        jnp.broadcast_to(jnp.asarray(index, jnp.int32), (b,)),
    )


def rows(b: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(LOGITS), (b, 5))


def test_greedy_takes_the_top_and_reports_its_logp_at_temperature_one():
    token_b, logp_b = draw(rows(B), knobs(B, temperature=0.0, seed=np.arange(B)))
    assert not token_b.any()
    np.testing.assert_allclose(logp_b, jax.nn.log_softmax(LOGITS)[0], rtol=1e-6)


def test_of_equals_the_first_is_taken_and_nan_gives_a_token_all_the_same():
    logits_bv = np.array([[1, 3, 3, 0], [np.nan, 1, 2, 3], [-np.inf] * 3 + [0]], np.float32)
    token_b, logp_b = draw(logits_bv, knobs(3, temperature=0.0))
    assert (token_b[0], token_b[2]) == (1, 3)
    assert 0 <= token_b[1] < 4
    assert np.isfinite(logp_b).tolist() == [True, False, True]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_softmax_of_logits_over_temperature(temperature):
    token_b, logp_b = draw(rows(B), knobs(B, temperature=temperature, seed=np.arange(B)))
    want_v = np.asarray(jax.nn.softmax(LOGITS / temperature))
    np.testing.assert_allclose(np.bincount(token_b, minlength=5) / B, want_v, atol=0.015)  # 4 standard deviations
    np.testing.assert_allclose(logp_b, np.log(want_v)[token_b], rtol=1e-5)


def test_successive_indices_of_one_seed_are_independent_draws():
    token_b, _ = draw(rows(B), knobs(B, seed=7, index=np.arange(B)))
    np.testing.assert_allclose(np.bincount(token_b, minlength=5) / B, jax.nn.softmax(LOGITS), atol=0.015)


def test_a_row_is_drawn_alike_alone_and_in_any_company():
    logits_bv = jax.random.normal(jax.random.key(0), (6, 50))
    how = knobs(6, temperature=0.7, top_p=0.9, seed=[5, 6, 7, 5, 5, 9], index=[0, 1, 2, 3, 4, 5])
    token_b, logp_b = draw(logits_bv, how)
    for row in (0, 3, 5):
        alone, logp = draw(logits_bv[row : row + 1], jax.tree.map(lambda x, row=row: x[row : row + 1], how))
        assert (alone[0], logp[0]) == (token_b[row], logp_b[row])


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, [0, 1, 2, 3, 4]),
        (1.0, 2, [0, 1]),
        (1.0, 9, [0, 1, 2, 3, 4]),
        (0.6, 0, [0]),  # 0.644 reaches 0.6 alone
        (0.65, 0, [0, 1]),
        (0.9, 0, [0, 1, 2]),
        (1e-6, 0, [0]),
        (0.7, 2, [0]),  # of the two kept by top-k, token 0 has 0.644 / 0.881 = 0.73
        (0.75, 2, [0, 1]),
    ],
)
def test_truncation_keeps_exactly_these(top_p, top_k, kept):
    logp_bv = jax.nn.log_softmax(rows(1))
    kept_bv = truncate(logp_bv, jnp.array([top_p]), jnp.array([top_k]))
    assert np.flatnonzero(np.isfinite(kept_bv[0])).tolist() == kept
    np.testing.assert_array_equal(kept_bv[0][jnp.array(kept)], logp_bv[0][jnp.array(kept)])


def test_truncation_equals_sorting_on_random_rows():
    logp_bv = jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(1), (40, 200)))
    kept_bv = np.isfinite(truncate(logp_bv, jnp.full(40, 0.8), jnp.full(40, 30)))
    for logp_v, kept_v in zip(np.asarray(logp_bv), kept_bv, strict=True):
        order = np.argsort(-logp_v)[:30]
        mass = np.cumsum(np.exp(logp_v[order]))
        want = order[: np.searchsorted(mass, 0.8 * mass[-1]) + 1]
        assert set(np.flatnonzero(kept_v)) == set(want)


def test_logps_are_of_the_untruncated_distribution():
    token_b, logp_b = draw(rows(B), knobs(B, temperature=2.0, top_k=2, seed=np.arange(B)))
    assert set(np.asarray(token_b)) == {0, 1}
    np.testing.assert_allclose(logp_b, jax.nn.log_softmax(LOGITS / 2)[token_b], rtol=1e-5)
