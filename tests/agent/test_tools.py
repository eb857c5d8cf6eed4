from __future__ import annotations

import ast
import asyncio
import dataclasses
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dr_jax.agent.chat import Chat
from dr_jax.agent.presets import PRESETS
from dr_jax.agent.reader import ExtractiveReader
from dr_jax.agent.tools import Answer, Malformed, Toolbox, ToolCall, parse_turn
from dr_jax.records import Failure, FailureKind, Hit, Page
from dr_jax.testing import QWEN_CONTROL_TOKENS, TinyWeb, byte_tokenizer

PRESET = PRESETS["deepresearcher"]
CHAT = Chat.of(byte_tokenizer())


def parse(text: str):
    return parse_turn(CHAT.markup(text), CHAT, PRESET)


def call(arguments, name="web_search") -> str:
    return f"</think><tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call><|im_end|>"


def payload(text: str) -> str:
    return f"x</think>\n<tool_call>\n{text}\n</tool_call><|im_end|>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x</think><answer> Paris\n</answer><|im_end|>", Answer("Paris")),
        ("x</think><answer></answer>", Answer("")),
        ("x</think><answer>Lyon</answer><answer>Paris</answer>", Answer("Lyon")),
        ("x<answer>Paris</answer></think>", Answer("Paris")),
        (f"{call({'query': ['a']})}<answer>Paris</answer>", Answer("Paris")),
        (call({"query": ["a", "b"]}), ToolCall("web_search", ("a", "b"))),
        (call({"query": []}), ToolCall("web_search", ())),
        (call({"query": ["a"], "extra": 1}), ToolCall("web_search", ("a",))),
        (call({"url_list": ["http://a"]}, "browse_webpage"), ToolCall("browse_webpage", ("http://a",))),
        (call({"query": ["a"]}) + call({"query": ["b"]}), ToolCall("web_search", ("a",))),
        (call({"query": [str(i) for i in range(500)]}), ToolCall("web_search", ("0", "1", "2"))),
        (call({"url_list": list("abcdefg")}, "browse_webpage"), ToolCall("browse_webpage", tuple("abcde"))),
        (call({"query": ["\ud800"]}), ToolCall("web_search", ("\ud800",))),
    ],
)
def test_a_turn_that_says_something(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no closed <think>"),
        ("Paris", "no closed <think>"),
        ("x<answer>Paris</answer>", "no closed <think>"),
        ("x</think>Paris", "neither"),
        ("x</think><answer>Paris", "<answer> is not closed"),
        ('x</think><tool_call>{"name"', "neither"),
        ("x</think></tool_call>{}<tool_call>", "neither"),
        (payload(""), "not JSON"),
        (payload("web_search(a)"), "not JSON"),
        (payload('{"name": "web_search", "arguments": {"query": ["a"]}} trailing'), "not JSON"),
        (payload("{'name': 'web_search', 'arguments': {'query': ['a']}}"), "not JSON"),
        (payload("[" * 16_000), "not JSON"),
        (payload('{"name": "web_search", "arguments": {"query": ["a"]}, "n": ' + "9" * 5000 + "}"), "not JSON"),
        (payload('{"name": "web_search", "arguments": {"query": ["a"]}, "n": NaN}'), "NaN is not JSON"),
        (payload('{"name": "web_search", "arguments": {"query": ["a"]}, "n": -Infinity}'), "Infinity is not JSON"),
        (payload('{"name": "web_search", "arguments": {"query": ["a"], "query": ["b"]}}'), "duplicate key"),
        (payload(json.dumps({"name": "web_search", "arguments": {"query": ["a" * 20_000]}})), "longer than"),
        (payload("[1]"), "a call is an object"),
        (payload("null"), "a call is an object"),
        (payload('{"name": "web_search"}'), "a call is an object"),
        (payload('{"name": "web_search", "arguments": ["a"]}'), "a call is an object"),
        (call({"query": ["a"]}, "web_browse"), "unknown tool"),
        (call({"query": ["a"]}, ["web_search"]), "unknown tool"),
        (call({"query": ["a"]}, {}), "unknown tool"),
        (call({"url_list": ["a"]}), "query is not a list of strings"),
        (call({"query": "a"}), "query is not a list of strings"),
        (call({"query": ["a", 1]}), "query is not a list of strings"),
        (call({"query": None}), "query is not a list of strings"),
        (call({"url_list": []}, "browse_webpage"), "url_list is empty"),
        (call({"query": ["a"]}, "browse_webpage"), "url_list is not a list of strings"),
    ],
)
def test_a_turn_that_says_nothing_valid(text, reason):
    turn = parse(text)
    assert isinstance(turn, Malformed)
    assert reason in turn.reason


def test_only_the_control_id_opens_a_call():
    typed = CHAT.plain(call({"query": ["a"]}))
    assert CHAT.decode(typed) == call({"query": ["a"]})
    assert isinstance(parse_turn(typed, CHAT, PRESET), Malformed)


