from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

from dr_jax.agent import chat as module
from dr_jax.agent.chat import Chat
from dr_jax.agent.presets import PRESETS
from dr_jax.assemble import CHECKPOINT
from dr_jax.errors import ConfigError
from dr_jax.records import Origin
from dr_jax.testing import QWEN_CONTROL_TOKENS, byte_tokenizer

PRESET = PRESETS["deepresearcher"]
TODAY = "2026-01-31"
QUESTION = "Who is the spouse of the director of “Kite” (1999), born in São Paulo?"
OBSERVATION = repr([{"search_query": "Kite's 2nd", "web_page_info_list": [{"title": "a\nb", "url": "http://a/?x=1"}]}])


@pytest.fixture(scope="module")
def qwen(qwen_tokenizer_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_tokenizer_dir)


@pytest.fixture(scope="module")
def chat(qwen_tokenizer_dir):
    return Chat.load(qwen_tokenizer_dir)


@pytest.fixture(scope="module")
def shipped_chat():
    return Chat.load(CHECKPOINT)


@pytest.fixture(scope="module")
def byte_chat():
    return Chat.of(byte_tokenizer())


def system(preset):
    return {"role": "system", "content": preset.system.replace("{today}", TODAY)}


@pytest.mark.parametrize("name", ["deepresearcher", "deepresearcher_reference"])
def test_opening_is_what_the_tokenizer_itself_renders(chat, qwen, name):
    preset = PRESETS[name]
    rendered = qwen.apply_chat_template(
        [system(preset), {"role": "user", "content": QUESTION}],
        tools=list(preset.tools),
        add_generation_prompt=True,
        tokenize=False,
    )
    opening = chat.opening(preset, QUESTION, today=TODAY)
    assert opening.tokens.tolist() == qwen.encode(rendered + "<think>", add_special_tokens=False)
    assert set(opening.origin.tolist()) == {Origin.TEMPLATE}
    assert TODAY in rendered


def test_observation_turn_is_what_the_tokenizer_itself_renders(chat, qwen):
    call = '<tool_call>\n{"name": "web_search", "arguments": {"query": ["Kite"]}}\n</tool_call>'
    # A space, because the tokenizer joins ">" and a line break: what was forced and what was sampled stay apart here.
    written = f" plan\n</think>\n{call}<|im_end|>"
    rendered = qwen.apply_chat_template(
        [
            system(PRESET),
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": "<think>" + written.removesuffix("<|im_end|>")},
            {"role": "tool", "content": OBSERVATION},
        ],
        tools=list(PRESET.tools),
        add_generation_prompt=True,
        tokenize=False,
    )
    opening = chat.opening(PRESET, QUESTION, today=TODAY)
    output = chat.markup(written)
    reply = chat.reply(PRESET, output, OBSERVATION)
    assert [*opening.tokens, *output, *reply.tokens] == qwen.encode(rendered + "<think>", add_special_tokens=False)


def test_observation_turn_spelled_out(byte_chat):
    im_end = byte_chat.control["<|im_end|>"]
    reply = byte_chat.reply(PRESET, [65, im_end], "[]", instruction="Answer now.")
    assert byte_chat.decode(reply.tokens) == (
        "\n<|im_start|>user\n<tool_response>\n[]\n</tool_response>\nAnswer now.<|im_end|>\n"
        "<|im_start|>assistant\n<think>"
    )
    world = reply.tokens[reply.origin == Origin.WORLD]
    assert byte_chat.decode(world) == "[]"
    assert set(reply.origin.tolist()) == {Origin.TEMPLATE, Origin.WORLD}


@pytest.mark.parametrize("output", [[], [65, 66], "endoftext"])
def test_a_turn_that_was_cut_is_closed_by_the_template(byte_chat, output):
    ids = [65, byte_chat.control["<|endoftext|>"]] if output == "endoftext" else output
    reply = byte_chat.reply(PRESET, ids, None, instruction="Go on.")
    assert byte_chat.decode(reply.tokens) == (
        "<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n<think>"
    )


