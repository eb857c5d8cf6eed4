"""The seams between rooms: what a room needs from another, as structural types. No room imports another's class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from dr_jax.records import Failure, Hit, Page, Sampled, Sampling


class Sampler(Protocol):
    """Tokens in, tokens and log-probabilities out. Safe to call from one event loop, thousands of calls at once."""

    async def generate(self, prompt: Sequence[int] | np.ndarray, sampling: Sampling) -> Sampled:
        """Draws a continuation of `prompt`. Never raises for a bad request: `Finish.ERROR` with a detail."""
        ...

    async def score(self, prompt: Sequence[int] | np.ndarray, continuation: Sequence[int] | np.ndarray) -> np.ndarray:
        """Log-probability (float32, nats) of each continuation token given all before it, at temperature 1."""
        ...


class StreamingSampler(Sampler, Protocol):
    """A `Sampler` that can be watched while it draws."""

    @property
    def closed(self) -> str:
        """Why it serves nobody any more; '' while it does."""
        ...

    async def generate(
        self,
        prompt: Sequence[int] | np.ndarray,
        sampling: Sampling,
        *,
        on_tokens: Callable[[Sequence[int], Sequence[float]], None] | None = None,
    ) -> Sampled:
        """`on_tokens` hears of tokens and their log-probabilities as they are drawn; the last come with the result."""
        ...


class Searcher(Protocol):
    """A search engine. Results in rank order; an empty tuple is an honest 'nothing found'."""

    async def search(self, query: str, *, top_k: int) -> tuple[Hit, ...] | Failure: ...


class Browser(Protocol):
    """Fetches a URL and returns it as text."""

    async def browse(self, url: str) -> Page | Failure: ...


class Reader(Protocol):
    """Reads a page for a question: what is new and useful in it, as (segment index, text) in reading order.

    `notes` is what the episode already knows; a reader returns only what is not in there."""

    async def read(
        self, page: Page, *, question: str, query: str, notes: Sequence[str]
    ) -> tuple[tuple[int, str], ...] | Failure: ...
