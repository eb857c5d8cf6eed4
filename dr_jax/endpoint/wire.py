"""What a client may ask for, checked: OpenAI's requests in, frozen data out. What we cannot do is refused by name.

Beyond OpenAI's own fields, those of vLLM that a client needs to get tokens in and out: `top_k`, `stop_token_ids`,
`ignore_eos`, `return_token_ids`, `prompt_logprobs=0`, and for chats `continue_final_message`. Log-probabilities are
those of `records.Sampled`: under the temperature that was asked for, before `top_k` and `top_p`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from dr_jax.errors import DrJaxError
from dr_jax.records import Sampling

MAX_CHOICES = 128  # `n`, as OpenAI has it
MAX_STOPS = 4  # strings, as OpenAI has it
COMPLETION_TOKENS = 16  # OpenAI's default of `max_tokens` where there is no chat
_ROLES = ("system", "user", "assistant", "tool")
# Options that we do not have, with the values that ask for nothing. Everything else is refused.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "min_p": (0,), "logit_bias": ({},),
    "best_of": (1,), "echo": (False,), "suffix": ("",), "response_format": ({"type": "text"},), "store": (False,),
    "min_tokens": (0,), "service_tier": ("auto", "default"), "modalities": (["text"],),
}  # fmt: skip


class Refused(DrJaxError):
    """An answer in OpenAI's error form, with its HTTP status."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int = 0
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON that goes with the status."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A chat to be rendered by the model's template. `begun` is text that the assistant's turn starts with;
    `forced` the tool that it must call then: '' for any of them, None where it need not."""

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...]
    begun: str = ""
    forced: str | None = None

    @property
    def tool_names(self) -> frozenset[str]:
        return frozenset(tool["function"]["name"] for tool in self.tools)


@dataclasses.dataclass(frozen=True)
class Asked:
    """One checked request; the stop ids of `sampling` are those beside the model's own."""

    prompts: tuple[str | Conversation | tuple[int, ...], ...]
    sampling: Sampling
    choices: int  # of each prompt
    ignore_eos: bool = False
    single_call: bool = False  # the turn ends with its first tool call
    stream: bool = False
    usage: bool = False  # in a last chunk of the stream
    logprobs: bool = False
    prompt_logprobs: bool = False
    token_ids: bool = False

    @property
    def sequences(self) -> int:
        """How many are drawn."""
        return len(self.prompts) * self.choices


def completion(body: Any, *, model: str) -> Asked:
    """The request of `/v1/completions`. Raises `Refused`."""
    fields = _Fields(body, model)
    logprobs = fields.whole("logprobs", -1, 0, 0, why="0 gives the drawn tokens' own; the engine has no others")
    prompt_logprobs = fields.whole("prompt_logprobs", -1, 0, 0, why="0 gives those of the prompt's own tokens")
    asked = Asked(
        prompts=_prompts(fields),
        sampling=fields.sampling(fields.whole("max_tokens", COMPLETION_TOKENS, 1)),
        choices=fields.whole("n", 1, 1, MAX_CHOICES),
        ignore_eos=fields.flag("ignore_eos"),
        **fields.streaming(),
        logprobs=logprobs == 0,
        prompt_logprobs=prompt_logprobs == 0,
        token_ids=fields.flag("return_token_ids"),
    )
    if asked.stream and asked.prompt_logprobs:
        raise _wrong("prompt_logprobs", 0, "not with stream=true")
    fields.close()
    return asked


def chat(body: Any, *, model: str, context: int) -> Asked:
    """The request of `/v1/chat/completions`. Raises `Refused`."""
    fields = _Fields(body, model)
    limit = fields.whole("max_completion_tokens", 0, 1)
    older = fields.whole("max_tokens", 0, 1)
    if limit and older:
        raise _wrong("max_tokens", older, "give it or max_completion_tokens, not both")
    logprobs = fields.flag("logprobs")
    fields.whole("top_logprobs", 0, 0, 0, why="the engine has the drawn tokens' own log-probabilities alone")
    tools = _tools(fields.take("tools", []))
    choice = fields.take("tool_choice", "auto")
    conversation = _conversation(fields, tools if choice != "none" else ())
    forced = _forced(choice, conversation.tool_names)
    conversation = dataclasses.replace(conversation, forced=forced)
    asked = Asked(
        prompts=(conversation,),
        sampling=fields.sampling(limit or older or context),
        choices=fields.whole("n", 1, 1, MAX_CHOICES),
        ignore_eos=fields.flag("ignore_eos"),
        single_call=(not fields.flag("parallel_tool_calls", True) or bool(forced)) and bool(conversation.tools),
        **fields.streaming(),
        logprobs=logprobs,
        token_ids=fields.flag("return_token_ids"),
    )
    fields.close()
    return asked