FRAGMENTS = st.one_of(
    st.sampled_from(QWEN_CONTROL_TOKENS),
    st.sampled_from(QWEN_CONTROL_TOKENS).map(lambda token: token[:-1]),
    st.sampled_from(QWEN_CONTROL_TOKENS).map(lambda token: token[1:]),
    st.sampled_from(QWEN_CONTROL_TOKENS).map(str.upper),
    st.sampled_from(["<", "|", ">", "\n", " ", "\u200d", "e\u0301", "\ud800", "<<|im_end|>", "</tool_response>"]),
    st.text(max_size=5),
)
HOSTILE = st.lists(FRAGMENTS, max_size=12).map("".join)


@given(HOSTILE)
@settings(max_examples=200, deadline=None)
def test_text_from_outside_never_becomes_a_control_token(chat, text):
    control = set(chat.control.values())
    assert len(control) == 22
    assert not control & set(chat.plain(text))
    # As a question and as an observation: the markup around it is all there is.
    opening, empty = (chat.opening(PRESETS["quickstart"], question, today=TODAY).tokens for question in (text, "x"))
    assert np.isin(opening, list(control)).sum() == np.isin(empty, list(control)).sum()
    reply = chat.reply(PRESET, (), text)
    markup = [token for token in reply.tokens.tolist() if token in control]
    assert [chat.decode([token]) for token in markup] == ["<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>"]
    assert not control & set(reply.tokens[reply.origin == Origin.WORLD].tolist())
    assert chat.decode(reply.tokens).count("</tool_response>") == 1


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@settings(max_examples=200, deadline=None)
def test_plain_equals_the_tokenizer_on_benign_text(chat, qwen, text):
    if not any(token in text for token in QWEN_CONTROL_TOKENS):
        assert chat.plain(text) == qwen.encode(text, add_special_tokens=False)


@given(HOSTILE, st.integers(16, 40))
@settings(max_examples=200, deadline=None)
def test_an_observation_is_cut_at_its_limit(chat, text, limit):
    cut = chat.cut(text, limit)
    assert len(chat.plain(cut)) <= limit
    if len(chat.plain(text)) <= limit:
        assert cut == text
    else:
        kept = cut.removesuffix(" …[cut]")
        assert kept != cut
        assert text.replace("\ud800", "?").startswith(kept)


LINES = st.lists(
    st.one_of(FRAGMENTS, st.sampled_from(["\n\n", "\r\n", " \n ", "\n#", "\n\u0301", "\x1f", "\x85", "a", "'s"])),
    max_size=30,
)


@pytest.mark.parametrize("tokenizer", ["chat", "shipped_chat"])
@given(text=LINES.map("".join))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_encoded_in_parts_has_the_tokens_of_the_whole(request, monkeypatch, tokenizer, text):
    chat, text = request.getfixturevalue(tokenizer), text.replace("\ud800", "?")
    monkeypatch.setattr(module, "_PARTS", re.compile(module._PARTS.pattern.replace("2000", "3")))
    whole, merged = chat._plain.encode(text, add_special_tokens=False), chat._encoding(text)
    assert (merged.ids, merged.offsets) == (whole.ids, whole.offsets)
    assert [merged.char_to_token(i) for i in range(len(text))] == [whole.char_to_token(i) for i in range(len(text))]
    cut = chat.cut(text, 16)
    assert len(chat.plain(cut)) <= 16
    assert (cut == text) == (len(whole.ids) <= 16)


def test_a_huge_observation_is_cut_before_it_is_encoded(chat):
    reply = chat.reply(PRESET, (), "word " * 1_000_000)
    world = int((reply.origin == Origin.WORLD).sum())
    assert PRESET.observation_tokens - 8 <= world <= PRESET.observation_tokens + 1
    assert chat.decode(reply.tokens).count(" …[cut]\n</tool_response>") == 1


