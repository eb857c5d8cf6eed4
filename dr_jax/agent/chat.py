"""Conversations as tokens: Qwen's chat template built by hand, so that text from outside can never become markup.

There are two ways from text to tokens. The template's own text may hold control tokens (`<|im_start|>`, `<tool_call>`);
everything else (questions, observations) goes through `plain`, an encoder that does not know them. Prompts only ever
grow: a turn is appended to the tokens of the turns before it, and nothing that was sampled is encoded again.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dr_jax.agent.presets import Preset
from dr_jax.errors import ConfigError
from dr_jax.records import Origin

_NEEDED = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>")
# Longer text is cut by characters before it is encoded. Prose has about four a token, and hardly any has more than six.
_CHARS_PER_TOKEN, _MAX_CHARS_PER_TOKEN = 4, 6
# Long text is encoded in parts, side by side: no piece that Qwen's tokenizer looks at goes on after a line break.
_PARTS = re.compile(r"(?s).{2000,}?\n(?=\S)|.+")
_CUT = " …[cut]"
# How byte-level BPE spells a byte as a character (GPT-2): itself where it is printable, else from U+0100 on.
_PRINTABLE = (*range(33, 127), *range(161, 173), *range(174, 256))
_BYTES = {chr(byte): byte for byte in _PRINTABLE}
_BYTES |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*_PRINTABLE}))}


class Prompt(NamedTuple):
    """Tokens of a prompt or of a piece of one, with the author of each."""

    tokens: np.ndarray  # int32 [p]
    origin: np.ndarray  # uint8 [p], `Origin`


@dataclasses.dataclass(frozen=True)
class Text:
    """Text by one author, to be encoded without control tokens."""

    text: str
    origin: Origin


@dataclasses.dataclass(frozen=True)
class Chat:
    """A tokenizer and the turns of Qwen's chat template. Stateless: one serves every episode."""

    control: Mapping[str, int]  # name -> id of every added token
    _full: Any  # tokenizers.Tokenizer, for decoding
    _plain: Any  # its clone without added tokens, for encoding

    @classmethod
    def load(cls, tokenizer_dir: str | pathlib.Path) -> Chat:
        """The chat of a Qwen2.5-style tokenizer directory (`tokenizer.json`, or `vocab.json` and `merges.txt`)."""
        return cls.of(_read_tokenizer(pathlib.Path(tokenizer_dir)), str(tokenizer_dir))

    @classmethod
    def of(cls, tokenizer: Any, name: str = "tokenizer") -> Chat:
        """The chat of a `tokenizers.Tokenizer`; `name` stands in the error where it lacks Qwen's control tokens."""
        from tokenizers import Tokenizer

        recipe = json.loads(tokenizer.to_str())
        control = {token["content"]: token["id"] for token in recipe["added_tokens"]}
        missing = [token for token in _NEEDED if token not in control]
        if missing:
            raise ConfigError(
                f"tokenizer: {name} has no control token {', '.join(missing)}. Use the tokenizer of a Qwen2.5 model."
            )
        # `split_special_tokens` would not do: it still lets <tool_call> through, which Qwen does not flag as special.
        # Post-processors may name added tokens, and have no part in encoding a piece of text.
        recipe.update(added_tokens=[], post_processor=None)
        chat = cls(control, tokenizer, Tokenizer.from_str(json.dumps(recipe)))
        if leaked := set(chat.plain("".join(control))) & set(control.values()):
            raise ConfigError(
                f"tokenizer: {name} makes control tokens {sorted(leaked)} out of plain text. Use another."
            )
        return chat

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end the policy's turn."""
        return self.control["<|im_end|>"], self.control["<|endoftext|>"]

    def plain(self, text: str) -> list[int]:
        """Ids of `text`, never one of an added token, whatever the text holds."""
        return self._plain.encode(_encodable(text), add_special_tokens=False).ids

    def markup(self, text: str, guard: str = "") -> list[int]:
        """Ids of text that is our own, control tokens by name. Never for text from outside, unless the character
        `guard` breaks every control token in it: it is dropped after control tokens have been found."""
        pieces = self._markup(text)
        if guard:
            pieces = [Text(p.text.replace(guard, ""), p.origin) if isinstance(p, Text) else p for p in pieces]
        return self._encode(*pieces).tokens.tolist()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, control tokens by name."""
        return self._full.decode([int(id) for id in ids], skip_special_tokens=False)

    def token_bytes(self, id: int) -> bytes:
        """UTF-8 that `id` adds to the text, maybe a part of a character; b'' for an id that is no token.

        The bytes of all tokens, decoded with errors='replace', are what `decode` gives.
        """
        token = self._full.id_to_token(int(id)) or ""
        known = all(character in _BYTES for character in token)
        return bytes(_BYTES[character] for character in token) if known else token.encode()

    def opening(self, preset: Preset, question: str, *, today: str) -> Prompt:
        """System turn with the tools, the question as the user's turn, and the header of the policy's first turn."""
        schemas = "".join(f"\n{json.dumps(schema, ensure_ascii=False)}" for schema in preset.tools)
        system = preset.system.replace("{today}", today) + preset.tools_section.replace("{schemas}", schemas)
        return self.exchange(system, [Text(question, Origin.TEMPLATE)], prefill=preset.prefill)

    def exchange(self, system: str, user: Sequence[Text], *, prefill: str = "") -> Prompt:
        """A conversation of its own: our `system` text, one `user` turn, and the header of the model's turn."""
        return self._encode(
            *self._markup(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"),
            *user,
            *self._markup(f"<|im_end|>\n<|im_start|>assistant\n{prefill}"),
        )

    def reply(
        self, preset: Preset, output: Sequence[int] | np.ndarray, observation: str | None, *, instruction: str = ""
    ) -> Prompt:
        """What follows the policy's `output`: a user's turn, and the header of the policy's next turn.

        The user's turn holds the observation, cut at `preset.observation_tokens` (None = there is none), and after it
        our own `instruction`.
        """
        if observation is None:
            return self._user_turn(preset, output, Text(instruction, Origin.TEMPLATE))
        # The closing tag is ordinary text in Qwen's vocabulary; a page must not be able to spell it.
        safe = observation.replace("</tool_response>", "</ tool_response>")

        def turn(shown: str) -> Prompt:
            opening, closing = "<tool_response>\n", "\n</tool_response>" + f"\n{instruction}" * bool(instruction)
            pieces = ((opening, Origin.TEMPLATE), (shown, Origin.WORLD), (closing, Origin.TEMPLATE))
            return self._user_turn(preset, output, *(Text(*piece) for piece in pieces))

        if len(safe) <= preset.observation_tokens * _CHARS_PER_TOKEN:
            whole = turn(safe)
            if (whole.origin == Origin.WORLD).sum() <= preset.observation_tokens:
                return whole
        return turn(self.cut(safe, preset.observation_tokens))

    def _user_turn(self, preset: Preset, output: Sequence[int] | np.ndarray, *body: Text) -> Prompt:
        return self._encode(
            *self._turn_end(output),
            *self._markup("<|im_start|>user\n"),
            *body,
            *self._markup(f"<|im_end|>\n<|im_start|>assistant\n{preset.prefill}"),
        )

    def _turn_end(self, output: Sequence[int] | np.ndarray) -> list[int | Text]:
        """Closes the policy's turn: it may have been cut before it drew `<|im_end|>` itself."""
        ended = len(output) > 0 and int(output[-1]) == self.control["<|im_end|>"]
        return self._markup("\n" if ended else "<|im_end|>\n")

    def _markup(self, text: str) -> list[int | Text]:
        """The template's own text, its control tokens as ids."""
        pieces = self._control_pattern.split(text)
        return [self.control[p] if p in self.control else Text(p, Origin.TEMPLATE) for p in pieces if p]

    @functools.cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        return re.compile("(" + "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) + ")")

    def _encode(self, *pieces: int | Text) -> Prompt:
        """The pieces as tokens. Text between two control ids is encoded whole, as the tokenizer itself would do it;
        a token over a seam counts as the world's."""
        runs = [(kind, tuple(run)) for kind, run in itertools.groupby(pieces, type)]
        parts = [self._encode_run(run) if kind is Text else _template_ids(run) for kind, run in runs]
        parts.append(_template_ids(()))  # no pieces are a prompt of no tokens
        return Prompt(np.concatenate([part.tokens for part in parts]), np.concatenate([part.origin for part in parts]))

    def _encode_run(self, run: Sequence[Text]) -> Prompt:
        text = _encodable("".join(piece.text for piece in run))
        if not any(piece.text for piece in run if piece.origin is Origin.WORLD):
            return self._encode_own(text)
        encoding = self._encoding(text)
        ids = np.asarray(encoding.ids, np.int32)
        origin = np.full(len(ids), Origin.TEMPLATE, np.uint8)
        end = 0
        for piece in run:
            start, end = end, end + len(piece.text)
            if piece.origin is Origin.WORLD and piece.text:
                origin[_tokens_over(encoding, start, end)] = Origin.WORLD
        return Prompt(ids, origin)

    @functools.cached_property
    def _encode_own(self) -> Callable[[str], Prompt]:
        """Encodes text in which the world has no part. It is remembered: a run says the same few things many times."""

        @functools.lru_cache(maxsize=512)
        def encode(text: str) -> Prompt:
            piece = _template_ids(self._encoding(text).ids)
            for array in piece:
                array.flags.writeable = False
            return piece

        return encode

    def _encoding(self, text: str) -> Any:
        from tokenizers import Encoding

        # A batch, even of one: unlike `encode`, it lets other threads run meanwhile.
        parts = self._plain.encode_batch(_PARTS.findall(text) or [""], add_special_tokens=False)
        return parts[0] if len(parts) == 1 else Encoding.merge(parts, growing_offsets=True)

    def cut(self, text: str, max_tokens: int) -> str:
        """`text`, cut to at most `max_tokens` tokens, with a mark at the end where anything is missing."""
        head, ends = self._head(text, max_tokens)
        if len(head) == len(text) and len(ends) <= max_tokens:
            return text
        room = max_tokens - len(self.plain(_CUT))
        head = head[: ends[room - 1]] if room < len(ends) else head
        # What was one token with its neighbour may be two without it; the last part alone has such neighbours.
        last = _PARTS.findall(head)[-1] if head else ""
        before = bisect.bisect_right(ends, len(head) - len(last))
        while last and (excess := before + len(self.plain(last + _CUT)) - max_tokens) > 0:
            head, last = head[:-excess], last[:-excess]
        return head + _CUT

    def _head(self, text: str, max_tokens: int) -> tuple[str, list[int]]:
        """Enough of `text` for `max_tokens` tokens, or what may be encoded of it; and where its tokens end."""
        for chars_per_token in (_CHARS_PER_TOKEN, _MAX_CHARS_PER_TOKEN):
            head = _encodable(text[: max_tokens * chars_per_token])
            ends = [end for _, end in self._encoding(head).offsets]
            if len(head) == len(text) or len(ends) > max_tokens:
                break
        return head, ends


def _tokens_over(encoding: Any, start: int, end: int) -> slice:
    """The tokens that hold any of the characters from `start` to `end`."""
    first, after = encoding.char_to_token(start), encoding.char_to_token(end)
    if first is None or after is None:  # the text ends there, or the tokenizer dropped the character
        overlap = [i for i, (left, right) in enumerate(encoding.offsets) if left < end and right > start]
        return slice(overlap[0], overlap[-1] + 1) if overlap else slice(0, 0)
    over_the_seam = encoding.token_to_chars(after)[0] < end
    return slice(first, after + over_the_seam)


def _template_ids(ids: Sequence[int]) -> Prompt:
    return Prompt(np.asarray(ids, np.int32), np.full(len(ids), Origin.TEMPLATE, np.uint8))


def _read_tokenizer(path: pathlib.Path) -> Any:
    """A `tokenizers.Tokenizer`. Read directly where it is one file: importing transformers takes ten seconds."""
    if (path / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path / "tokenizer.json"))
    if not (path / "vocab.json").is_file():
        raise ConfigError(f"tokenizer: {path} holds neither tokenizer.json nor vocab.json. Give a model's directory.")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path)).backend_tokenizer


def _encodable(text: str) -> str:
    """`text` with lone surrogates, which UTF-8 has no bytes for, as question marks. Keeps the length."""
    return text.encode("utf-8", "replace").decode()
