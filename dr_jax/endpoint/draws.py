"""The sequences of one request: drawn at once, and sent whole or as they come."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any

import numpy as np
from aiohttp import web

from dr_jax.agent.chat import Chat
from dr_jax.agent.transcript import seed_of
from dr_jax.endpoint.answers import Choice, Envelope, Usage
from dr_jax.endpoint.wire import Asked, Refused
from dr_jax.interfaces import StreamingSampler
from dr_jax.records import Finish, Sampled, Sampling


class Draws:
    """The sequences of one request."""

    def __init__(
        self, sampler: StreamingSampler, chat: Chat, asked: Asked, prompts: Sequence[Sequence[int]], *, model: str
    ):
        self._sampler, self._prompts, self.asked = sampler, prompts, asked
        own = asked.sampling
        ends = () if asked.ignore_eos else chat.eos_ids
        ends += (chat.control["</tool_call>"],) if asked.single_call else ()
        self._sampling = dataclasses.replace(own, stop_ids=tuple(dict.fromkeys(ends + own.stop_ids)))
        self.envelope = Envelope(asked, model, prompts[0])
        self.choices = [
            Choice(index, asked, chat, self._sampling.stop_ids, prompts[index // asked.choices])
            for index in range(asked.sequences)
        ]

    def usage(self, results: Sequence[Sampled]) -> Usage:
        return Usage(sum(map(len, self._prompts)), sum(len(sampled.tokens) for sampled in results))

    async def whole(self) -> dict[str, Any]:
        """The answer that is not streamed. Raises `Refused`."""
        results = await _all(self.draw(index) for index in range(len(self.choices)))
        scores: Sequence[np.ndarray | None] = [None] * len(self._prompts)
        if self.asked.prompt_logprobs:
            scores = await _all(self._score(prompt) for prompt in self._prompts)
        choices = [
            choice.whole(sampled, scores[index // self.asked.choices])
            for index, (choice, sampled) in enumerate(zip(self.choices, results, strict=True))
        ]
        return self.envelope.whole(choices, self.usage(results), results[0].version)

    async def draw(self, index: int, on_tokens: Callable[..., None] | None = None) -> Sampled:
        """What was drawn for a choice. Raises `Refused` where the sampler could not."""
        sampled = await self._sampler.generate(
            self._prompts[index // self.asked.choices], self._of_choice(index % self.asked.choices), on_tokens=on_tokens
        )
        if sampled.finish is Finish.ERROR:
            ours = sampled.detail.startswith("engine")
            raise Refused(500 if ours else 400, sampled.detail)
        return sampled

    def _of_choice(self, choice: int) -> Sampling:
        """The first choice has the seed that was asked for, so that it is the same whatever `n` is."""
        seed = seed_of(self._sampling.seed, choice) if choice else self._sampling.seed
        return dataclasses.replace(self._sampling, seed=seed)

    async def _score(self, prompt: Sequence[int]) -> np.ndarray:
        if len(prompt) == 1:
            return np.zeros(0, np.float32)
        return await self._sampler.score(prompt[:1], prompt[1:])


async def stream(request: web.Request, draws: Draws, write_s: float) -> web.StreamResponse:
    """Server-sent events: chunks as they come, the last one `[DONE]`."""
    arrived: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()  # bounded by what the sequences may hold

    async def draw(index: int) -> None:
        try:
            result = await draws.draw(index, lambda *news: arrived.put_nowait((index, news)))
        except Refused as refused:
            result = refused
        arrived.put_nowait((index, result))

    tasks = [asyncio.create_task(draw(index)) for index in range(len(draws.choices))]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})

    async def send(*events: dict[str, Any] | str) -> None:
        data = "".join(f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events)
        async with asyncio.timeout(write_s):
            await response.write(data.encode())

    try:
        first = await arrived.get()
        if isinstance(first[1], Refused):
            raise first[1]
        await response.prepare(request)
        openings = [opening for choice in draws.choices if (opening := choice.opening())]
        await send(*map(draws.envelope.chunk, openings))
        await _send_all(send, draws, arrived, first)
    except (TimeoutError, ConnectionError):  # a client that does not read, or is gone
        if request.transport:
            request.transport.abort()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return response


async def _send_all(
    send: Callable[..., Awaitable[None]], draws: Draws, arrived: asyncio.Queue[tuple[int, Any]], item: tuple[int, Any]
) -> None:
    results: list[Sampled] = []
    while True:
        index, news = item
        if isinstance(news, Refused):
            return await send(news.body())
        choice = draws.choices[index]
        if isinstance(news, Sampled):
            results.append(news)
            await send(*map(draws.envelope.chunk, choice.end(news)))
        else:
            await send(*map(draws.envelope.chunk, choice.news(*news)))
        if len(results) == len(draws.choices):
            break
        item = await arrived.get()
    last = [draws.envelope.last(draws.usage(results))] if draws.asked.usage else []
    await send(*last, "[DONE]")


async def _all(jobs: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results in order. The first error cancels the others, and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job) for job in jobs]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors
    return [task.result() for task in tasks]
