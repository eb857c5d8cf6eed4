"""Requests: what is understood, and which words refuse the rest."""

from __future__ import annotations

import pytest

from dr_jax.endpoint import wire
from dr_jax.endpoint.wire import Conversation, Refused
from dr_jax.records import Sampling

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "find", "arguments": '{"q": 1}'}}


FORCED = {"type": "function", "function": {"name": "find"}}


def chat(**fields):
    return wire.chat({"messages": [USER], **fields}, model="m", context=99)


def completion(**fields):
    return wire.completion({"prompt": "hi", **fields}, model="m")


def test_a_chat_with_everything():
    asked = chat(
        model="m", user="me", max_completion_tokens=7, temperature=0, top_p=0.5, top_k=-1, seed=3, n=2, stop="x",
        stop_token_ids=[5], logprobs=True, top_logprobs=0, stream=True, stream_options={"include_usage": True},
        tools=[TOOL], tool_choice="auto", parallel_tool_calls=False, presence_penalty=0.0, frequency_penalty=None,
        response_format={"type": "text"}, logit_bias={}, return_token_ids=True,
    )  # fmt: skip
    want = Sampling(max_new_tokens=7, temperature=0.0, top_p=0.5, stop_ids=(5,), stop_strings=("x",), seed=3)
    assert asked.sampling == want
    assert (asked.choices, asked.sequences, asked.stream, asked.usage, asked.logprobs) == (2, 2, True, True, True)
    assert (asked.single_call, asked.token_ids, asked.prompts[0].tool_names) == (True, True, {"find"})


@pytest.mark.parametrize(
    ("choice", "forced", "single"),
    [
        ("auto", None, False),
        ("required", "", False),
        ({"type": "function", "function": {"name": "find"}}, "find", True),
    ],
)
def test_a_tool_can_be_forced(choice, forced, single):
    asked = chat(tools=[TOOL], tool_choice=choice)
    assert (asked.prompts[0].forced, asked.single_call) == (forced, single)


