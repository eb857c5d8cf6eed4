"""The endpoint as OpenAI's own client sees it, over a real socket, with the embedded model behind it."""

from __future__ import annotations

import asyncio
import json
import socket

import aiohttp
import numpy as np
import pytest
from yarl import URL

from dr_jax import serve
from dr_jax.agent.presets import PRESETS
from dr_jax.endpoint import server
from dr_jax.endpoint.server import Limits
from dr_jax.errors import ConfigError
from dr_jax.records import Sampling

openai = pytest.importorskip("openai", reason="OpenAI's client is not installed (pip install -e '.[test]')")

PRESET = PRESETS["quickstart"]
QUESTION = "What is the film Rusted Tunnel's director's birthplace?"
MESSAGES = [{"role": "system", "content": PRESET.system}, {"role": "user", "content": QUESTION}]
# The policy's turns begin with a forced text; whoever wants them says so.
BEGUN = dict(
    messages=[*MESSAGES, {"role": "assistant", "content": PRESET.prefill}],
    extra_body={"continue_final_message": True, "add_generation_prompt": False},
    tools=list(PRESET.tools),
)
LONG = dict(prompt=[5, 6, 7], max_tokens=2000, temperature=2, extra_body={"ignore_eos": True})


@pytest.fixture
async def client(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def http(url):
    async with aiohttp.ClientSession(base_url=url.removesuffix("v1")) as session:
        yield session


@pytest.fixture
def drained(engine, eventually):
    """Waits until the engine serves nobody."""
    return lambda: eventually(lambda: not engine.stats()["serving"] + engine.stats()["waiting"])


async def test_a_chat_is_what_the_engine_says(client, engine, model):
    answer = await client.chat.completions.create(model="world", messages=MESSAGES, temperature=0, max_tokens=30)
    prompt = model.template.tokens(MESSAGES)
    ids = model.template.chat.eos_ids
    sampled = await engine.generate(prompt, Sampling(max_new_tokens=30, temperature=0.0, stop_ids=ids))
    (choice,) = answer.choices
    assert choice.message.content + "<|im_end|>" == model.template.chat.decode(sampled.tokens)
    assert (choice.finish_reason, choice.message.role, choice.message.tool_calls) == ("stop", "assistant", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(sampled.tokens))


async def test_a_research_turn_by_tool_calls(client):
    """Call, observation, answer: a conversation that an agent framework would have."""
    first = await client.chat.completions.create(model="world", temperature=0, **BEGUN)
    (choice,) = first.choices
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "web_search")
    assert json.loads(call.function.arguments) == {"query": ["Rusted Tunnel"]}
    assert choice.message.content.endswith("</think>")
    films = {"Rusted Tunnel": "1941 by the director Dorvel Tallorn", "Rusted Tunnel (remake)": "1998 by Jarvena Danvek"}
    hits = [
        {"quick_summary": f"{name} is a film of the year {of}.", "title": name, "url": f"http://lore.test/{name}"}
        for name, of in films.items()
    ]
    found = repr([{"search_query": "Rusted Tunnel", "web_page_info_list": hits}])
    said = choice.message.to_dict() | {"content": PRESET.prefill + choice.message.content}
    messages = [*MESSAGES, said, {"role": "tool", "tool_call_id": call.id, "content": found}]
    second = await client.chat.completions.create(
        model="world", temperature=0, **BEGUN | {"messages": [*messages, BEGUN["messages"][-1]]}
    )
    assert "Dorvel Tallorn" in (second.choices[0].message.content or str(second.choices[0].message.tool_calls))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "browse_webpage"}}])
async def test_a_tool_that_must_be_called_is_called(client, choice, stream):
    """Without its usual thoughts, and where it would have searched."""
    how = dict(model="world", messages=MESSAGES, tools=BEGUN["tools"], tool_choice=choice, temperature=0)
    answer = await client.chat.completions.create(**how, stream=stream)
    if stream:
        parts = [part async for chunk in answer for part in chunk.choices]
        reason, text = parts[-1].finish_reason, "".join(part.delta.content or "" for part in parts)
        (call,) = [call for part in parts for call in part.delta.tool_calls or []]
    else:
        reason, text = answer.choices[0].finish_reason, answer.choices[0].message.content or ""
        (call,) = answer.choices[0].message.tool_calls
    assert (reason, text) == ("tool_calls", "")
    assert call.function.name == ("browse_webpage" if isinstance(choice, dict) else "web_search")
    assert isinstance(json.loads(call.function.arguments), dict)