class _Fields:
    """The members of a request's body; null is not given. What nobody took is refused by `close`."""

    def __init__(self, body: Any, model: str):
        if not isinstance(body, dict):
            raise Refused(400, f"the body is {type(body).__name__}, need a JSON object")
        self._left = {name: value for name, value in body.items() if value is not None}
        wanted = self.take("model", model)
        if wanted != model:
            raise Refused(
                404, f"model: got {_show(wanted)}; this server has {model!r}", param="model", code="model_not_found"
            )
        self.take("user", "")  # a label of the client's: it asks for nothing

    def take(self, name: str, default: Any) -> Any:
        return self._left.pop(name, default)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise _wrong(name, value, "need true or false")
        return value

    def whole(self, name: str, default: int, low: int, high: float = math.inf, *, why: str = "") -> int:
        """An integer within limits; one that is not given need not keep them."""
        if name not in self._left:
            return default
        value = self.take(name, default)
        if type(value) is not int or not low <= value <= high:
            span = (
                str(low) if low == high else f"an integer of {low} or more" if high == math.inf else f"{low} to {high}"
            )
            raise _wrong(name, value, f"allowed: {span}{why and f' ({why})'}")
        return value

    def number(self, name: str, default: float, fits: Callable[[float], bool], allowed: str) -> float:
        value = self.take(name, default)
        if type(value) not in (int, float) or not fits(value):
            raise _wrong(name, value, f"allowed: {allowed}")
        return float(value)

    def sampling(self, max_new_tokens: int) -> Sampling:
        stops = self.take("stop", [])
        stops = [stops] if isinstance(stops, str) else stops
        if not _list_of(str, stops) or len(stops) > MAX_STOPS or "" in stops:
            raise _wrong("stop", stops, f"need a string, or a list of at most {MAX_STOPS}, none of them empty")
        stop_ids = self.take("stop_token_ids", [])
        if not _list_of(int, stop_ids):
            raise _wrong("stop_token_ids", stop_ids, "need a list of token ids")
        return Sampling(
            max_new_tokens=max_new_tokens,
            temperature=self.number("temperature", 1.0, lambda t: t == 0 or 1e-3 <= t <= 2, "0, or 0.001 to 2"),
            top_p=self.number("top_p", 1.0, lambda p: 0 < p <= 1, "above 0, at most 1"),
            top_k=max(self.whole("top_k", 0, -1, 2**31 - 1), 0),  # vLLM's -1 is all, as 0 is
            stop_ids=tuple(stop_ids),
            stop_strings=tuple(stops),
            seed=self.whole("seed", secrets.randbits(31), -(2**63), 2**63 - 1),
        )

    def streaming(self) -> dict[str, bool]:
        stream, options = self.flag("stream"), self.take("stream_options", None)
        if options is None:
            return dict(stream=stream)
        if not stream or not isinstance(options, dict) or not options.keys() <= {"include_usage"}:
            raise _wrong("stream_options", options, "allowed: {'include_usage': true}, where stream is true")
        usage = options.get("include_usage", False)
        if not isinstance(usage, bool):
            raise _wrong("stream_options.include_usage", usage, "need true or false")
        return dict(stream=stream, usage=usage)

    def close(self) -> None:
        for name, value in self._left.items():
            allowed = _NEUTRAL.get(name, ())
            if value not in allowed:
                hint = f"allowed: {', '.join(map(repr, allowed))}" if allowed else "no such option here; leave it out"
                raise _wrong(name, value, hint, code="unsupported_parameter")


