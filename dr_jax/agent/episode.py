"""One episode: a question, a policy and a world in; the record of what happened and what it was worth out."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from dr_jax.agent.chat import Chat
from dr_jax.agent.model_reader import ModelReader, ReadingLimits, ask_policy
from dr_jax.agent.presets import Preset
from dr_jax.agent.strategies.linear import Outcome, linear
from dr_jax.agent.tools import Toolbox
from dr_jax.agent.transcript import Transcript, seed_of
from dr_jax.interfaces import Browser, Reader, Sampler, Searcher
from dr_jax.records import Episode, Question, Sampling, StopReason
from dr_jax.task.answers import first_answer
from dr_jax.task.rewards import REWARDS, scores

__all__ = ["EpisodeContext", "run", "seed_of"]


@dataclasses.dataclass(frozen=True)
class EpisodeContext:
    """What the episodes of a step share."""

    sampler: Sampler
    chat: Chat
    preset: Preset
    searcher: Searcher
    browser: Browser
    reader: Reader | None  # None = the policy reads, in calls of the episode
    sampling: Sampling  # temperature, top_p, top_k; length, stop ids and seed are set per call
    seed: int  # the run's, folded (`seed_of`) with whatever names this visit of the questions, e.g. their cursor
    today: str  # ISO date, told to the policy where the preset does
    reading: ReadingLimits = ReadingLimits()  # of a policy that reads
    deadline_s: float = 600.0
    clock: Callable[[], float] = time.monotonic


async def run(question: Question, rollout: int, context: EpisodeContext) -> Episode:
    """The record of one rollout, rewarded. Nothing the policy or the world does makes it raise.

    Call i draws with a seed that is a function of (context.seed, question id, rollout, i) alone, and of the page, the
    query and the step where the policy reads.
    """
    preset, chat = context.preset, context.chat
    transcript = Transcript(
        chat.opening(preset, question.text, today=context.today),
        sampler=context.sampler,
        sampling=dataclasses.replace(
            context.sampling, max_new_tokens=preset.max_turn_tokens, stop_ids=chat.eos_ids, stop_strings=()
        ),
        seed=seed_of(context.seed, question.id, rollout),
        clock=context.clock,
    )
    ask = ask_policy(transcript, chat, context.reading, context_tokens=preset.context_tokens)
    toolbox = Toolbox(
        question.text,
        preset,
        searcher=context.searcher,
        browser=context.browser,
        reader=context.reader or ModelReader(ask, context.reading),
        clock=context.clock,
    )
    try:
        async with asyncio.timeout(context.deadline_s) as deadline:
            outcome = await linear(transcript, toolbox, chat, preset)
    except TimeoutError:
        if not deadline.expired():
            raise
        outcome = Outcome(StopReason.DEADLINE, detail=f"longer than {context.deadline_s} s")
    return _record(question, rollout, transcript, outcome, chat, preset)


def _record(
    question: Question, rollout: int, transcript: Transcript, outcome: Outcome, chat: Chat, preset: Preset
) -> Episode:
    if preset.answer_source == "transcript":  # the reference's reading: whatever the world wrote counts too
        response = preset.prefill + chat.decode(transcript.after_opening())
        answer = first_answer(response)
    else:
        response = "\n".join(preset.prefill + chat.decode(call.output) for call in transcript.calls)
        answer = outcome.answer
    return Episode(
        question=question,
        rollout=rollout,
        calls=transcript.all_calls(),
        tool_uses=tuple(transcript.tool_uses),
        stop=outcome.stop,
        answer=answer,
        response=response,
        reward=REWARDS[preset.reward](question, answer, response, outcome.stop),
        scores=scores(question, answer),
        detail=outcome.detail,
    )
