"""What a client reads of a turn while it is drawn: whole characters, stop strings, tool calls; nothing is lost."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.agent.chat import Chat
from dr_jax.endpoint.turn import FunctionCall, TurnReader, opening
from dr_jax.testing import byte_tokenizer

CHAT = Chat.of(byte_tokenizer())
IM_END = CHAT.control["<|im_end|>"]
CALL = '<tool_call>\n{"name": "find", "arguments": {"q": ["a"]}}\n</tool_call>'
FOUND = FunctionCall("find", '{"q": ["a"]}')


def read(ids, *, tools=(), stops=(), stop_ids=(IM_END,), step: int = 1000):
    """Pieces, text that belongs together joined."""
    reader = TurnReader(CHAT, tools=tools, stops=stops, stop_ids=stop_ids)
    pieces = [piece for start in range(0, len(ids), step) for piece in reader.feed(ids[start : start + step])]
    joined = []
    for piece in [*pieces, *reader.end()]:
        assert piece
        if joined and isinstance(piece, str) and isinstance(joined[-1], str):
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


@given(st.lists(st.integers(0, 290), max_size=40), st.integers(1, 5))
@settings(max_examples=300, deadline=None)
def test_without_tools_the_text_is_what_the_tokenizer_decodes(ids, step):
    assert "".join(read(ids, stop_ids=(), step=step)) == CHAT.decode(ids)


@given(st.text(max_size=20), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_every_piece_is_whole_characters(text, step):
    ids = CHAT.plain(text)
    reader = TurnReader(CHAT, tools=(), stops=(), stop_ids=())
    pieces = [piece for start in range(0, len(ids), step) for piece in reader.feed(ids[start : start + step])]
    assert "�" not in "".join(pieces) or "�" in text
    assert "".join([*pieces, *reader.end()]) == CHAT.decode(ids)


@pytest.mark.parametrize(("tool", "drawn"), [("find", ' {"q": ["a"]}}\n</tool_call>'), ("", CALL.partition(":")[2])])
def test_a_call_that_was_opened_for_the_model_is_a_call(tool, drawn):
    assert read([*opening(CHAT, tool), *CHAT.markup(drawn), IM_END], tools={"find"}) == [FOUND]


def test_a_character_that_is_not_finished_is_marked():
    assert read(CHAT.plain("aé")[:-1]) == ["a�"]


@pytest.mark.parametrize("step", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"why\n{CALL}<|im_end|>", ["why", FOUND]),
        (f"{CALL}\n{CALL}<|im_end|>", [FOUND, FOUND]),
        (f"{CALL}\nthen<|im_end|>", [FOUND, "\nthen"]),
        ("no call \n<|im_end|>", ["no call \n"]),
        (CALL.removesuffix("</tool_call>"), [CALL.removesuffix("</tool_call>")]),
        (CALL.replace("find", "other"), [CALL.replace("find", "other")]),
        (CALL.replace('"a"', "NaN"), [CALL.replace('"a"', "NaN")]),
        (f"a {CALL[:-13]},</tool_call> b", [f"a {CALL[:-13]},</tool_call> b"]),
        (f"{CALL[:-13]}, {CALL}", [f"{CALL[:-13]}, {CALL}"]),
        ("</tool_call>", ["</tool_call>"]),
    ],
)
def test_a_call_is_strict_json_between_control_tokens(text, want, step):
    assert read(CHAT.markup(text), tools=("find",), step=step) == want


def test_the_tag_spelled_in_ordinary_tokens_is_text():
    assert read(CHAT.plain(CALL), tools=("find",)) == [CALL]


def test_without_tools_a_call_is_text():
    assert read(CHAT.markup(f"{CALL}<|im_end|>")) == [CALL]


@pytest.mark.parametrize("step", [1, 3, 1000])
@pytest.mark.parametrize("tools", [(), ("find",)])
@pytest.mark.parametrize(
    ("text", "stops", "want"),
    [
        ("one STOP two", ["STOP"], "one "),
        ("one STO", ["STOP"], "one STO"),
        ("STSTOP", ["STOP"], "ST"),
        ("abcde", ["cd", "bcd"], "a"),
        ("é€é.", ["€é"], "é"),
        (CALL, ['"name"'], "<tool_call>\n{"),  # the sampler stops there: the call is never closed
    ],
)
def test_text_ends_before_the_first_stop_string(text, stops, want, tools, step):
    ids = CHAT.markup(text)
    if text is CALL:
        ids = ids[: -len(CHAT.markup(CALL.partition('"name"')[2]))]
    assert "".join(read(ids, stops=stops, tools=tools, step=step)) == want


def test_only_what_could_begin_a_stop_string_is_held_back():
    reader = TurnReader(CHAT, tools=(), stops=["\n\nQ:"], stop_ids=())
    assert [reader.feed(CHAT.plain(text)) for text in ("ab", "\n", "c\n", "\n", "Qx")] == [
        ["ab"], [], ["\nc"], [], ["\n\nQx"],
    ]  # fmt: skip