def test_a_typed_closing_tag_does_not_close_a_call():
    ids = [*CHAT.markup("</think><tool_call>"), *CHAT.plain('{"name": "</tool_call>"}'), *CHAT.markup("</tool_call>")]
    assert parse_turn(ids, CHAT, PRESET) == Malformed("a call is an object with name and arguments")


def test_a_preset_with_one_tool_knows_only_that():
    search_only = dataclasses.replace(PRESET, tools=PRESET.tools[:1])
    ids = CHAT.markup(call({"url_list": ["http://a"]}, "browse_webpage"))
    assert parse_turn(ids, CHAT, search_only) == Malformed("unknown tool")


TOP_K = PRESETS["deepresearcher_top_k"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"query": ["a", "b"], "top_k": [3, 7]}, ToolCall("web_search", ("a", "b"), (3, 7))),
        ({"query": ["a", "b"], "top_k": [0, 10**30]}, ToolCall("web_search", ("a", "b"), (1, 20))),
        ({"query": list("abcd"), "top_k": [-1, 2, 3, 4]}, ToolCall("web_search", ("a", "b", "c"), (1, 2, 3))),
        ({"query": [], "top_k": []}, ToolCall("web_search", ())),
        ({"query": ["a"], "top_k": None}, ToolCall("web_search", ("a",))),
        ({"query": ["a"]}, ToolCall("web_search", ("a",))),
    ],
)
def test_how_many_results_each_query_returns(arguments, expected):
    assert parse_turn(CHAT.markup(call(arguments)), CHAT, TOP_K) == expected


@pytest.mark.parametrize("top_k", [5, "5", ["5"], [5.0], [True], [None], [], [5, 5], {"a": 5}, [[5]]])
def test_a_number_of_results_that_is_none_is_malformed_where_it_is_offered(top_k):
    ids = CHAT.markup(call({"query": ["a"], "top_k": top_k}))
    assert parse_turn(ids, CHAT, TOP_K) == Malformed("top_k is not a list of whole numbers, one for each query")
    assert parse_turn(ids, CHAT, PRESET) == ToolCall("web_search", ("a",))  # any other argument, where it is not


PIECES = st.sampled_from([
    *QWEN_CONTROL_TOKENS, "</think>", "<answer>", "</answer>", '{"name": "web_search", "arguments": ',
    '{"query": ["a"]}}', "[", "]", "{", "}", '"', ",", ":", "\\ud800", "\\", "1e999", "NaN", "null", "é",
])  # fmt: skip


@given(st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=30).map("".join))
@settings(max_examples=200, deadline=None)
def test_parsing_never_raises(text):
    assert isinstance(parse("</think><tool_call>" + text), Answer | ToolCall | Malformed)
    assert isinstance(parse(text), Answer | ToolCall | Malformed)


@given(st.lists(st.integers(0, 300), max_size=60))
@settings(max_examples=200, deadline=None)
def test_parsing_bears_any_ids(ids):
    assert isinstance(parse_turn(ids, CHAT, PRESET), Answer | ToolCall | Malformed)


KITE = Page("http://a", "Kite", ("Kite is a film.", "Ann Lee is the director of Kite."))
WEB = {"http://a": KITE, "http://gone": Failure(FailureKind.STATUS, status=404)}


def toolbox(web, preset=PRESET, searcher=None):
    return Toolbox(
        "Who is the director of Kite?", preset, searcher=searcher or web, browser=web, reader=ExtractiveReader(),
        clock=time.monotonic,
    )  # fmt: skip


def search(*queries):
    return ToolCall("web_search", queries)


def browse(*urls):
    return ToolCall("browse_webpage", urls)


async def test_search_prints_what_the_reference_prints():
    use = await toolbox(TinyWeb(WEB)).use(search("kite", "nothing of the kind"))
    # Python's repr of a list with keys in alphabetical order; nothing found is an honest empty list.
    assert use.observation == (
        "[{'search_query': 'kite', 'web_page_info_list': [{'quick_summary': "
        "'Kite is a film. Ann Lee is the director of Kite.', 'title': 'Kite', 'url': 'http://a'}]}, "
        "{'search_query': 'nothing of the kind', 'web_page_info_list': []}]"
    )
    assert use.tool == "web_search"
    assert use.arguments == {"query": ["kite", "nothing of the kind"]}
    assert use.failures == ()


async def test_browse_prints_what_the_reference_prints():
    tools = toolbox(TinyWeb(WEB))
    await tools.use(search("kite"))
    use = await tools.use(browse("http://a"))
    assert use.observation == (
        "[{'information': [{'page_number': 1, 'page_summary': 'Ann Lee is the director of Kite.'}], 'url': 'http://a'}]"
    )
    assert use.failures == ()


async def test_a_page_tells_nothing_twice():
    tools = toolbox(TinyWeb(WEB))
    await tools.use(search("kite"))
    use = await tools.use(browse("http://a", "http://a"))
    assert use.observation.count("Ann Lee") == 1
    again = await tools.use(browse("http://a"))
    assert "Ann Lee" not in again.observation