async def test_without_tools_the_call_is_text(client):
    left_out = await client.chat.completions.create(model="world", temperature=0, **BEGUN | {"tool_choice": "none"})
    assert left_out.choices[0].message.tool_calls is None
    assert left_out.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("tools", [BEGUN["tools"], openai.omit])
async def test_a_stream_is_the_same_answer_in_pieces(client, tools):
    how = dict(BEGUN, model="world", seed=5, n=2, temperature=0.8, logprobs=True, max_tokens=60, tools=tools)
    whole = await client.chat.completions.create(**how)
    chunks = [
        c
        async for c in await client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 8
    for index, want in enumerate(whole.choices):
        parts = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert parts[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in parts) == (want.message.content or "")
        calls = [call.function for part in parts for call in part.delta.tool_calls or []]
        assert [(c.name, c.arguments) for c in calls] == [
            (c.function.name, c.function.arguments) for c in want.message.tool_calls or []
        ]
        logprobs = [token for part in parts for token in (part.logprobs.content if part.logprobs else [])]
        assert [t.token for t in logprobs] == [t.token for t in want.logprobs.content]
        np.testing.assert_allclose([t.logprob for t in logprobs], [t.logprob for t in want.logprobs.content], atol=1e-4)
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [want.finish_reason]


async def test_tokens_in_tokens_out(client, engine):
    how = Sampling(max_new_tokens=12, temperature=0.7, top_p=0.9, top_k=50, seed=9)
    sampled = await engine.generate([5, 6, 7], how)
    answer = await client.completions.create(
        model="world", prompt=[5, 6, 7], max_tokens=12, temperature=0.7, top_p=0.9, seed=9, logprobs=0,
        extra_body={"top_k": 50, "ignore_eos": True, "return_token_ids": True, "prompt_logprobs": 0},
    )  # fmt: skip
    (choice,) = answer.choices
    assert choice.token_ids == sampled.tokens.tolist()
    assert choice.prompt_token_ids == [5, 6, 7]
    np.testing.assert_allclose(choice.logprobs.token_logprobs, sampled.logps, atol=1e-4)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset[-1] == len(choice.text) - len(choice.logprobs.tokens[-1])
    scored = await engine.score([5], [6, 7])
    assert choice.prompt_logprobs[0] is None
    got = [choice.prompt_logprobs[1]["6"]["logprob"], choice.prompt_logprobs[2]["7"]["logprob"]]
    np.testing.assert_allclose(got, scored, atol=1e-4)
    assert choice.finish_reason == "length"


async def test_token_ids_stream_as_vllm_has_them(client, model):
    """The prompt's once: in a chat's first chunk, in the first of each choice of a completion."""
    how = dict(model="world", max_tokens=20, temperature=0, extra_body={"return_token_ids": True})
    whole = await client.chat.completions.create(messages=MESSAGES, **how)
    chunks = [c async for c in await client.chat.completions.create(messages=MESSAGES, stream=True, **how)]
    assert whole.prompt_token_ids == chunks[0].prompt_token_ids == model.template.tokens(MESSAGES)
    assert not any("prompt_token_ids" in chunk.to_dict() for chunk in chunks[1:])
    assert sum((chunk.choices[0].to_dict().get("token_ids", []) for chunk in chunks), []) == whole.choices[0].token_ids
    chunks = [c async for c in await client.completions.create(prompt=[[5, 6], [7]], stream=True, **how)]
    for index, prompt in enumerate(([5, 6], [7])):
        told = [c.choices[0].to_dict() for c in chunks if c.choices[0].index == index]
        assert [choice["prompt_token_ids"] for choice in told if "prompt_token_ids" in choice] == [prompt]


async def test_several_prompts_and_choices_have_their_own_seeds(client):
    how = dict(model="world", max_tokens=8, seed=3)
    answer = await client.completions.create(prompt=["The film", "The city"], n=2, **how)
    alone = await client.completions.create(prompt="The city", **how)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[2] == alone.choices[0].text
    assert len(set(texts)) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_text_ends_before_a_stop_string(client, stream):
    how = dict(model="world", prompt="The film", temperature=0, max_tokens=40, stream=stream)
    free = await client.completions.create(**how | {"stream": False})
    stop = free.choices[0].text[5:8]
    answer = await client.completions.create(**how, stop=[stop])
    text = "".join([c.choices[0].text async for c in answer]) if stream else answer.choices[0].text
    assert text == free.choices[0].text.partition(stop)[0]


async def test_one_call_a_turn_where_the_client_wants_no_more(client):
    answer = await client.chat.completions.create(
        model="world", temperature=0, parallel_tool_calls=False, logprobs=True, **BEGUN
    )
    assert answer.choices[0].logprobs.content[-1].token == "</tool_call>"
    assert len(answer.choices[0].message.tool_calls) == 1


async def test_models_and_health(client, http):
    assert [card.id async for card in client.models.list()] == ["world"]
    assert (await client.models.retrieve("world")).max_model_len == 2048
    with pytest.raises(openai.NotFoundError, match="got 'other'"):
        await client.models.retrieve("other")
    async with http.get("health") as response:
        assert await response.json() == {"status": "ok", "sequences": 0}


@pytest.mark.parametrize(
    ("error", "fields", "words"),
    [
        (openai.BadRequestError, dict(temperature=9), "temperature: got 9"),
        (openai.NotFoundError, dict(model="gpt-4"), "this server has 'world'"),
        (openai.BadRequestError, dict(messages=[{"role": "user", "content": "word " * 3000}]), "allowed: 1 to 2047"),
        (openai.BadRequestError, dict(tools=[{"type": "function", "function": {"name": "f"}}]), "cannot render"),
        (openai.BadRequestError, dict(extra_body={"stop_token_ids": [5000]}), "stop_ids: [5000]"),
        (openai.BadRequestError, dict(n=100), "draws 64 at most"),
        (openai.BadRequestError, dict(stream=True, extra_body={"stop_token_ids": [5000]}), "stop_ids: [5000]"),
    ],
)
async def test_mistakes_have_openais_form(model, error, fields, words):
    async with server.serve(model, limits=Limits(sequences=64)) as url:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            with pytest.raises(error) as raised:
                await client.chat.completions.create(**dict(model="world", messages=MESSAGES) | fields)
    assert words in raised.value.body["message"]
    assert raised.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "words"),
    [
        ("POST", "v1/completions", dict(data=b"{", headers={"Content-Type": "application/json"}), 400, "not JSON"),
        ("POST", "v1/completions", dict(data=b"[" * 9999, headers={"Content-Type": "application/json"}), 400, "JSON"),
        (
            "POST",
            "v1/completions",
            dict(data=b'{"seed":NaN}', headers={"Content-Type": "application/json"}),
            400,
            "NaN",
        ),
        (
            "POST",
            "v1/completions",
            dict(data=b"{}", headers={"Content-Type": "text/plain"}),
            415,
            "allowed: application",
        ),
        ("POST", "v1/completions", dict(json={"prompt": []}), 400, "need text"),
        ("POST", "v1/completions", dict(json={"prompt": "x" * 2**20}), 413, "Too Large"),
        ("GET", "v1/completions", {}, 405, "Not Allowed"),
        ("GET", "v1/embeddings", {}, 404, "Not Found"),
        ("GET", "v1/models", dict(headers={"Host": "lore.example"}), 403, "got 'lore.example'"),
        ("GET", "v1/models", dict(headers={"Host": "["}), 403, "got ''"),
        ("GET", "v1/models", dict(headers={"Host": "127.0.0.1.lore.example:80"}), 403, "allowed: localhost"),
    ],
)
async def test_what_a_client_can_get_wrong_below_json(model, method, path, sent, status, words):
    async with server.serve(model, limits=Limits(body_bytes=2**20)) as url, aiohttp.ClientSession() as session:
        async with session.request(method, url.removesuffix("v1") + path, **sent) as response:
            assert response.status == status
            assert words in (await response.json())["error"]["message"]