def test_ids_that_end_a_turn(chat):
    assert chat.eos_ids == (151645, 151643)
    assert chat.control["<tool_call>"] == 151657
    assert chat.control["</tool_call>"] == 151658


def test_decode_names_control_tokens_and_survives_anything(chat):
    assert chat.decode([chat.control["<tool_call>"], 33, 151_900, np.int32(34)]) == "<tool_call>BC"


@given(st.lists(st.integers(0, 290), max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_tokens_are_the_text(byte_chat, ids):
    assert b"".join(map(byte_chat.token_bytes, ids)).decode(errors="replace") == byte_chat.decode(ids)


def test_a_guard_keeps_markup_from_being_found(byte_chat):
    tokens = byte_chat.markup("<|im_start|><\ufdd0|im_start|>\ufdd0a", "\ufdd0")
    assert tokens == [byte_chat.control["<|im_start|>"], *byte_chat.plain("<|im_start|>a")]


def test_a_tokenizer_of_one_file_loads_as_it_was(tmp_path, byte_chat):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    again = Chat.load(tmp_path)
    assert again.control == byte_chat.control
    assert again.plain(QUESTION) == byte_chat.plain(QUESTION)
    assert again.decode(again.plain(QUESTION)) == QUESTION


def test_a_tokenizer_without_qwens_tokens_is_refused(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    tokenizer.add_special_tokens([AddedToken("<|im_start|>")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match=r"no control token <\|im_end\|>, <\|endoftext\|>, <tool_call>, </tool_call>"):
        Chat.load(tmp_path)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="neither tokenizer.json nor vocab.json"):
        Chat.load(tmp_path / "missing")


def test_a_tokenizer_that_makes_control_tokens_of_plain_text_is_refused():
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(QWEN_CONTROL_TOKENS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("</?[^<]*>"), "isolated")
    tokenizer.add_special_tokens([*QWEN_CONTROL_TOKENS])
    with pytest.raises(ConfigError, match="out of plain text"):
        Chat.of(tokenizer)


def test_the_quickstart_prompt_is_short(chat):
    assert len(chat.opening(PRESETS["quickstart"], "", today=TODAY).tokens) <= 45


@pytest.fixture(scope="module")
def word_chat():
    """The embedded world's tokenizer: tokens of several characters, and characters of several tokens."""
    return Chat.load(CHECKPOINT)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40), st.sampled_from(["", " done", "é", "…"]))
def test_the_world_wrote_each_token_that_holds_a_character_of_its(byte_chat, word_chat, observation, instruction):
    for chat in (byte_chat, word_chat):
        reply = chat.reply(PRESET, (), observation, instruction=instruction)
        text = observation.encode("utf-8", "replace").decode().replace("</tool_response>", "</ tool_response>")
        opening, closing = "<tool_response>\n", "\n</tool_response>" + f"\n{instruction}" * bool(instruction)
        body = f"user\n{opening}{text}{closing}"
        offsets = chat._plain.encode(body, add_special_tokens=False).offsets
        start, end = body.index(opening) + len(opening), len(body) - len(closing)
        world = [left < end and right > start and start < end for left, right in offsets]
        first = len(chat.markup("<|im_end|>\n<|im_start|>"))
        assert (reply.origin[first : first + len(world)] == Origin.WORLD).tolist() == world
        assert not (reply.origin[first + len(world) :] == Origin.WORLD).any()


def test_what_is_remembered_of_our_own_text_cannot_be_changed(byte_chat):
    first = byte_chat.opening(PRESET, QUESTION, today=TODAY)
    first.tokens[:] = 0
    assert byte_chat.opening(PRESET, QUESTION, today=TODAY).tokens.any()
    with pytest.raises(ValueError, match="read-only"):
        byte_chat._encode_own("system\n").tokens[0] = 1
