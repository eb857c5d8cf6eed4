from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from dr_jax.model import flash, letters, splash
from dr_jax.plan import flops


def counted(function, *shapes, **how):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return flops.count(jax.make_jaxpr(function)(*args).jaxpr, **how)


def test_a_product_is_two_flops_a_multiply_add_and_batches_count():
    assert counted(lambda a, b: a @ b, (3, 5), (5, 7)) == flops.Flops(2 * 3 * 5 * 7, 0)
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)).matrix == 4 * 2 * 3 * 5 * 7


def test_loops_count_their_trips_and_conditionals_their_dearest_branch():
    def scanned(x):
        return jax.lax.scan(lambda x, _: (x @ x, None), x, length=6)[0]

    def dynamic(x, n):
        return jax.lax.fori_loop(0, n.astype(int), lambda _, x: scanned(x), x)

    def either(x):
        return jax.lax.cond(x[0, 0] > 0, scanned, lambda x: x @ x, x)

    product = 2 * 4 * 4 * 4
    assert counted(scanned, (4, 4)).matrix == 6 * product
    assert counted(dynamic, (4, 4), (), dynamic_trips=5).matrix == 5 * 6 * product
    assert counted(either, (4, 4)).matrix == 6 * product


def test_what_is_computed_again_in_the_backward_pass_counts():
    def loss(w, remat):
        layer = lambda w: jnp.sin(jnp.sin(w @ w) @ w).sum()  # noqa: E731
        return (jax.checkpoint(layer) if remat else layer)(w)

    kept = counted(jax.grad(lambda w: loss(w, remat=False)), (4, 4)).matrix
    again = counted(jax.grad(lambda w: loss(w, remat=True)), (4, 4)).matrix
    assert kept == 6 * 2 * 4**3  # two products, each three times
    assert again == kept + 2 * 2 * 4**3


def test_the_inside_of_shard_map_counts_on_every_device():
    mesh = AbstractMesh((4, 2), ("a", "b"))
    rows = PartitionSpec("a")
    both = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows)
    assert counted(both, (8, 5), (5, 7)).matrix == 2 * (2 * 8 * 5 * 7)  # each half of b computes all rows


def counted_attention(kernel, length):
    b, n, h = 1, 4, 128

    def attend(q, k, v):
        segment_bt = jnp.ones((b, length), jnp.int32)
        return kernel(segment_bt, letters.DEFAULT_RULES)(jnp.int32(0), q, k, v, None)[0]

    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))):
        return counted(attend, (b, length, n, h), (b, length, 2, h), (b, length, 2, h))


@pytest.mark.parametrize("kernel", [splash.packed, flash.packed])  # the second says itself what it multiplies
def test_a_causal_kernel_counts_the_blocks_it_visits(kernel):
    # Scores and sum of 4 heads of 128; three of four blocks of 1,024.
    assert counted_attention(kernel, 2048) == flops.Flops(0, 2 * 2 * 4 * 128 * 2048**2 * 3 / 4)
