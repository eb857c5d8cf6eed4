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
        self.calls: list[Call] = []
        self.tool_uses: list[ToolUse] = []
        self._opening_tokens = len(opening.tokens)
        self._sampler = sampler
        self._sampling = sampling
        self._seed = seed
        self._clock = clock

    def append(self, piece: Prompt) -> None:
        """Adds tokens of the template or of the world."""
        self.prompt = Prompt(
            np.concatenate([self.prompt.tokens, piece.tokens]), np.concatenate([self.prompt.origin, piece.origin])
        )

    async def generate(self) -> Sampled:
        """What the policy draws next. It is recorded as a call and becomes part of the next prompt, save for an error.

        Call i is drawn with `seed_of(seed, i)`.
        """
        started_s = self._clock()
        sampling = dataclasses.replace(self._sampling, seed=seed_of(self._seed, len(self.calls)))
        sampled = await self._sampler.generate(self.prompt.tokens, sampling)
        if sampled.finish is Finish.ERROR:
            return sampled
        call = Call(
            id=len(self.calls),
            parent=self.calls[-1].id if self.calls else None,
            role=Role.POLICY,
            prompt=self.prompt.tokens,
            origin=self.prompt.origin,
            output=np.asarray(sampled.tokens, np.int32),
            logps=np.asarray(sampled.logps, np.float32),
            finish=sampled.finish,
            version=sampled.version,
            started_s=started_s,
            ended_s=self._clock(),
        )
        self.calls.append(call)
        self.append(Prompt(call.output, np.full(len(call.output), Origin.POLICY, np.uint8)))
        return sampled

    def after_opening(self) -> np.ndarray:
        """Every token after the opening, whoever wrote it."""
        return self.prompt.tokens[self._opening_tokens :]