async def test_a_body_that_does_not_come_is_not_waited_for(model):
    async with server.serve(model, limits=Limits(read_s=0.05)) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", URL(url).port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        writer.write(b"Content-Length: 99\r\n\r\n{")
        assert b" 408 " in await reader.readline()
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_leaves_a_stream_frees_its_slots(client, engine, drained):
    before = engine.stats()["tokens_drawn"]
    stream = await client.completions.create(model="world", stream=True, n=6, **LONG)
    async for _ in stream:
        break
    await stream.close()
    await drained()
    assert engine.stats()["tokens_drawn"] - before < 6 * 2000


async def test_a_client_that_leaves_before_its_answer_frees_its_slots(client, engine, drained, eventually):
    before = engine.stats()["tokens_drawn"]
    task = asyncio.create_task(client.completions.create(model="world", n=6, **LONG))
    await eventually(lambda: engine.stats()["tokens_drawn"] > before)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await drained()
    assert engine.stats()["tokens_drawn"] - before < 6 * 2000


async def test_a_client_that_does_not_read_is_let_go(model, engine, eventually):
    body = {"prompt": [5, 6, 7], "max_tokens": 2000, "temperature": 2, "ignore_eos": True, "stream": True}
    sent = json.dumps(body | {"n": 4, "logprobs": 0, "return_token_ids": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(sent)}\r\n"
    async with server.serve(model, limits=Limits(write_s=0.1)) as url, aiohttp.ClientSession() as session:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)  # or the kernel would take it all
            client.connect(("127.0.0.1", URL(url).port))
            client.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + sent)
            await eventually(lambda: engine.stats()["serving"])
            async with asyncio.timeout(30):
                under_way = 4
                while under_way:
                    async with session.get(URL(url).with_path("/health")) as response:
                        under_way = (await response.json())["sequences"]
            received = b"".join(await asyncio.to_thread(lambda: [*iter(lambda: client.recv(65536), b"")]))
    assert b"data: " in received
    assert b"[DONE]" not in received


