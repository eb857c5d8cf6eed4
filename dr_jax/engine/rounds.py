"""What the device thread does with the requests it holds, one round after another. No thread and no clock in here.

A round either prefills chunks of prompts that lack keys and values, or draws some tokens for every slot at once.
Prompts go first, because a decode step costs nearly the same however many slots take part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dr_jax.engine import cache as kv
from dr_jax.engine import decode
from dr_jax.engine.request import Request, stop_string_end
from dr_jax.engine.slots import Copy, Prefix, Slots
from dr_jax.errors import ConfigError
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, spec
from dr_jax.model.weights import Params, shape, shardings, tree
from dr_jax.records import Finish

DecodeText = Callable[[Sequence[int]], str]


class Rounds:
    """The requests in slots, the weights, and the cache."""

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        mesh: Mesh,
        rules: Rules,
        slots: int,
        context: int,
        prefill_rows: int,
        prefill_chunk: int,
        decode_steps: int,
        decode_text: DecodeText | None,
    ):
        self._where = shardings(config, mesh, rules)
        self._shapes = tree(config, lambda row: shape(row, config))
        self._dtype = jax.tree.leaves(params)[0].dtype
        self._params = self._placed(params)
        self.version = 0
        self._programs = decode.build(config, mesh=mesh, rules=rules, steps=decode_steps)
        sharding = NamedSharding(mesh, spec("lbksh", rules.activations))
        self._cache = kv.make(config, slots=slots, context=context, dtype=self._dtype, sharding=sharding)
        self._widths = (1, min(prefill_rows, slots))  # rows of an `extend`: one prompt alone, or several
        self._chunk, self._decode_text = prefill_chunk, decode_text
        self._slots = Slots(slots, context)
        self._new: set[int] = set()  # slots for which no prefix has been looked for yet
        self.serving: dict[int, Request] = {}  # by slot
        self.counts = dict.fromkeys(("rounds", "tokens_drawn", "tokens_prefilled", "tokens_kept", "tokens_copied"), 0)

    def warm_up(self) -> None:
        """Compiles every program, by running it on nothing."""
        for width in sorted(set(self._widths)):
            self._cache = self._programs.extend(self._params, self._cache, *self._padding(width))
        slot_b, token_bt, position_bt = self._padding(1)
        self._cache, _ = self._programs.score(self._params, self._cache, slot_b, token_bt, position_bt, token_bt)
        self._cache, _ = self._programs.generate(self._params, self._cache, decode.inert(len(self._slots.busy_b)))
        self._cache = jax.block_until_ready(self._programs.copy(self._cache, *np.zeros(3, np.int32)))

    @property
    def has_room(self) -> bool:
        return not self._slots.busy_b.all()

    def admit(self, request: Request) -> None:
        """Gives `request` a slot. Needs room."""
        slot = self._slots.take(request.tokens, reusable=request.score_from)
        self.serving[slot] = request
        self._new.add(slot)
        self.counts["tokens_kept"] += int(self._slots.filled_b[slot])

    def set_weights(self, params: Params, version: int) -> None:
        """Serves with a copy of `params` from now on; what was kept of finished sequences is forgotten."""
        self._params = jax.block_until_ready(self._placed(params))
        self.version = version
        self._slots.forget()

    def _placed(self, params: Params) -> Params:
        """A copy in the engine's dtype and layout: the learner may donate its own at once."""
        if jax.tree.map(np.shape, params) != self._shapes:
            raise ConfigError("engine: these weights have other names or shapes than the model this engine serves")
        return jax.tree.map(
            lambda x, to: jax.device_put(x.astype(self._dtype), to, may_alias=False), params, self._where
        )

    def drop_cancelled(self) -> None:
        """Frees the slots of requests for which nobody waits any more."""
        for slot in [slot for slot, request in self.serving.items() if request.cancelled]:
            self._leave(slot)

    def run(self) -> None:
        """One round. Finished requests are resolved and leave their slots."""
        lacking = self._slots.lacking()
        if len(lacking):
            self._prefill(lacking)
        elif self.serving:
            self._decode()
        self.counts["rounds"] += 1

    def _prefill(self, lacking: Sequence[int]) -> None:
        ready = [slot for slot in lacking if self._prefix_settled(slot)]
        to_score = [slot for slot in ready if self._slots.filled_b[slot] >= self.serving[slot].score_from]
        to_extend = [slot for slot in ready if slot not in to_score][: self._widths[1]]
        if to_extend:
            self._extend(to_extend)
        elif to_score:
            self._score(to_score[0])

    def _prefix_settled(self, slot: int) -> bool:
        """True once `slot` need not wait for another one's prefix; copies it where that is worth it."""
        if slot not in self._new:
            return True
        match self._slots.prefix(slot):
            case Prefix.WAIT:
                return False
            case Copy(source, length):
                self._cache = self._programs.copy(self._cache, np.int32(source), np.int32(slot), np.int32(length))
                self.counts["tokens_copied"] += length - int(self._slots.filled_b[slot])
                self._slots.filled_b[slot] = length
        self._new.discard(slot)
        return bool(self._slots.filled_b[slot] < self._slots.goal_b[slot])

    def _extend(self, slots: Sequence[int]) -> None:
        slot_b, token_bt, position_bt = self._padding(self._widths[len(slots) > 1])
        for row, slot in enumerate(slots):
            slot_b[row] = slot
            self._fill_row(slot, token_bt[row], position_bt[row], end=self.serving[slot].score_from)
        self._cache = self._programs.extend(self._params, self._cache, slot_b, token_bt, position_bt)

    def _score(self, slot: int) -> None:
        request = self.serving[slot]
        slot_b, token_bt, position_bt = self._padding(1)
        next_token_bt = token_bt.copy()
        slot_b[0], start = slot, self._slots.filled_b[slot]
        count = self._fill_row(slot, token_bt[0], position_bt[0], end=request.goal)
        next_token_bt[0, :count] = request.tokens[start + 1 : start + 1 + count]
        self._cache, logp_bt = self._programs.score(
            self._params, self._cache, slot_b, token_bt, position_bt, next_token_bt
        )
        request.logps.extend(np.asarray(logp_bt)[0, :count].tolist())
        if not np.isfinite(request.logps).all():
            self._fail_non_finite(slot)
        elif self._slots.filled_b[slot] == request.goal:
            self._finish(slot, Finish.STOP)

    def _padding(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Arguments of `extend` with nothing in them: padding sits one past the end of a slot."""
        token_bt = np.zeros((rows, self._chunk), np.int32)
        return np.zeros(rows, np.int32), token_bt, np.full_like(token_bt, self._cache.positions)

    def _fill_row(self, slot: int, token_t: np.ndarray, position_t: np.ndarray, *, end: int) -> int:
        """Number of tokens put into the row, from where the slot is filled to `end` at most; counts them as filled."""
        start = int(self._slots.filled_b[slot])
        count = min(self._chunk, end - start)
        token_t[:count] = self.serving[slot].tokens[start : start + count]
        position_t[:count] = np.arange(start, start + count)
        self._slots.filled_b[slot] += count
        self.counts["tokens_prefilled"] += count
        return count

    def _decode(self) -> None:
        rows = decode.inert(len(self._slots.busy_b))
        last_b = np.maximum(self._slots.length_b - 1, 0)
        rows = rows._replace(position_b=last_b, token_b=self._slots.token_bs[np.arange(len(last_b)), last_b])
        for slot, request in self.serving.items():
            sampling, how = request.sampling, rows.draw
            rows.live_b[slot], rows.budget_b[slot] = True, request.budget
            rows.stop_bj[slot, : len(sampling.stop_ids)] = sampling.stop_ids
            how.temperature_b[slot], how.top_p_b[slot], how.top_k_b[slot] = (
                sampling.temperature, sampling.top_p, sampling.top_k,
            )  # fmt: skip
            how.seed_b[slot], how.index_b[slot] = sampling.seed % 2**32, len(request.drawn)
        self._cache, drawn = self._programs.generate(self._params, self._cache, rows)
        token_ib, logp_ib, live_ib = jax.device_get(drawn)
        for slot in list(self.serving):
            count = int(live_ib[:, slot].sum())
            self._note(slot, token_ib[:count, slot].tolist(), logp_ib[:count, slot].tolist())

    def _note(self, slot: int, tokens: list[int], logps: list[float]) -> None:
        """Takes in what was drawn for one slot, up to where it ends."""
        request = self.serving[slot]
        sampling = request.sampling
        request.drawn += tokens
        request.logps += logps
        self.counts["tokens_drawn"] += len(tokens)
        if not np.isfinite(logps).all():
            return self._fail_non_finite(slot)
        end = 0
        if sampling.stop_strings:
            end = stop_string_end(request.drawn, len(tokens), sampling.stop_strings, self._decode_text)
        if end:
            tokens = tokens[: end - len(request.drawn) or None]
            del request.drawn[end:], request.logps[end:]
        self._slots.append(slot, np.asarray(tokens, np.int32))
        if end or request.drawn[-1] in sampling.stop_ids:
            self._finish(slot, Finish.STOP)
        elif len(request.drawn) == request.budget:
            self._finish(slot, Finish.LENGTH)

    def _fail_non_finite(self, slot: int) -> None:
        self._slots.spoil(slot)
        request = self.serving[slot]
        request.drawn.clear()
        request.logps.clear()
        self._finish(slot, Finish.ERROR, "engine: the network gave logits that are not finite")

    def _finish(self, slot: int, finish: Finish, detail: str = "") -> None:
        self._leave(slot).resolve(finish, self.version, detail)

    def _leave(self, slot: int) -> Request:
        self._new.discard(slot)
        self._slots.give_back(slot)
        return self.serving.pop(slot)
