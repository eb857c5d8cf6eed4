"""The four programs of the engine. Their shapes are fixed when it is made, and all are compiled before it serves.

    extend    r rows x c prompt tokens into their pages      no logits: a prompt's last token is fed by `generate`
    score     the same, returning the log-probability of given next tokens
    generate  up to `steps` tokens for all rows at once, between two visits to the host
    copy      up to `cache.COPIES` pages over other pages

A row is a sequence, or a part of one: all rows write before any row attends. Nothing ties a sequence to a row; where
its keys and values are is told by its line of the block table, `table_bp`. All but the arguments that live on device
are numpy arrays, made anew for each call; the pool of pages, `kv`, is donated.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dr_jax.engine import cache, ragged
from dr_jax.engine.cache import PADDING
from dr_jax.engine.draw import Draw, draw
from dr_jax.errors import ConfigError
from dr_jax.model.attention import Attend
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, sizes, spec
from dr_jax.model.qwen2 import forward, unembed
from dr_jax.model.weights import Params


class Attention(NamedTuple):
    """A way to attend to pages, and how they have to lie for it."""

    pool: Any  # the letters of its arrays
    heads: int  # that an array has for each kv head: 2 where keys and values share it
    attend: Callable[..., Attend]  # (table_bp, position_bt, kv, layers, rules)


ATTENTION = {
    "blocks": Attention(
        cache.LETTERS, 1,
        lambda table_bp, position_bt, kv, layers, rules: cache.attend_blocks(
            table_bp, position_bt, kv.k_pkhs.shape[0] // layers
        ),
    ),
    "ragged": Attention(
        ragged.LETTERS, 2,
        lambda table_bp, position_bt, kv_pskh, layers, rules: ragged.attend_ragged(
            table_bp, position_bt, kv_pskh.shape[0] // layers, kv_pskh.shape[1], rules
        ),
    ),
}  # fmt: skip
MAX_STOP_IDS = 8  # per request


class Rows(NamedTuple):
    """What `generate` must know of each row; arrays [b]. An inert row writes nothing."""

    table_bp: np.ndarray  # int32, the pages of each row
    live_b: np.ndarray  # bool
    token_b: np.ndarray  # int32, the last token, not fed yet
    position_b: np.ndarray  # int32, where it goes
    budget_b: np.ndarray  # int32, number of tokens this request may draw in all
    stop_bj: np.ndarray  # int32 [b, MAX_STOP_IDS], -1 = unused
    draw: Draw


class Drawn(NamedTuple):
    """What `generate` drew; step i of row b counts where `live_ib`."""

    token_ib: jax.Array
    logp_ib: jax.Array
    live_ib: jax.Array


class Programs(NamedTuple):
    """Jitted; see the module."""

    extend: Callable[..., Any]  # (params, kv, table_bp, token_bt, position_bt)
    score: Callable[..., tuple[Any, jax.Array]]  # (params, kv, table_bp, token_bt, position_bt, next_token_bt)
    generate: Callable[..., tuple[Any, Drawn]]  # (params, kv, rows)
    copy: Callable[..., Any]  # (kv, source_c, target_c, count)


def inert(rows: int, pages: int) -> Rows:
    """Rows of which none is live, of `pages` pages each, for the host to fill in."""
    zeros, ones = np.zeros(rows, np.int32), np.ones(rows, np.float32)
    return Rows(
        table_bp=np.zeros((rows, pages), np.int32),
        live_b=np.zeros(rows, bool),
        token_b=zeros.copy(),
        position_b=zeros.copy(),
        budget_b=zeros.copy(),
        stop_bj=np.full((rows, MAX_STOP_IDS), -1, np.int32),
        draw=Draw(0 * ones, ones.copy(), zeros.copy(), np.zeros(rows, np.uint32), zeros.copy()),
    )


def abstract_pool(
    config: ModelConfig, *, pages: int, page_tokens: int, attention: str, dtype: Any, mesh: Mesh, rules: Rules
) -> Any:
    """The pool that `attention` reads, as `jax.ShapeDtypeStruct`s: `pages` that can be given out, and the sink."""
    way = _way(config, attention)
    dims = sizes(config) | dict(p=config.num_layers * (pages + 1), s=page_tokens, k=way.heads * config.num_kv_heads)

    def array(letters: str) -> jax.ShapeDtypeStruct:
        where = NamedSharding(mesh, spec(letters, rules.activations))
        return jax.ShapeDtypeStruct(tuple(dims[letter] for letter in letters), dtype, sharding=where)

    return jax.tree.map(array, way.pool)


def build(
    config: ModelConfig,
    *,
    mesh: Mesh,
    rules: Rules,
    steps: int,
    attention: str = "blocks",
    compiler: Mapping[str, Any] | None = None,
) -> Programs:
    """The programs for one network on one mesh. `steps` = tokens drawn between two visits to the host; `attention`
    names a row of `ATTENTION`; `compiler`: options for XLA, which has to know all of them."""
    way = _way(config, attention)

    def run(params: Params, kv: Any, table_bp, token_bt, position_bt) -> tuple[jax.Array, Any]:
        attend = way.attend(table_bp, position_bt, kv, config.num_layers, rules)
        return forward(params, config, token_bt, position_bt, attend=attend, rules=rules, cache=kv)

    def extend(params: Params, kv: Any, table_bp, token_bt, position_bt) -> Any:
        return run(params, kv, table_bp, token_bt, position_bt)[1]

    def score(params: Params, kv: Any, table_bp, token_bt, position_bt, next_token_bt):
        x_btd, kv = run(params, kv, table_bp, token_bt, position_bt)

        def logp_of(row) -> jax.Array:  # row by row: a chunk of logits of a large vocabulary is all that fits
            x_td, next_token_t = row
            logits_tv = unembed(params, config, x_td[None])[0]
            return jnp.take_along_axis(jax.nn.log_softmax(logits_tv), next_token_t[:, None], axis=-1)[:, 0]

        return kv, jax.lax.map(logp_of, (x_btd, next_token_bt))

    def generate(params: Params, kv: Any, rows: Rows) -> tuple[Any, Drawn]:
        b = rows.live_b.shape[0]
        drawn = Drawn(jnp.zeros((steps, b), jnp.int32), jnp.zeros((steps, b), jnp.float32), jnp.zeros((steps, b), bool))

        def step(state: tuple[jax.Array, Any, Rows, Drawn]):
            i, kv, rows, drawn = state
            position_b1 = jnp.where(rows.live_b, rows.position_b, PADDING)[:, None]
            x_b1d, kv = run(params, kv, rows.table_bp, rows.token_b[:, None], position_b1)
            token_b, logp_b = draw(unembed(params, config, x_b1d)[:, 0], rows.draw)
            drawn = Drawn(
                *(all_ib.at[i].set(x_b) for all_ib, x_b in zip(drawn, (token_b, logp_b, rows.live_b), strict=True))
            )
            return i + 1, kv, _advance(rows, token_b), drawn

        def more(state: tuple[jax.Array, Any, Rows, Drawn]) -> jax.Array:
            i, _, rows, _ = state
            return (i < steps) & rows.live_b.any()

        _, kv, _, drawn = jax.lax.while_loop(more, step, (jnp.int32(0), kv, rows, drawn))
        return kv, drawn

    placed = jax.tree.map(lambda letters: NamedSharding(mesh, spec(letters, rules.activations)), way.pool)
    copy = functools.partial(cache.copy_pages, layers=config.num_layers)
    jit = functools.partial(jax.jit, donate_argnums=1, compiler_options=dict(compiler or {}))
    return Programs(
        extend=jit(extend, out_shardings=placed),
        score=jit(score, out_shardings=(placed, None)),
        generate=jit(generate, out_shardings=(placed, None)),
        copy=jax.jit(copy, donate_argnums=0, out_shardings=placed),
    )


def _way(config: ModelConfig, attention: str) -> Attention:
    """The row of `ATTENTION`, if this model can use it."""
    if attention not in ATTENTION:
        raise ConfigError(f"engine.attention: got {attention!r}, allowed are {', '.join(ATTENTION)}")
    if attention == "ragged" and config.head_dim % ragged.LANES:
        raise ConfigError(
            f"engine.attention: 'ragged' needs heads of a multiple of {ragged.LANES} channels, this model's have "
            f"{config.head_dim}. Use 'blocks'."
        )
    return ATTENTION[attention]


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