async def test_a_full_server_says_when_to_come_again(model, drained):
    async with server.serve(model, limits=Limits(sequences=2)) as url:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            stream = await client.completions.create(model="world", stream=True, n=2, **LONG)
            async for _ in stream:
                break
            with pytest.raises(openai.RateLimitError, match="2 sequences are under way") as raised:
                await client.completions.create(model="world", prompt="x")
            assert raised.value.response.headers["Retry-After"] == "1"
            await stream.close()
            await drained()
            async with asyncio.timeout(10):  # the place is given back when the server has noticed
                while True:
                    try:
                        await client.completions.create(model="world", prompt="x")
                    except openai.RateLimitError:
                        await asyncio.sleep(0.01)
                    else:
                        break


async def test_a_key_is_asked_for(model):
    async with server.serve(model, api_key="sesame") as url:
        for key, works in (("sesame", True), ("Sesame", False), ("", False)):
            async with openai.AsyncOpenAI(base_url=url, api_key=key or "none", max_retries=0) as client:
                if works:
                    assert [card.id async for card in client.models.list()] == ["world"]
                else:
                    with pytest.raises(openai.AuthenticationError, match="Authorization"):
                        await client.models.list()
        async with aiohttp.ClientSession() as session, session.get(url.removesuffix("v1") + "health") as response:
            assert response.status == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
async def test_no_address_that_others_reach_without_a_key(model, host):
    with pytest.raises(ConfigError, match="can be reached by others"):
        async with server.serve(model, host=host):
            pass


async def test_an_address_that_is_taken_is_named(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1:\d+: .*in use"):
            async with server.serve(model, port=taken.getsockname()[1]):
                pass


async def test_an_engine_that_is_gone_is_the_servers_fault():
    engine, model = serve.load("world", slots=4)
    async with server.serve(model) as url, aiohttp.ClientSession() as session:
        await asyncio.to_thread(engine.close)
        async with session.get(url.removesuffix("v1") + "health") as response:
            assert (response.status, (await response.json())["detail"]) == (503, "engine: closed")
        for stream in (False, True):
            async with session.post(url + "/completions", json={"prompt": "x", "stream": stream}) as response:
                error = (await response.json())["error"]
            assert (response.status, error["type"], error["message"]) == (500, "server_error", "engine: closed")
