"""One request to the engine: what is asked, what has been drawn so far, and who waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from dr_jax.engine.decode import MAX_STOP_IDS
from dr_jax.records import Finish, Sampled, Sampling

Tokens = Sequence[int] | np.ndarray
OnTokens = Callable[[Sequence[int], Sequence[float]], None]  # new tokens and their log-probabilities


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt to continue, or (without `sampling`) a prompt and a continuation to score from position `score_from`."""

    tokens: np.ndarray  # int32
    sampling: Sampling | None
    score_from: int
    budget: int  # tokens to be drawn at most
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Sampled]
    drawn: list[int] = dataclasses.field(default_factory=list)
    logps: list[float] = dataclasses.field(default_factory=list)
    on_tokens: OnTokens | None = None
    told: int = 0  # of the drawn tokens, those that `on_tokens` has heard of

    @property
    def known(self) -> np.ndarray:
        """All tokens so far: those given, and those drawn before the request was set back."""
        return np.concatenate([self.tokens, np.asarray(self.drawn, np.int32)])

    @property
    def reusable(self) -> int:
        """Leading positions whose keys and values may be the work of others: a score needs the logits of the rest."""
        return self.score_from if self.scoring else len(self.tokens) + len(self.drawn) - 1

    def reset(self) -> None:
        """Serving begins anew: what was drawn is kept, what was scored is not."""
        if self.scoring:
            self.logps.clear()

    @property
    def scoring(self) -> bool:
        return self.sampling is None

    @property
    def cancelled(self) -> bool:
        """Nobody waits any more. Reading a future's state is safe from any thread."""
        return self.future.cancelled()

    def tell(self) -> None:
        """Hands `on_tokens` what was drawn since the last time, on the caller's event loop. From any thread."""
        if self.on_tokens and len(self.drawn) > self.told:
            news = self.drawn[self.told :], self.logps[self.told :]
            self.told = len(self.drawn)
            with contextlib.suppress(RuntimeError):  # the caller's event loop is closed: nobody listens
                self.loop.call_soon_threadsafe(self.on_tokens, *news)

    def resolve(self, finish: Finish, version: int, detail: str = "") -> None:
        """Hands over what was drawn (for a score: the log-probabilities). From any thread."""
        drawn = self.tokens[self.score_from + 1 :] if self.scoring else np.asarray(self.drawn, np.int32)
        logps = np.asarray(self.logps, np.float32)
        result = Sampled(drawn[: len(logps)], logps, finish, version, detail)

        def set_result() -> None:
            if not self.future.done():
                self.future.set_result(result)

        with contextlib.suppress(RuntimeError):  # the caller's event loop is closed: nobody waits
            self.loop.call_soon_threadsafe(set_result)


def as_tokens(tokens: Tokens, vocab_size: int, name: str) -> tuple[np.ndarray, str]:
    """(int32 array, what is wrong with it or '')."""
    array = np.asarray(tokens)
    if array.ndim != 1 or array.size == 0:
        return np.zeros(0, np.int32), f"{name}: empty, or not a flat list of token ids"
    if array.dtype.kind not in "iu":
        return np.zeros(0, np.int32), f"{name}: token ids must be integers, got {array.dtype}"
    if array.min() < 0 or array.max() >= vocab_size:
        wrong = array[(array < 0) | (array >= vocab_size)][0]
        return np.zeros(0, np.int32), f"{name}: token id {wrong} is not in the vocabulary of {vocab_size}"
    return array.astype(np.int32), ""


def complaint(sampling: Sampling, *, vocab_size: int, can_decode: bool) -> str:
    """What is wrong with `sampling`, or ''."""
    warm = sampling.temperature == 0 or 1e-3 <= sampling.temperature < math.inf  # below, f32 logits would overflow
    unknown = [i for i in sampling.stop_ids if not 0 <= i < vocab_size]
    checks = {
        f"max_new_tokens: got {sampling.max_new_tokens}, must be at least 1": sampling.max_new_tokens < 1,
        f"temperature: got {sampling.temperature}, must be 0 (greedy) or at least 0.001": not warm,
        f"top_p: got {sampling.top_p}, must be in (0, 1]": not 0 < sampling.top_p <= 1,
        f"top_k: got {sampling.top_k}, must be 0 (all) or more, and less than 2**31": not 0 <= sampling.top_k < 2**31,
        f"stop_ids: {unknown} are not in the vocabulary of {vocab_size}": bool(unknown),
        f"stop_ids: got {len(sampling.stop_ids)}, at most {MAX_STOP_IDS}": len(sampling.stop_ids) > MAX_STOP_IDS,
        "stop_strings: this engine was made without decode_text": bool(sampling.stop_strings) and not can_decode,
        "stop_strings: an empty string stops everything": "" in sampling.stop_strings,
    }
    return next((text for text, wrong in checks.items() if wrong), "")


def stop_string_end(
    drawn: Sequence[int], new: int, stops: Sequence[str], decode: Callable[[Sequence[int]], str]
) -> int:
    """Number of drawn tokens up to the one that completes a stop string, looking at the last `new`; 0 = none does.

    Decodes a window: a stop string of n bytes ends within n tokens, and 4 more complete a character cut at the
    window's edge.
    """
    widest = max(len(stop.encode()) for stop in stops) + 4

    def found(end: int) -> bool:
        text = decode(drawn[max(0, end - widest) : end])
        return any(stop in text for stop in stops)

    text = decode(drawn[max(0, len(drawn) - new - widest) :])
    if not any(stop in text for stop in stops):
        return 0
    return next((end for end in range(len(drawn) - new + 1, len(drawn) + 1) if found(end)), 0)
