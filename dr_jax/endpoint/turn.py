"""What the policy writes, as a client reads it while it is drawn: text in whole characters, and tool calls."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from dr_jax.agent.chat import Chat


@dataclasses.dataclass(frozen=True)
class FunctionCall:
    """A call of a tool that the client offered; `arguments` is the JSON text of an object."""

    name: str
    arguments: str


Piece = str | FunctionCall


def opening(chat: Chat, tool: str) -> list[int]:
    """Ids with which a turn that must call `tool` goes on ('' = any): the model draws the rest of the call."""
    text = f'\n{{"name": {json.dumps(tool, ensure_ascii=False)}, "arguments":' if tool else '\n{"name":'
    return [chat.control["<tool_call>"], *chat.plain(text)]


class TurnReader:
    """Takes token ids as they are drawn, gives text and calls as soon as they are certain.

    Text ends before the first of `stops`, and a stop id adds none. With `tools`, what stands between the control ids
    of a tool call, and is the strict JSON of a call to one of them, is a call; everything else stays text, tags
    included, and is never repaired. White space between text and a call is the template's, and dropped.
    """

    def __init__(self, chat: Chat, *, tools: Collection[str], stops: Sequence[str], stop_ids: Collection[int]):
        self._chat = chat
        self._tools, self._stops, self._stop_ids = tools, stops, stop_ids
        self._opening, self._closing = chat.control["<tool_call>"], chat.control["</tool_call>"]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._call: list[int] | None = None  # ids since an opening tag
        self._held = ""  # may be the start of a stop string
        self._space = ""  # may stand before a call
        self._cut = False  # a stop string was there
        self.calls = 0  # so far

    def feed(self, ids: Iterable[int]) -> list[Piece]:
        """What is certain after `ids`."""
        pieces: list[Piece] = []
        for id in map(int, ids):
            if self._call is not None:
                self._in_call(id, pieces)
            elif self._tools and id == self._opening:
                self._text(self._decoder.decode(b"", final=True), pieces)  # a character that was not finished
                self._call = []
            elif id not in self._stop_ids:
                self._text(self._decoder.decode(self._chat.token_bytes(id)), pieces)
        return pieces

    def end(self) -> list[Piece]:
        """The rest: text that was held back, and a call that was not closed."""
        pieces: list[Piece] = []
        if self._call is not None:
            open_call = [self._opening, *(id for id in self._call if id not in self._stop_ids)]
            self._call = None
            self._text(self._decoder.decode(b"".join(map(self._chat.token_bytes, open_call))), pieces)
        self._text(self._decoder.decode(b"", final=True), pieces)
        if not self._cut:
            self._say(self._held, pieces)
        if self._space and not self.calls:
            return ["".join([*pieces, self._space])]
        return pieces

    def _in_call(self, id: int, pieces: list[Piece]) -> None:
        if id != self._closing:
            self._call.append(id)
            return
        inside, self._call = self._call, None
        call = _function_call(self._chat.decode(inside), self._tools)
        if call is None:
            whole = b"".join(map(self._chat.token_bytes, [self._opening, *inside, self._closing]))
            self._text(self._decoder.decode(whole), pieces)
        elif not self._cut:
            self._say(self._held, pieces)
            self._held = self._space = ""
            self.calls += 1
            pieces.append(call)

    def _text(self, text: str, pieces: list[Piece]) -> None:
        if self._cut or not text:
            return
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        self._cut = bool(found)
        keep = min(found) if found else len(text) - _start_of_a_stop(text, self._stops)
        self._held = text[keep:]
        self._say(text[:keep], pieces)

    def _say(self, text: str, pieces: list[Piece]) -> None:
        if self._tools:
            text = self._space + text
            said = text.rstrip()
            self._space, text = text[len(said) :], said
        if pieces and isinstance(pieces[-1], str):
            pieces[-1] += text
        elif text:
            pieces.append(text)


def _start_of_a_stop(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    longest = max(map(len, stops), default=1) - 1
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stops)), 0)


def _function_call(text: str, tools: Collection[str]) -> FunctionCall | None:
    try:
        call: Any = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or call.keys() != {"name", "arguments"} or not isinstance(call["arguments"], dict):
        return None
    if not isinstance(call["name"], str) or call["name"] not in tools:
        return None
    return FunctionCall(call["name"], json.dumps(call["arguments"], ensure_ascii=False))


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
