"""The engine: an asyncio face over one device thread that serves all requests together.

Programs run on the device thread alone (`rounds.py`). Requests wait, the lowest priority first and of equals who came
first, until a row and pages are free; whoever finishes leaves its row at once. An episode that waits for the web holds
no row, and finds its keys and values again as long as nobody needed their place (`pages.py`). Results depend neither on
the company a request has nor on what was reused, evicted or computed again.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import queue
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dr_jax.engine.cache import PAGE, enough
from dr_jax.engine.request import OnTokens, Request, Tokens, as_tokens, complaint
from dr_jax.engine.rounds import DecodeText, Rounds
from dr_jax.errors import ConfigError, DrJaxError
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import Rules, axes_of, check_mesh
from dr_jax.model.weights import Params
from dr_jax.records import Finish, Sampled, Sampling

_LOG = logging.getLogger(__name__)


class _Weights(NamedTuple):
    """A hand-over of weights, as it travels to the device thread."""

    params: Params
    version: int
    done: Future[None]


class Engine:
    """Serves `generate` and `score` (`interfaces.Sampler`) from one set of weights on a host-local mesh.

    Owns the device thread and the cache; `close` (or leaving `async with`) ends both. Compiles its programs when it
    starts, and never again. `slots` sequences draw at once; their keys and values, and those kept for later, are in
    `pages` pages of `page_tokens` tokens (0 = as many as `slots` sequences of the whole context need). `decode_text`
    turns token ids into text; only stop strings need it.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        mesh: Mesh,
        rules: Rules,
        slots: int,
        context: int,
        pages: int = 0,
        page_tokens: int = PAGE,
        prefill_rows: int = 4,
        prefill_chunk: int = 64,
        decode_steps: int = 8,
        attention: str = "blocks",
        compiler: Mapping[str, Any] | None = None,
        max_waiting: int = 65_536,
        decode_text: DecodeText | None = None,
    ):
        pages = pages or enough(slots, context, max(page_tokens, 1))
        sizes = dict(
            slots=slots, context=context, pages=pages, page_tokens=page_tokens, prefill_rows=prefill_rows,
            prefill_chunk=prefill_chunk, decode_steps=decode_steps,
        )  # fmt: skip
        _check(config, mesh, rules, sizes | dict(max_waiting=max_waiting))
        self._vocab_size, self._context, self._max_waiting = config.vocab_size, context, max_waiting
        self._can_decode = decode_text is not None
        self._mesh = mesh
        with jax.set_mesh(mesh):
            self._rounds = Rounds(
                config, params, mesh=mesh, rules=rules, attention=attention, compiler=compiler, decode_text=decode_text,
                **sizes,
            )  # fmt: skip
        self._waiting: list[tuple[int, int, Request]] = []  # a heap: priority, arrival
        self._arrivals = itertools.count()
        self._inbox: queue.SimpleQueue[Request | _Weights | None] = queue.SimpleQueue()
        self._busy_s = 0.0
        self._admission = threading.Lock()  # nothing enters the inbox once `_closed` says why
        self._closed = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, prompt: Tokens, sampling: Sampling, *, on_tokens: OnTokens | None = None) -> Sampled:
        """A continuation of `prompt`. Never raises for a bad request or a broken engine: `Finish.ERROR` with a detail.

        `on_tokens` hears of tokens as they are drawn, on this event loop; the last of them come with the result only.
        Ends with `Finish.LENGTH` where prompt and output fill the context. `version` is that of the weights that drew
        the last token: a request in flight goes on under new weights. Seeds count modulo 2**32.
        """
        tokens, wrong = as_tokens(prompt, self._vocab_size, "prompt")
        wrong = wrong or complaint(sampling, vocab_size=self._vocab_size, can_decode=self._can_decode)
        if len(tokens) >= self._context:
            wrong = wrong or f"prompt: {len(tokens)} tokens leave no room in the context of {self._context}"
        budget = min(sampling.max_new_tokens, self._context - len(tokens))
        return await self._submit(
            tokens, sampling, score_from=len(tokens) - 1, budget=budget, wrong=wrong, on_tokens=on_tokens
        )

    async def score(self, prompt: Tokens, continuation: Tokens) -> np.ndarray:
        """Log-probability (f32, nats) of each continuation token given all before it, at temperature 1.

        Raises `ConfigError` for tokens that cannot be scored, `DrJaxError` if the engine is closed or broke.
        """
        head, wrong = as_tokens(prompt, self._vocab_size, "prompt")
        tail, also_wrong = as_tokens(continuation, self._vocab_size, "continuation")
        if len(head) + len(tail) > self._context:
            wrong = wrong or f"score: {len(head)} + {len(tail)} tokens exceed the context of {self._context}"
        if wrong or also_wrong:
            raise ConfigError(wrong or also_wrong)
        scored = await self._submit(np.concatenate([head, tail]), None, score_from=len(head) - 1, budget=0, wrong="")
        if scored.finish is Finish.ERROR:
            raise DrJaxError(scored.detail)
        return scored.logps

    async def _submit(
        self,
        tokens: np.ndarray,
        sampling: Sampling | None,
        *,
        score_from: int,
        budget: int,
        wrong: str,
        on_tokens: OnTokens | None = None,
    ) -> Sampled:
        loop = asyncio.get_running_loop()
        request = Request(tokens, sampling, score_from, budget, loop, loop.create_future(), on_tokens=on_tokens)
        with self._admission:
            wrong = wrong or self._closed
            if not wrong and self._inbox.qsize() + len(self._waiting) >= self._max_waiting:
                wrong = f"engine: {self._max_waiting} requests are waiting already (max_waiting)"
            if not wrong:
                self._inbox.put(request)
        if wrong:
            request.resolve(Finish.ERROR, self._rounds.version, wrong)
        return await request.future

    def set_weights(self, params: Params, version: int) -> None:
        """Returns once the engine holds its own copy of `params`, resharded on device; later samples carry `version`.

        The copy is made in the calling thread while samples are drawn, which takes memory for both; it takes effect
        between two rounds. Sequences in flight go on with the keys and values they have; what is kept for later
        sequences is forgotten, so that none begins with what older weights made. Blocks for a round, so call it outside
        the event loop; every leaf must be addressable here. Raises `ConfigError` for weights of another model.
        """
        if self._closed:
            raise DrJaxError(self._closed)
        with jax.set_mesh(self._mesh):  # as at the start, or the same program would be compiled again
            params, done = self._rounds.placed(params), Future()
        with self._admission:
            if self._closed:
                raise DrJaxError(self._closed)
            self._inbox.put(_Weights(params, version, done))
        done.result()

    def stats(self) -> dict[str, float]:
        """Counts since the start (tokens drawn, prefilled, found in pages, copied with a page; requests set back for
        want of pages; busy seconds), and the load now. `pages_idle` hold something and belong to nobody."""
        sequences = self._rounds.sequences
        return {
            **self._rounds.counts,
            "tokens_kept": sequences.tokens_kept,
            "tokens_copied": sequences.tokens_copied,
            "pages_available": sequences.pages.available,
            "pages_idle": sequences.pages.idle,
            "busy_s": self._busy_s,
            "serving": len(self._rounds.serving),
            "waiting": len(self._waiting) + len(self._rounds.set_back),
            "version": self._rounds.version,
        }

    @property
    def closed(self) -> str:
        """Why it serves nobody any more; '' while it does."""
        return self._closed

    def close(self) -> None:
        """Ends the device thread. Whoever still waits gets `Finish.ERROR`."""
        self._inbox.put(None)
        self._thread.join()

    async def __aenter__(self) -> Engine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    def _run(self) -> None:
        reason = "engine: closed"
        try:
            with jax.set_mesh(self._mesh):
                self._rounds.warm_up()
                self._serve()
        # The border: whatever breaks here (a device error, a bug) must reach those who wait, or they would wait
        # forever.
        except Exception as error:  # noqa: BLE001
            _LOG.exception("the engine's device thread broke")
            reason = f"engine: {type(error).__name__}: {error}"
        with self._admission:
            self._closed = reason
        self._abandon(reason)

    def _serve(self) -> None:
        while self._take_in():
            started_s = time.monotonic()
            self._rounds.drop_cancelled()
            self._admit()
            try:
                self._rounds.run()
            except jax.errors.JaxRuntimeError as error:
                self._rounds.recover(error)
                _LOG.warning("a device error ended the requests that it met: %s", error)
            for request in self._rounds.serving:
                request.tell()
            self._busy_s += time.monotonic() - started_s

    def _admit(self) -> None:
        """Serves whoever there is room for: those that were set back, then by priority, then by arrival."""
        first, then = self._rounds.set_back, self._waiting
        while first or then:
            request = first[0] if first else then[0][-1]
            if not request.cancelled and not self._rounds.admit(request):
                break
            first.pop(0) if first else heapq.heappop(then)

    def _take_in(self) -> bool:
        """False once the engine is to close. Sleeps while there is nothing to do."""
        while not self._inbox.empty() or not (self._rounds.serving or self._rounds.set_back or self._waiting):
            match self._inbox.get():
                case None:
                    return False
                case _Weights() as weights:
                    self._rounds.set_weights(weights.params, weights.version)
                    weights.done.set_result(None)
                case request:
                    priority = request.sampling.priority if request.sampling else 0
                    heapq.heappush(self._waiting, (priority, next(self._arrivals), request))
        return True

    def _abandon(self, reason: str) -> None:
        left = [*self._rounds.serving, *self._rounds.set_back, *(request for *_, request in self._waiting)]
        self._rounds.serving.clear()
        self._waiting.clear()
        while not self._inbox.empty():
            match self._inbox.get():
                case _Weights(done=done):
                    done.set_exception(DrJaxError(reason))
                case Request() as request:
                    left.append(request)
        for request in left:
            request.resolve(Finish.ERROR, self._rounds.version, reason)


def _check(config: ModelConfig, mesh: Mesh, rules: Rules, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"engine.{name}: got {size}, must be at least 1")
    if sizes["context"] > config.max_positions:
        raise ConfigError(f"engine.context: got {sizes['context']}, this model goes up to {config.max_positions}")
    longest = -(-sizes["context"] // sizes["page_tokens"])
    if sizes["pages"] < longest:
        raise ConfigError(
            f"engine.pages: got {sizes['pages']}; one sequence of the whole context ({sizes['context']} tokens) needs "
            f"{longest} of {sizes['page_tokens']} tokens. Raise it, or lower engine.context."
        )
    check_mesh(config, mesh.shape, rules)
    spread = [axis for axis in axes_of(rules.activations["b"]) if mesh.shape[axis] > 1]
    if spread:
        raise ConfigError(
            f"engine mesh: slots do not spread over devices, but mesh axis {spread[0]} (letter b) has size "
            f"{mesh.shape[spread[0]]}. Give the engine a mesh in which only 'tensor' is above 1."
        )
