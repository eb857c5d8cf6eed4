"""The checkpoint's own chat template: any conversation as tokens, where `chat` knows those of our episodes only.

The template is trusted and may write control tokens. What it puts in is not: before it is rendered, a guard character
breaks whatever could be one, and is dropped again once control tokens have been found.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

from dr_jax.agent.chat import Chat
from dr_jax.errors import ConfigError

_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode gives them no meaning, so texts have none


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations in the form of OpenAI's API: `messages` and `tools`, function arguments as objects."""

    chat: Chat
    _template: jinja2.Template

    @classmethod
    def load(cls, checkpoint: str | pathlib.Path, chat: Chat) -> ChatTemplate:
        """That of `chat_template.jinja`, or of the older place `tokenizer_config.json`."""
        path, older = (pathlib.Path(checkpoint) / name for name in ("chat_template.jinja", "tokenizer_config.json"))
        source = None
        if path.is_file():
            source = path.read_text()
        elif older.is_file():
            source = json.loads(older.read_text()).get("chat_template")
        if not isinstance(source, str):
            raise ConfigError(f"chat template: {checkpoint} has none, neither in {path.name} nor in {older.name}")
        try:
            return cls(chat, _environment().from_string(source))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template: that of {checkpoint} does not compile: {error}") from error

    def tokens(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *, begun: str = ""
    ) -> list[int]:
        """Ids of the conversation up to the header of the assistant's next turn, and of the text it was `begun` with.

        Raises `ConfigError` for messages that the template cannot render. `role`s must have been checked.
        """
        outside = json.dumps([messages, tools], ensure_ascii=False)
        guard = next((character for character in _NONCHARACTERS if character not in outside), None)
        if guard is None:
            raise ConfigError("messages: every Unicode noncharacter from U+FDD0 to U+FDEF; leave one out")
        guarded = _Guard(guard, self.chat.control)
        try:
            text = self._template.render(
                messages=[guarded.message(message) for message in messages],
                tools=[guarded(tool) for tool in tools] or None,
                add_generation_prompt=True,
            )
        # Templates add strings to whatever a message holds.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ConfigError(f"messages: this model's chat template cannot render them: {error}") from error
        return self.chat.markup(text, guard) + self.chat.plain(begun)


class _Guard:
    """Breaks every control token in text from outside, also one of which the template's own text would be a part."""

    def __init__(self, guard: str, control: Mapping[str, int]):
        self._guard = guard
        self._heads = sorted({token[0] for token in control})
        self._tails = tuple({token[cut:] for token in control for cut in range(1, len(token))})

    def __call__(self, value: Any) -> Any:
        match value:
            case str():
                for head in self._heads:
                    value = value.replace(head, head + self._guard)
                return self._guard + value if value.startswith(self._tails) else value
            case Mapping():
                return {self(name): self(member) for name, member in value.items()}
            case list() | tuple():
                return [self(member) for member in value]
        return value

    def message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        content = message.get("content")
        if message["role"] == "tool" and isinstance(content, str):
            # Ordinary text in Qwen's vocabulary; what a tool returns must not be able to spell it.
            message = {**message, "content": content.replace("</tool_response>", "</ tool_response>")}
        return {name: value if name == "role" else self(value) for name, value in message.items()}


def _environment() -> jinja2.Environment:
    """As transformers sets it up (`render_jinja_template`), which would take ten seconds to import."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **layout)  # unlike jinja's own, no HTML escapes


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