async def test_a_url_that_no_search_returned_is_not_fetched():
    web = TinyWeb(WEB)
    tools = toolbox(web)
    before = await tools.use(browse("http://a"))
    assert before.observation == "[{'error': 'not_in_results', 'information': [], 'url': 'http://a'}]"
    await tools.use(search("kite"))
    use = await tools.use(browse("http://evil.example/", "file:///etc/passwd", "http://a/", "\ud800", ""))
    assert [failure.kind for failure in use.failures] == [FailureKind.NOT_IN_RESULTS] * 5
    assert web.requests == ["kite"]


@pytest.mark.parametrize(("admitted", "readable"), [("last_search", False), ("all_searches", True)])
async def test_whose_results_may_be_browsed(admitted, readable):
    tools = toolbox(TinyWeb(WEB), dataclasses.replace(PRESET, admitted=admitted))
    await tools.use(search("kite"))
    await tools.use(search("gone"))
    use = await tools.use(browse("http://a"))
    assert ("Ann Lee" in use.observation) is readable
    assert bool(use.failures) is not readable


async def test_a_failure_is_named_and_the_rest_goes_on():
    tools = toolbox(TinyWeb(WEB))
    await tools.use(search("kite", "gone"))
    use = await tools.use(browse("http://gone", "http://a"))
    assert use.observation.startswith("[{'error': 'status', 'information': [], 'url': 'http://gone'}, {'information': ")
    assert use.failures == (Failure(FailureKind.STATUS, status=404),)
    assert not use.failures[0].infrastructure


async def test_a_dead_provider_is_not_an_empty_result():
    failure = Failure(FailureKind.RATE_LIMITED, status=429)
    use = await toolbox(TinyWeb(WEB, search_failure=failure)).use(search("kite"))
    assert use.observation == "[{'error': 'rate_limited', 'search_query': 'kite', 'web_page_info_list': []}]"
    assert use.failures == (failure,)


@pytest.mark.parametrize("query", ["", " \n", "a" * 2049, "a" * 1_000_000, "\ud800"])
async def test_a_query_that_cannot_be_sent_is_not_sent(query):
    web = TinyWeb(WEB)
    use = await toolbox(web).use(search("kite", query))
    assert [failure.kind for failure in use.failures] == [FailureKind.BAD_REQUEST]
    assert web.requests == ["kite"]
    assert len(CHAT.plain(use.observation)) < 3000


async def test_each_query_returns_as_many_results_as_it_asked_for():
    web = TinyWeb({f"http://{i}": Page(f"http://{i}", "kite", ("kite",)) for i in range(30)})
    use = await toolbox(web, TOP_K).use(ToolCall("web_search", ("kite", "kite", "kite"), (1, 20, 4)))
    found = ast.literal_eval(use.observation)
    assert [len(one["web_page_info_list"]) for one in found] == [1, 20, 4]
    assert use.arguments == {"query": ["kite"] * 3, "top_k": [1, 20, 4]}
    use = await toolbox(web, TOP_K).use(search("kite"))
    assert len(ast.literal_eval(use.observation)[0]["web_page_info_list"]) == TOP_K.search_top_k


async def test_a_page_named_twice_is_read_once():
    web = TinyWeb(WEB)
    tools = toolbox(web)
    await tools.use(search("kite"))
    use = await tools.use(browse("http://a", "http://gone", "http://a", "http://gone"))
    assert web.requests == ["kite", "http://a"]
    assert [one["url"] for one in ast.literal_eval(use.observation)] == ["http://a", "http://gone"] * 2
    assert [failure.kind for failure in use.failures] == [FailureKind.NOT_IN_RESULTS] * 2


async def test_a_call_without_queries_observes_an_empty_list():
    assert (await toolbox(TinyWeb(WEB)).use(search())).observation == "[]"


class Rendezvous:
    """A searcher that answers no query before all of them have come, and then the last one first."""

    def __init__(self, parties: int) -> None:
        self._barrier = asyncio.Barrier(parties)

    async def search(self, query: str, *, top_k: int) -> tuple[Hit, ...]:
        place = await self._barrier.wait()
        for _ in range(10 * place):
            await asyncio.sleep(0)
        return (Hit(query.upper(), f"http://{query}", ""),)


async def test_the_items_of_a_call_run_at_once_and_come_back_in_order():
    use = await toolbox(TinyWeb({}), searcher=Rendezvous(3)).use(search("a", "b", "c"))
    assert [use.observation.index(title) for title in ("'A'", "'B'", "'C'")] == sorted(
        use.observation.index(title) for title in ("'A'", "'B'", "'C'")
    )


async def test_cancelling_a_call_cancels_its_items():
    stuck = Rendezvous(4)
    running = asyncio.create_task(toolbox(TinyWeb({}), searcher=stuck).use(search("a", "b", "c")))
    await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert stuck._barrier.n_waiting == 0
