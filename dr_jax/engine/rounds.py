"""What the device thread does with the requests it holds, one round after another. No thread and no clock in here.

A round either prefills a batch of prompt tokens that lack keys and values, or draws some tokens for every row at once.
Prompts go first, because a decode step costs nearly the same however many rows take part; but after `_BURST` rounds of
them in a row whoever can draw draws, so a long prompt stalls nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListOf
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dr_jax.engine import cache as kv
from dr_jax.engine import decode
from dr_jax.engine.pages import Pages
from dr_jax.engine.request import Request, stop_string_end
from dr_jax.engine.sequences import Copy, Sequence, Sequences
from dr_jax.errors import ConfigError
from dr_jax.model import joined
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules
from dr_jax.model.weights import Params, shape, shardings, tree
from dr_jax.records import Finish

DecodeText = Callable[[ListOf[int]], str]

_BURST = 4  # rounds of prefill in a row while somebody could draw
_DEVICE_ERRORS = 3  # in a row; more, and the device is taken for broken
_NARROWEST = 64  # rows; a CPU's matrix products of fewer rows sum in another order, and a token could change


class Rounds:
    """The requests being served, the weights, and the pages."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        mesh: Mesh,
        rules: Rules,
        slots: int,
        context: int,
        pages: int,
        page_tokens: int,
        prefill_rows: int,
        prefill_chunk: int,
        decode_steps: int,
        attention: str,
        compiler: Mapping[str, Any] | None,
        decode_text: DecodeText | None,
    ):
        self._where = shardings(config, mesh, rules)
        self._shapes = tree(config, lambda row: shape(row, config))
        self._dtype = jax.tree.leaves(params)[0].dtype
        self._join = joined.program(mesh, rules)
        self._params = self.placed(params)
        self.version = 0
        self._programs = decode.build(
            config, mesh=mesh, rules=rules, steps=decode_steps, attention=attention, compiler=compiler
        )
        self._pool = decode.abstract_pool(
            config, pages=pages, page_tokens=page_tokens, attention=attention, dtype=self._dtype, mesh=mesh, rules=rules
        )
        self._kv = kv.make(self._pool)
        self.sequences = Sequences(Pages(pages, page_tokens), context)
        self._slots, self._steps = slots, decode_steps
        self._prefill_widths = prefill_widths(prefill_rows)
        self._decode_widths = decode_widths(slots)
        self._chunk, self._decode_text = prefill_chunk, decode_text
        self._prefilled_in_a_row = 0
        self._crowded = False  # somebody was set back for want of pages; nobody comes in until somebody has left
        self._errors_in_a_row = 0
        self._taking_part: list[Request] = []  # in the program that was called last
        self.serving: dict[Request, Sequence] = {}  # in the order they came in
        self.set_back: list[Request] = []  # to be served again, before all others
        self.counts = dict.fromkeys(("rounds", "tokens_drawn", "tokens_prefilled", "set_back", "device_errors"), 0)

    def warm_up(self) -> None:
        """Compiles every program in each of its shapes, by running it on nothing."""
        for width in self._prefill_widths:
            self._kv = self._programs.extend(self._params, self._kv, *self._padding(width))
        table_bp, token_bt, position_bt = self._padding(1)
        self._kv, _ = self._programs.score(self._params, self._kv, table_bp, token_bt, position_bt, token_bt)
        for width in self._decode_widths:
            self._kv, _ = self._programs.generate(self._params, self._kv, decode.inert(width, self.sequences.width))
        none = np.zeros(kv.COPIES, np.int32)
        self._kv = jax.block_until_ready(self._programs.copy(self._kv, none, none, np.int32(0)))

    def admit(self, request: Request) -> bool:
        """Serves `request` from now on, if there is a row and there are pages for it."""
        if len(self.serving) == self._slots or (self._crowded and self.serving):
            return False
        sequence = self.sequences.open(request.known, reusable=request.reusable)
        if sequence is None:
            return False
        self._crowded = False
        self.serving[request] = sequence
        return True

    def set_weights(self, params: Params, version: int) -> None:
        """Serves with `params`, as `placed` gave them, from now on; forgets the old ones' pages."""
        self._params, self.version = params, version
        self.sequences.forget()

    def placed(self, params: Params) -> Params:
        """A copy in the engine's dtype and layout: the learner may donate its own at once. From any thread."""
        if jax.tree.map(np.shape, params) != self._shapes:
            raise ConfigError("engine: these weights have other names or shapes than the model this engine serves")
        copies = jax.tree.map(
            lambda x, to: jax.device_put(x.astype(self._dtype), to, may_alias=False), params, self._where
        )
        copies["blocks"]["attn"] = self._join(copies["blocks"]["attn"])
        return jax.block_until_ready(copies)

    def drop_cancelled(self) -> None:
        """Lets go of requests for which nobody waits any more."""
        for request in [request for request in self.serving if request.cancelled]:
            self._leave(request)

    def run(self) -> None:
        """One round. Finished requests are resolved and leave."""
        lacking = [request for request, sequence in self.serving.items() if sequence.lacking]
        drawing = [request for request, sequence in self.serving.items() if not sequence.lacking]
        if lacking and not (drawing and self._prefilled_in_a_row >= _BURST):
            self._prefilled_in_a_row += 1
            self._prefill(lacking)
        elif drawing:
            self._prefilled_in_a_row = 0
            self._decode(drawing)
        self.counts["rounds"] += 1

    def recover(self, error: Exception) -> None:
        """After a device error: a new pool, as the old one may be lost. Whoever took part in the program in which it
        showed is told so; all others are served again, with the same result. Raises `error` where nothing has been
        computed since the last few of them."""
        self.counts["device_errors"] += 1
        self._errors_in_a_row += 1
        if self._errors_in_a_row > _DEVICE_ERRORS:
            raise error
        self._kv = None
        for request in self._taking_part:
            if request in self.serving:
                self._fail(request, f"engine: device error: {error}")
        for request in reversed(list(self.serving)):
            self._set_back(request)
        self.sequences.forget()
        self._kv = kv.make(self._pool)

    def _prefill(self, lacking: ListOf[Request]) -> None:
        ready, copies = [], []
        for request in lacking:
            can_start, copy = self.sequences.settle(self.serving[request])
            if can_start and self.serving[request].lacking:
                ready.append(request)
            if copy:
                copies.append((request, copy))
        self._copy(copies)
        to_score = [request for request in ready if self.serving[request].filled >= request.reusable]
        to_extend = [request for request in ready if request not in to_score]
        if to_extend:
            self._extend(to_extend)
        elif to_score:
            self._score(to_score[0])

    def _copy(self, copies: ListOf[tuple[Request, Copy]]) -> None:
        for start in range(0, len(copies), kv.COPIES):
            part = copies[start : start + kv.COPIES]
            source_c, target_c = np.zeros(kv.COPIES, np.int32), np.zeros(kv.COPIES, np.int32)
            source_c[: len(part)] = [copy.source for _, copy in part]
            target_c[: len(part)] = [copy.target for _, copy in part]
            self._taking_part = [request for request, _ in part]
            self._kv = self._programs.copy(self._kv, source_c, target_c, np.int32(len(part)))

    def _extend(self, ready: ListOf[Request]) -> None:
        """A batch of chunks: as many of each prompt as it lacks, the first prompts first. A batch that would be less
        than half full is a narrower one, and another round."""
        parts: list[tuple[Request, int]] = []
        for request in ready:
            lacks = request.reusable - self.serving[request].filled
            parts += [(request, min(self._chunk, lacks - at)) for at in range(0, lacks, self._chunk)]
        most = self._prefill_widths[-1]
        width = next(width for width in self._prefill_widths if 2 * width >= min(len(parts), most))
        parts = parts[:width]
        table_bp, token_bt, position_bt = self._padding(width)
        self._taking_part = [request for request, _ in parts]
        for row, (request, count) in enumerate(parts):
            self._fill_row(request, count, table_bp[row], token_bt[row], position_bt[row])
        self._kv = self._programs.extend(self._params, self._kv, table_bp, token_bt, position_bt)

    def _score(self, request: Request) -> None:
        sequence = self.serving[request]
        table_bp, token_bt, position_bt = self._padding(1)
        next_token_bt = token_bt.copy()
        start, count = sequence.filled, min(self._chunk, sequence.goal - sequence.filled)
        next_token_bt[0, :count] = sequence.tokens[start + 1 : start + 1 + count]
        self._taking_part = [request]
        self._fill_row(request, count, table_bp[0], token_bt[0], position_bt[0])
        self._kv, logp_bt = self._programs.score(self._params, self._kv, table_bp, token_bt, position_bt, next_token_bt)
        request.logps.extend(np.asarray(logp_bt)[0, :count].tolist())
        self._errors_in_a_row = 0
        if not np.isfinite(request.logps).all():
            self._fail_non_finite(request)
        elif not sequence.lacking:
            self._finish(request, Finish.STOP)

    def _padding(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of `extend` with nothing in them."""
        token_bt = np.zeros((rows, self._chunk), np.int32)
        return np.zeros((rows, self.sequences.width), np.int32), token_bt, np.full_like(token_bt, kv.PADDING)

    def _fill_row(self, request: Request, count: int, table_p, token_t, position_t) -> None:
        """Puts the next `count` tokens that the request lacks into a row, and counts them as filled."""
        sequence = self.serving[request]
        table_p[:] = self.sequences.row(sequence)
        token_t[:count] = sequence.tokens[sequence.filled : sequence.filled + count]
        position_t[:count] = np.arange(sequence.filled, sequence.filled + count)
        self.sequences.fill(sequence, count)
        self.counts["tokens_prefilled"] += count

    def _decode(self, drawing: ListOf[Request]) -> None:
        drawing = self._with_pages(drawing)
        width = next(width for width in self._decode_widths if width >= len(drawing))
        rows = decode.inert(width, self.sequences.width)
        for row, request in enumerate(drawing):
            sequence, sampling, how = self.serving[request], request.sampling, rows.draw
            rows.table_bp[row] = self.sequences.row(sequence)
            rows.live_b[row], rows.budget_b[row] = True, request.budget
            rows.token_b[row], rows.position_b[row] = sequence.tokens[-1], sequence.length - 1
            rows.stop_bj[row, : len(sampling.stop_ids)] = sampling.stop_ids
            how.temperature_b[row], how.top_p_b[row], how.top_k_b[row] = (
                sampling.temperature, sampling.top_p, sampling.top_k,
            )  # fmt: skip
            how.seed_b[row], how.index_b[row] = sampling.seed % 2**32, len(request.drawn)
        self._taking_part = drawing
        self._kv, drawn = self._programs.generate(self._params, self._kv, rows)
        token_ib, logp_ib, live_ib = jax.device_get(drawn)
        self._errors_in_a_row = 0
        for row, request in enumerate(drawing):
            count = int(live_ib[:, row].sum())
            self._note(request, token_ib[:count, row].tolist(), logp_ib[:count, row].tolist())

    def _with_pages(self, drawing: ListOf[Request]) -> list[Request]:
        """Those of `drawing` that have pages for what they may draw next. Where pages are short, who came last is set
        back; the first always has enough."""
        for request in drawing:
            while request in self.serving:
                left = min(self._steps, request.budget - len(request.drawn))
                if self.sequences.reserve(self.serving[request], self.serving[request].length + left - 1):
                    break
                self._crowded = True
                self._set_back(next(reversed(self.serving)))
        return [request for request in drawing if request in self.serving]

    def _set_back(self, request: Request) -> None:
        self._leave(request)
        self.set_back.insert(0, request)
        request.reset()
        self.counts["set_back"] += 1

    def _note(self, request: Request, tokens: list[int], logps: list[float]) -> None:
        """Takes in what was drawn for one request, up to where it ends."""
        sampling = request.sampling
        request.drawn += tokens
        request.logps += logps
        self.counts["tokens_drawn"] += len(tokens)
        if not np.isfinite(logps).all():
            return self._fail_non_finite(request)
        end = 0
        if sampling.stop_strings:
            end = stop_string_end(request.drawn, len(tokens), sampling.stop_strings, self._decode_text)
        if end:
            tokens = tokens[: end - len(request.drawn) or None]
            del request.drawn[end:], request.logps[end:]
        self.sequences.append(self.serving[request], np.asarray(tokens, np.int32))
        if end or request.drawn[-1] in sampling.stop_ids:
            self._finish(request, Finish.STOP)
        elif len(request.drawn) == request.budget:
            self._finish(request, Finish.LENGTH)

    def _fail_non_finite(self, request: Request) -> None:
        self.sequences.spoil(self.serving[request])
        self._fail(request, "engine: the network gave logits that are not finite")

    def _fail(self, request: Request, detail: str) -> None:
        request.drawn.clear()
        request.logps.clear()
        self._finish(request, Finish.ERROR, detail)

    def _finish(self, request: Request, finish: Finish, detail: str = "") -> None:
        self._leave(request)
        self._crowded = False
        request.resolve(finish, self.version, detail)

    def _leave(self, request: Request) -> None:
        self.sequences.close(self.serving.pop(request))


def prefill_widths(rows: int) -> tuple[int, ...]:
    """Rows of an `extend`, narrowest first: all of them, a quarter, and so on."""
    widths = [rows]
    while widths[-1] >= 4:
        widths.append(widths[-1] // 4)
    return tuple(reversed(widths))


def decode_widths(slots: int) -> tuple[int, ...]:
    """Rows of a `generate`, narrowest first: all slots, and halves of them for when few requests are left."""
    widths = [slots]
    while widths[-1] % 2 == 0 and widths[-1] // 2 >= _NARROWEST:
        widths.append(widths[-1] // 2)
    return tuple(reversed(widths))