def test_what_is_left_out():
    asked, other = chat(), completion()
    assert (asked.sampling.max_new_tokens, other.sampling.max_new_tokens) == (99, 16)
    assert (asked.sampling.temperature, asked.sampling.top_p, asked.sampling.top_k) == (1, 1, 0)
    assert asked.sampling.seed != chat().sampling.seed
    assert not any((asked.stream, asked.logprobs, asked.single_call, other.token_ids, other.prompt_logprobs))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", ("ab",)),
        (["ab", "c"], ("ab", "c")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts(prompt, prompts):
    assert completion(prompt=prompt).prompts == prompts


def test_messages_as_templates_want_them():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": parts, "name": "me"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]
    (conversation,) = chat(messages=messages).prompts
    assert conversation.messages == (
        {"role": "system", "content": "be"},
        {"role": "user", "content": "ab"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": {"q": 1}}}],
        },
        {"role": "tool", "content": "42"},
    )


def test_a_final_message_can_be_continued_and_tools_left_out():
    begun = {"role": "assistant", "content": "<think>"}
    asked = chat(
        messages=[USER, begun], continue_final_message=True, add_generation_prompt=False, tools=[TOOL],
        tool_choice="none", parallel_tool_calls=False,
    )  # fmt: skip
    assert asked.prompts == (Conversation((USER,), (), begun="<think>"),)
    assert not asked.single_call


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (dict(temperature=-1), "temperature", "temperature: got -1; allowed: 0, or 0.001 to 2"),
        (dict(temperature=True), "temperature", "got True"),
        (dict(temperature="0"), "temperature", "got '0'"),
        (dict(top_p=0), "top_p", "allowed: above 0, at most 1"),
        (dict(top_k=-2), "top_k", "allowed: -1 to 2147483647"),
        (dict(top_k=2**31), "top_k", "allowed: -1 to 2147483647"),
        (dict(top_k=1.5), "top_k", "got 1.5"),
        (dict(seed=2**63), "seed", f"{-(2**63)} to {2**63 - 1}"),
        (dict(n=0), "n", "allowed: 1 to 128"),
        (dict(n=129), "n", "allowed: 1 to 128"),
        (dict(stop=["a"] * 5), "stop", "at most 4"),
        (dict(stop=""), "stop", "none of them empty"),
        (dict(stop=7), "stop", "need a string"),
        (dict(stop_token_ids=["a"]), "stop_token_ids", "a list of token ids"),
        (dict(stream="yes"), "stream", "need true or false"),
        (dict(stream_options={"include_usage": True}), "stream_options", "where stream is true"),
        (dict(stream=True, stream_options={"chunks": 1}), "stream_options", "allowed: {'include_usage': true}"),
        (dict(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage", "true or false"),
        (dict(presence_penalty=0.5), "presence_penalty", "got 0.5; allowed: 0"),
        (dict(logit_bias={"1": 5}), "logit_bias", "allowed: {}"),
        (dict(response_format={"type": "json_object"}), "response_format", "allowed: {'type': 'text'}"),
        (dict(tempature=1), "tempature", "no such option here; leave it out"),
    ],
)
@pytest.mark.parametrize("ask", [chat, completion])
def test_what_is_refused_everywhere(ask, fields, param, words):
    with pytest.raises(Refused) as error:
        ask(**fields)
    assert (error.value.status, error.value.param) == (400, param)
    assert words in str(error.value)
    assert error.value.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (dict(max_tokens=0), "max_tokens", "an integer of 1 or more"),
        (dict(max_tokens=1, max_completion_tokens=1), "max_tokens", "not both"),
        (dict(top_logprobs=5, logprobs=True), "top_logprobs", "allowed: 0 (the engine has"),
        (dict(logprobs=1), "logprobs", "need true or false"),
        (dict(tools=[{"type": "web"}]), "tools", "need objects"),
        (dict(tools="find"), "tools", "need objects"),
        (dict(tools=[{"type": "function", "function": {"name": "f", "strict": True}}]), "tools.function.strict", ""),
        (dict(tool_choice="required"), "tool_choice", "allowed: 'auto', 'none', and with tools 'required'"),
        (dict(tool_choice=FORCED), "tool_choice", "allowed: 'auto'"),
        (dict(tools=[TOOL], tool_choice="find"), "tool_choice", "allowed: 'auto'"),
        (dict(tools=[TOOL], tool_choice={**FORCED, "function": {"name": "lose"}}), "tool_choice", "allowed: 'auto'"),
        (dict(messages=[]), "messages", "at least one"),
        (dict(messages=["hi"]), "messages[0]", "need an object"),
        (dict(messages=[{"role": "<|im_end|>", "content": ""}]), "messages[0].role", "allowed: system, user"),
        (dict(messages=[USER, {"role": "user"}]), "messages[1].content", "need text"),
        (dict(messages=[USER | {"audio": 1}]), "messages[0]", "['audio']; no such member"),
        (dict(messages=[USER | {"tool_calls": [CALL]}]), "messages[0].tool_calls", "only the assistant"),
        (
            dict(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}]),
            "messages[0].content",
            "reads text",
        ),
        (
            dict(messages=[{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
            "messages[0].tool_calls",
            "JSON text of an object",
        ),
        (dict(continue_final_message=True, add_generation_prompt=True), "add_generation_prompt", "the opposite"),
        (
            dict(continue_final_message=True, add_generation_prompt=False),
            "continue_final_message",
            "must be the assistant's",
        ),
        (dict(prompt="x"), "prompt", "no such option"),
    ],
)
def test_what_is_refused_of_chats(fields, param, words):
    with pytest.raises(Refused) as error:
        chat(**fields)
    assert error.value.param == param
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (dict(prompt=None), "prompt", "need text"),
        (dict(prompt=[]), "prompt", "need text"),
        (dict(prompt=[1, "a"]), "prompt", "need text"),
        (dict(prompt=[[1], []]), "prompt", "need text"),
        (dict(prompt=[True]), "prompt", "need text"),
        (dict(logprobs=2), "logprobs", "allowed: 0"),
        (dict(prompt_logprobs=1), "prompt_logprobs", "allowed: 0"),
        (dict(prompt_logprobs=0, stream=True), "prompt_logprobs", "not with stream"),
        (dict(echo=True), "echo", "allowed: False"),
        (dict(messages=[USER]), "messages", "no such option"),
    ],
)
def test_what_is_refused_of_completions(fields, param, words):
    with pytest.raises(Refused) as error:
        completion(**fields)
    assert error.value.param == param
    assert words in str(error.value)


def test_another_model_is_not_found():
    with pytest.raises(Refused, match="got 'other'; this server has 'm'") as error:
        chat(model="other")
    assert (error.value.status, error.value.code) == (404, "model_not_found")


@pytest.mark.parametrize("body", [[], "x", None, 3])
def test_a_body_that_is_no_object_is_refused(body):
    with pytest.raises(Refused, match="need a JSON object"):
        wire.completion(body, model="m")