def _prompts(fields: _Fields) -> tuple[Any, ...]:
    prompt = fields.take("prompt", None)
    if isinstance(prompt, str):
        return (prompt,)
    if isinstance(prompt, list) and prompt:
        if _list_of(int, prompt):
            return (tuple(prompt),)
        if _list_of(str, prompt):
            return tuple(prompt)
        if all(_list_of(int, part) and part for part in prompt):
            return tuple(map(tuple, prompt))
    raise _wrong("prompt", prompt, "need text, a list of texts, a list of token ids, or a list of such lists")


def _conversation(fields: _Fields, tools: Sequence[Mapping[str, Any]]) -> Conversation:
    raw = fields.take("messages", None)
    if not isinstance(raw, list) or not raw:
        raise _wrong("messages", raw, "need a list with at least one message")
    messages = tuple(_message(message, f"messages[{index}]") for index, message in enumerate(raw))
    goes_on = fields.flag("continue_final_message")
    if fields.flag("add_generation_prompt", not goes_on) == goes_on:
        raise _wrong("add_generation_prompt", goes_on, "must be the opposite of continue_final_message")
    if not goes_on:
        return Conversation(messages, tuple(tools))
    last = messages[-1]
    if len(messages) < 2 or last["role"] != "assistant" or "tool_calls" in last:
        raise _wrong("continue_final_message", True, "the last message must be the assistant's, and text")
    return Conversation(messages[:-1], tuple(tools), begun=last["content"])


def _message(message: Any, where: str) -> dict[str, Any]:
    """Role, content as one text, and tool calls with their arguments as an object, as chat templates want them."""
    if not isinstance(message, dict):
        raise _wrong(where, message, "need an object with role and content")
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    role = "system" if role == "developer" else role
    if role not in _ROLES:
        raise _wrong(f"{where}.role", role, f"allowed: {', '.join(_ROLES)}")
    unknown = message.keys() - {"role", "content", "tool_calls", "tool_call_id", "name", "refusal"}
    if unknown or message.get("refusal"):
        raise _wrong(where, sorted(unknown or {"refusal"}), "no such member here; leave it out")
    if isinstance(content, list):
        content = _joined(content, f"{where}.content")
    if calls and role != "assistant":
        raise _wrong(f"{where}.tool_calls", calls, "only the assistant calls tools")
    if not isinstance(content, str) and not (content is None and calls):
        raise _wrong(f"{where}.content", content, "need text")
    read = {"role": role, "content": content or ""}
    return read | {"tool_calls": _calls(calls, f"{where}.tool_calls")} if calls else read


def _joined(parts: list[Any], where: str) -> str:
    for part in parts:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            raise _wrong(where, part, "this model reads text: parts must be {'type': 'text', 'text': …}")
    return "".join(part["text"] for part in parts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") if isinstance(call, dict) else None
        try:
            name, arguments = function["name"], json.loads(function["arguments"])
        except (TypeError, KeyError, ValueError, RecursionError):
            name, arguments = None, None
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise _wrong(where, call, "need function.name, and function.arguments as JSON text of an object")
        read.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return read


def _tools(tools: Any) -> tuple[Mapping[str, Any], ...]:
    for tool in tools if isinstance(tools, list) else [tools]:
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise _wrong("tools", tool, "need objects {'type': 'function', 'function': {'name': …}}")
        if function.get("strict"):
            raise _wrong("tools.function.strict", True, "nothing forces this model to keep to a schema")
    return tuple(tools)


def _forced(choice: Any, names: Collection[str]) -> str | None:
    """`Conversation.forced`."""
    match choice:
        case "auto" | "none":
            return None
        case "required" if names:
            return ""
        case {"type": "function", "function": {"name": str(name)}} if name in names:
            return name
    raise _wrong(
        "tool_choice", choice, "allowed: 'auto', 'none', and with tools 'required' or {'type': 'function', 'function': "
        "{'name': one of theirs}}",
    )  # fmt: skip


def _list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _wrong(name: str, value: Any, rule: str, *, code: str = "invalid_value") -> Refused:
    return Refused(400, f"{name}: got {_show(value)}; {rule}", param=name, code=code)


def _show(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"
