"""The plain research loop: think, call a tool, read the observation, and so on until the answer."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np

from dr_jax.agent.chat import Chat, Prompt
from dr_jax.agent.presets import Preset
from dr_jax.agent.tools import Answer, Malformed, Toolbox, parse_turn
from dr_jax.agent.transcript import Transcript
from dr_jax.records import Finish, StopReason

ANSWER_NOW = "No more tool calls: give your answer now."
_SHORT_CHARS = 4096  # encoded in about a millisecond
INVALID = "That was neither a tool call nor an answer. Write one of them in the given form."


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an episode ended."""

    stop: StopReason
    answer: str | None = None
    detail: str = ""


async def linear(transcript: Transcript, toolbox: Toolbox, chat: Chat, preset: Preset) -> Outcome:
    """Runs turns on `transcript` until one of them ends the episode.

    Order of checks in a turn: the prompt fits; the sampler drew; an answer; a malformed turn; a call in the last turn.
    Where the preset says so, the policy is told to answer before the last turn that the turn limit or the context
    allows: an episode that calls tools to the end had its chance to answer, and no observation overflows the context.
    *Differs from the reference*: a call in the last turn is not carried out, for nobody would read its result.
    """
    must_answer = False
    for turn in range(preset.max_turns):
        if len(transcript.prompt.tokens) + preset.max_turn_tokens > preset.context_tokens:
            return Outcome(StopReason.CONTEXT_LIMIT)
        sampled = await transcript.generate()
        if sampled.finish is Finish.ERROR:
            return Outcome(StopReason.INFRASTRUCTURE, detail=sampled.detail)
        turns_left = preset.max_turns - turn - 1
        action = parse_turn(sampled.tokens, chat, preset)
        if isinstance(action, Answer):
            return Outcome(StopReason.ANSWERED, action.text)
        if isinstance(action, Malformed) and (must_answer or not turns_left or preset.invalid_action == "end"):
            cut = sampled.finish is Finish.LENGTH
            return Outcome(StopReason.LENGTH if cut else StopReason.MALFORMED, detail=action.reason)
        if must_answer or not turns_left:
            return Outcome(StopReason.CONTEXT_LIMIT if turns_left else StopReason.TURN_LIMIT)
        if isinstance(action, Malformed):
            observation, words = None, [INVALID]
        else:
            use = await toolbox.use(action)
            transcript.tool_uses.append(use)
            observation, words = use.observation, []
        reply = await _reply(chat, preset, sampled.tokens, observation, words)
        if preset.final_turn == "tell_to_answer":
            must_answer = turns_left == 1 or not _further_round_fits(transcript, reply, chat, preset)
        if must_answer:
            reply = await _reply(chat, preset, sampled.tokens, observation, [*words, ANSWER_NOW])
        transcript.append(reply)
    raise AssertionError("the last turn always returns")


async def _reply(
    chat: Chat, preset: Preset, output: np.ndarray, observation: str | None, words: Sequence[str]
) -> Prompt:
    """`chat.reply`; in a thread where it takes long, for everybody else waits while the event loop encodes."""
    instruction = " ".join(words)
    if observation is None or len(observation) <= _SHORT_CHARS:
        return chat.reply(preset, output, observation, instruction=instruction)
    return await asyncio.to_thread(chat.reply, preset, output, observation, instruction=instruction)


def _further_round_fits(transcript: Transcript, reply: Prompt, chat: Chat, preset: Preset) -> bool:
    """True where, after `reply`, there is room for a turn, the longest observation, and the turn that answers."""
    frame = len(chat.reply(preset, (), "", instruction=ANSWER_NOW).tokens)
    so_far = len(transcript.prompt.tokens) + len(reply.tokens)
    return so_far + 2 * preset.max_turn_tokens + preset.observation_tokens + frame <= preset.context_tokens
