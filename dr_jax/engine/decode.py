"""The four programs of the engine. Their shapes are fixed when they are built, so each compiles exactly once.

    extend    p rows x c prompt tokens into their slots      no logits: a prompt's last token is fed by `generate`
    score     the same, returning the log-probability of given next tokens
    generate  up to `steps` tokens for all slots at once, between two visits to the host
    copy      one slot's prefix into another slot

All but the arguments that live on device are numpy arrays, made anew for each call; the cache is donated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dr_jax.engine.cache import Cache, attend_slots, copy_prefix
from dr_jax.engine.draw import Draw, draw
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, spec
from dr_jax.model.qwen2 import forward, unembed
from dr_jax.model.weights import Params

MAX_STOP_IDS = 8  # per request


class Rows(NamedTuple):
    """What `generate` must know of each slot; arrays [b]. An inert slot costs no attention and writes nothing."""

    live_b: np.ndarray  # bool
    token_b: np.ndarray  # int32, the last token, not fed yet
    position_b: np.ndarray  # int32, where it goes
    budget_b: np.ndarray  # int32, number of tokens this request may draw in all
    stop_bj: np.ndarray  # int32 [b, MAX_STOP_IDS], -1 = unused
    draw: Draw


class Drawn(NamedTuple):
    """What `generate` drew; step i of slot b counts where `live_ib`."""

    token_ib: jax.Array
    logp_ib: jax.Array
    live_ib: jax.Array


class Programs(NamedTuple):
    """Jitted; see the module."""

    extend: Callable[..., Cache]  # (params, cache, slot_b, token_bt, position_bt)
    score: Callable[..., tuple[Cache, jax.Array]]  # (params, cache, slot_b, token_bt, position_bt, next_token_bt)
    generate: Callable[..., tuple[Cache, Drawn]]  # (params, cache, rows)
    copy: Callable[..., Cache]  # (cache, source, target, length)


def inert(slots: int) -> Rows:
    """Rows in which no slot is live, for the host to fill in."""
    zeros, ones = np.zeros(slots, np.int32), np.ones(slots, np.float32)
    return Rows(
        live_b=np.zeros(slots, bool),
        token_b=zeros.copy(),
        position_b=zeros.copy(),
        budget_b=zeros.copy(),
        stop_bj=np.full((slots, MAX_STOP_IDS), -1, np.int32),
        draw=Draw(0 * ones, ones.copy(), zeros.copy(), np.zeros(slots, np.uint32), zeros.copy()),
    )


def build(config: ModelConfig, *, mesh: Mesh, rules: Rules, steps: int) -> Programs:
    """The programs for one network on one mesh. `steps` = tokens drawn between two visits to the host."""

    def extend(params: Params, cache: Cache, slot_b, token_bt, position_bt) -> Cache:
        attend = attend_slots(slot_b, position_bt, cache.positions)
        return forward(params, config, token_bt, position_bt, attend=attend, rules=rules, cache=cache)[1]

    def score(params: Params, cache: Cache, slot_b, token_bt, position_bt, next_token_bt):
        attend = attend_slots(slot_b, position_bt, cache.positions)
        x_btd, cache = forward(params, config, token_bt, position_bt, attend=attend, rules=rules, cache=cache)

        def logp_of(row) -> jax.Array:  # row by row: a chunk of logits of a large vocabulary is all that fits
            x_td, next_token_t = row
            logits_tv = unembed(params, config, x_td[None])[0]
            return jnp.take_along_axis(jax.nn.log_softmax(logits_tv), next_token_t[:, None], axis=-1)[:, 0]

        return cache, jax.lax.map(logp_of, (x_btd, next_token_bt))

    def generate(params: Params, cache: Cache, rows: Rows) -> tuple[Cache, Drawn]:
        b = rows.live_b.shape[0]
        drawn = Drawn(jnp.zeros((steps, b), jnp.int32), jnp.zeros((steps, b), jnp.float32), jnp.zeros((steps, b), bool))

        def step(state: tuple[jax.Array, Cache, Rows, Drawn]):
            i, cache, rows, drawn = state
            position_b1 = jnp.where(rows.live_b, rows.position_b, cache.positions)[:, None]
            attend = attend_slots(jnp.arange(b), position_b1, cache.positions)
            x_b1d, cache = forward(
                params, config, rows.token_b[:, None], position_b1, attend=attend, rules=rules, cache=cache
            )
            token_b, logp_b = draw(unembed(params, config, x_b1d)[:, 0], rows.draw)
            drawn = Drawn(
                *(all_ib.at[i].set(x_b) for all_ib, x_b in zip(drawn, (token_b, logp_b, rows.live_b), strict=True))
            )
            return i + 1, cache, _advance(rows, token_b), drawn

        def more(state: tuple[jax.Array, Cache, Rows, Drawn]) -> jax.Array:
            i, _, rows, _ = state
            return (i < steps) & rows.live_b.any()

        _, cache, _, drawn = jax.lax.while_loop(more, step, (jnp.int32(0), cache, rows, drawn))
        return cache, drawn

    placed = NamedSharding(mesh, spec("lbksh", rules.activations))
    return Programs(
        extend=jax.jit(extend, donate_argnums=1, out_shardings=placed),
        score=jax.jit(score, donate_argnums=1, out_shardings=(placed, None)),
        generate=jax.jit(generate, donate_argnums=1, out_shardings=(placed, None)),
        copy=jax.jit(copy_prefix, donate_argnums=0, out_shardings=placed),
    )


def _advance(rows: Rows, token_b: jax.Array) -> Rows:
    """The rows after each live one drew `token_b`: a stop id, or the budget, makes a row inert."""
    index_b = rows.draw.index_b + 1
    stopped_b = (token_b[:, None] == rows.stop_bj).any(-1) | (index_b >= rows.budget_b)
    return rows._replace(
        live_b=rows.live_b & ~stopped_b,
        token_b=token_b,
        position_b=rows.position_b + 1,
        draw=rows.draw._replace(index_b=index_b),
    )
