"""One conversation while it runs: tokens that only grow, the author of each, and what was done on the way."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from dr_jax.agent.chat import Prompt
from dr_jax.interfaces import Sampler
from dr_jax.records import Call, Finish, Origin, Role, Sampled, Sampling, ToolUse


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2**31) that depends on `parts` alone: the same in every process, unlike `hash()`."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


class Transcript:
    """The record of one episode in the making; it outlives an episode that is cut short."""

    def __init__(
        self, opening: Prompt, *, sampler: Sampler, sampling: Sampling, seed: int, clock: Callable[[], float]
    ) -> None:
        self.prompt = opening  # the next call's prompt; starts with the prompt and output of the call before it
        self.calls: list[Call] = []  # of the conversation; `all_calls` has those beside it too
        self.tool_uses: list[ToolUse] = []
        self._opening_tokens = len(opening.tokens)
        self._sampler = sampler
        self._sampling = sampling
        self._seed = seed
        self._clock = clock
        self._asides: dict[tuple[int | str, ...], Call] = {}  # (turn, role, *name) -> call

    def append(self, piece: Prompt) -> None:
        """Adds tokens of the template or of the world."""
        self.prompt = Prompt(
            np.concatenate([self.prompt.tokens, piece.tokens]), np.concatenate([self.prompt.origin, piece.origin])
        )

    async def generate(self) -> Sampled:
        """What the policy draws next. It is recorded as a call and becomes part of the next prompt, save for an error.

        Call i is drawn with `seed_of(seed, i)`.
        """
        sampled, call = await self._call(Role.POLICY, self.prompt, self._sampling, len(self.calls))
        if call is None:
            return sampled
        self.calls.append(call)
        self.append(Prompt(call.output, np.full(len(call.output), Origin.POLICY, np.uint8)))
        self.calls[:] = [_within(call, self.prompt) for call in self.calls]
        return sampled

    async def aside(self, role: Role, name: tuple[int | str, ...], prompt: Prompt, *, max_new_tokens: int) -> Sampled:
        """What the policy draws in the name of `role`, beside the conversation: recorded, and part of no later prompt.

        Drawn with `seed_of(seed, turn, role, *name)`, whatever else runs at the same time; `name` must be its own in
        this turn. A draw whose name was used already is the same draw."""
        key = (len(self.calls), str(role), *name)
        sampling = dataclasses.replace(self._sampling, max_new_tokens=max_new_tokens)
        sampled, call = await self._call(role, prompt, sampling, *key)
        if call is not None:
            self._asides[key] = call
        return sampled

    async def _call(
        self, role: Role, prompt: Prompt, sampling: Sampling, *seed: int | str
    ) -> tuple[Sampled, Call | None]:
        """One generation and its record, which has neither number nor parent yet; None where the sampler failed."""
        started_s = self._clock()
        sampling = dataclasses.replace(sampling, seed=seed_of(self._seed, *seed))
        sampled = await self._sampler.generate(prompt.tokens, sampling)
        if sampled.finish is Finish.ERROR:
            return sampled, None
        return sampled, Call(
            id=len(self.calls),
            parent=None,
            role=role,
            prompt=prompt.tokens,
            origin=prompt.origin,
            output=np.asarray(sampled.tokens, np.int32),
            logps=np.asarray(sampled.logps, np.float32),
            finish=sampled.finish,
            version=sampled.version,
            started_s=started_s,
            ended_s=self._clock(),
        )

    def all_calls(self) -> tuple[Call, ...]:
        """Every call, numbered: those of the conversation, each followed by what was asked beside it, in an order that
        does not depend on what came first. The parent of a call is the one in the conversation that led to it."""
        record: list[Call] = []
        parent = None
        for turn, call in enumerate(self.calls):
            record.append(dataclasses.replace(call, id=len(record), parent=parent))
            parent = record[-1].id
            for key in sorted(key for key in self._asides if key[0] == turn + 1):
                record.append(dataclasses.replace(self._asides[key], id=len(record), parent=parent))
        return tuple(record)

    def after_opening(self) -> np.ndarray:
        """Every token after the opening, whoever wrote it."""
        return self.prompt.tokens[self._opening_tokens :]


def _within(call: Call, prompt: Prompt) -> Call:
    """`call` as views of `prompt`, which starts with its tokens: copies would cost the square of the turns."""
    start, end = len(call.prompt), len(call.prompt) + len(call.output)
    return dataclasses.replace(
        call, prompt=prompt.tokens[:start], origin=prompt.origin[:start], output=prompt.tokens[start:end]
    )
