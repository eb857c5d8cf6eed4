"""OpenAI's answers as JSON values: completions and chats, whole and in chunks."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dr_jax.agent.chat import Chat
from dr_jax.endpoint.turn import FunctionCall, Piece, TurnReader, opening
from dr_jax.endpoint.wire import Asked, Conversation
from dr_jax.records import Finish, Sampled


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request, choices together."""

    prompt: int
    completion: int

    def json(self) -> dict[str, int]:
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


class Envelope:
    """What all chunks of one answer have in common."""

    def __init__(self, asked: Asked, model: str, prompt: Sequence[int]):
        chat = isinstance(asked.prompts[0], Conversation)
        self._usage = asked.usage
        # vLLM says once what a chat was rendered to; of completions each choice says it, for there can be many prompts.
        self._about_prompt = {"prompt_token_ids": list(prompt)} if chat and asked.token_ids else {}
        kind = ("chat.completion" + ".chunk" * asked.stream) if chat else "text_completion"
        id = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._common = {"id": id, "object": kind, "created": int(time.time()), "model": model}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage, version: int) -> dict[str, Any]:
        """The answer. `system_fingerprint` names the version of the weights that drew it."""
        return {
            **self._common,
            "system_fingerprint": fingerprint(version),
            "choices": list(choices),
            "usage": usage.json(),
            **self._about_prompt,
        }

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """A piece of a stream."""
        about_prompt, self._about_prompt = self._about_prompt, {}  # in the first alone
        return {**self._common, "choices": [choice], **about_prompt} | ({"usage": None} if self._usage else {})

    def last(self, usage: Usage) -> dict[str, Any]:
        """The chunk that has no choices."""
        return {**self._common, "choices": [], "usage": usage.json()}


class Choice:
    """One of an answer's choices while its tokens arrive: tokens in, JSON out."""

    def __init__(self, index: int, asked: Asked, chat: Chat, stop_ids: Sequence[int], prompt: Sequence[int]):
        self._index, self._asked, self._chat, self._prompt = index, asked, chat, prompt
        source = asked.prompts[index // asked.choices]
        self._in_chat = isinstance(source, Conversation)
        self._reader = TurnReader(
            chat,
            tools=source.tool_names if isinstance(source, Conversation) else (),
            stops=asked.sampling.stop_strings,
            stop_ids=stop_ids,
        )
        if isinstance(source, Conversation) and source.forced is not None:
            self._reader.feed(opening(chat, source.forced))  # of the prompt, and of the call
        self._seen = self._offset = self._calls = 0  # tokens, characters, calls that went out
        self._said_prompt = False

    def whole(self, sampled: Sampled, prompt_logps: np.ndarray | None = None) -> dict[str, Any]:
        """The choice of an answer that is not streamed."""
        pieces = [*self._reader.feed(sampled.tokens), *self._reader.end()]
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        calls = [_call(piece) for piece in pieces if isinstance(piece, FunctionCall)]
        choice: dict[str, Any] = {"index": self._index}
        if self._in_chat:
            message = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            choice["message"] = message | ({"tool_calls": calls} if calls else {})
        else:
            choice["text"] = text
        choice |= self._about_tokens(sampled.tokens.tolist(), sampled.logps.tolist())
        if prompt_logps is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(prompt_logps)
        return choice | {"finish_reason": self._reason(sampled)}

    def opening(self) -> dict[str, Any] | None:
        """The first chunk of a chat's choice, which has its role alone."""
        if self._in_chat:
            return self._chunk({"role": "assistant", "content": ""}, {"logprobs": None})
        return None

    def news(self, tokens: Sequence[int], logps: Sequence[float]) -> list[dict[str, Any]]:
        """Chunks for tokens that were drawn; none while nothing can be said."""
        self._seen += len(tokens)
        return self._chunks(self._reader.feed(tokens), self._about_tokens(tokens, logps))

    def end(self, sampled: Sampled) -> list[dict[str, Any]]:
        """Chunks for what `news` has not seen, and the one with the reason."""
        tokens, logps = sampled.tokens[self._seen :].tolist(), sampled.logps[self._seen :].tolist()
        pieces = [*self._reader.feed(tokens), *self._reader.end()]
        chunks = self._chunks(pieces, self._about_tokens(tokens, logps))
        last = self._chunk({} if self._in_chat else "", {"logprobs": None})
        return [*chunks, last | {"finish_reason": self._reason(sampled)}]

    def _chunks(self, pieces: Sequence[Piece], about: dict[str, Any]) -> list[dict[str, Any]]:
        if not pieces and about.get("logprobs") is None and "token_ids" not in about:
            return []
        deltas = [self._delta(piece) for piece in pieces] or [self._delta("")]
        # The tokens' own data goes with the first: which token gave which piece is not known.
        return [self._chunk(deltas[0], about), *(self._chunk(delta, {"logprobs": None}) for delta in deltas[1:])]

    def _delta(self, piece: Piece) -> Any:
        if isinstance(piece, FunctionCall):
            self._calls += 1
            return {"tool_calls": [{"index": self._calls - 1, **_call(piece)}]}
        return {"content": piece} if self._in_chat else piece

    def _chunk(self, delta: Any, about: dict[str, Any]) -> dict[str, Any]:
        said = {"delta" if self._in_chat else "text": delta}
        return {"index": self._index, **said, **about, "finish_reason": None}

    def _reason(self, sampled: Sampled) -> str:
        return "tool_calls" if self._reader.calls and sampled.finish is Finish.STOP else str(sampled.finish)

    def _about_tokens(self, tokens: Sequence[int], logps: Sequence[float]) -> dict[str, Any]:
        about: dict[str, Any] = {"logprobs": None}
        if self._asked.logprobs and self._in_chat:
            about["logprobs"] = {"content": [self._token(*pair) for pair in zip(tokens, logps, strict=True)]}
        elif self._asked.logprobs:
            about["logprobs"] = self._columns(tokens, logps)
        if self._asked.token_ids:
            about["token_ids"] = list(tokens)
            if not (self._in_chat or self._said_prompt):
                about["prompt_token_ids"] = list(self._prompt)
            self._said_prompt = True
        return about

    def _token(self, id: int, logp: float) -> dict[str, Any]:
        raw = self._chat.token_bytes(id)
        return {"token": raw.decode(errors="replace"), "logprob": logp, "bytes": list(raw), "top_logprobs": []}

    def _columns(self, tokens: Iterable[int], logps: Sequence[float]) -> dict[str, Any]:
        texts = [self._chat.token_bytes(id).decode(errors="replace") for id in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {"tokens": texts, "token_logprobs": list(logps), "top_logprobs": None, "text_offset": offsets}

    def _prompt_logprobs(self, logps: np.ndarray) -> list[dict[str, Any] | None]:
        """vLLM's form: an object for each token of the prompt, under the token's id; the first has none."""
        rest = zip(self._prompt[1:], logps.tolist(), strict=True)
        return [None, *({str(id): {"logprob": logp}} for id, logp in rest)]


def fingerprint(version: int) -> str:
    """How an answer names the weights that drew it; `version_of` reads it."""
    return f"dr_jax-weights-{version}"


def version_of(fingerprint: object) -> int:
    """The version of the weights; 0 where a server does not say."""
    head, _, number = str(fingerprint).rpartition("-")
    return int(number) if head == "dr_jax-weights" and number.isdecimal() else 0


def _call(call: FunctionCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
