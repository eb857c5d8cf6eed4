"""What the policy asks of the world: its turn parsed, its call carried out within limits, the result put into words.

Nothing here raises for anything the policy writes or the world does: a turn is an `Answer`, a `ToolCall` or
`Malformed`, and what fails outside becomes an observation that names the failure.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from dr_jax.agent.chat import Chat
from dr_jax.agent.presets import Preset
from dr_jax.interfaces import Browser, Reader, Searcher
from dr_jax.records import Failure, FailureKind, Hit, ToolUse

_MAX_CALL_CHARS = 16_384
_MAX_QUERY_CHARS = 2048
_ARGUMENT = {"web_search": "query", "browse_webpage": "url_list"}  # each tool takes one list of strings
_MIN_ITEMS = {"web_search": 0, "browse_webpage": 1}  # as the reference accepts them


@dataclasses.dataclass(frozen=True)
class Answer:
    """The policy's final word."""

    text: str


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A well-formed request: `items` are queries or URLs, already cut to the preset's number."""

    tool: str
    items: tuple[str, ...]
    top_k: tuple[int, ...] = ()  # results of each query, within the preset's cap; () = as the preset has it


@dataclasses.dataclass(frozen=True)
class Malformed:
    """A turn that is neither a valid call nor an answer, and why."""

    reason: str


def parse_turn(output: Sequence[int] | np.ndarray, chat: Chat, preset: Preset) -> Answer | ToolCall | Malformed:
    """What the policy asked for with the tokens `output`.

    An `<answer>` wins over a tool call; of several calls or answers the first counts. A tool call opens and closes with
    control ids: the same tag spelled in ordinary tokens is only text. Its JSON is read strictly and never repaired.
    *Differs from the reference*: NaN, duplicate keys and items that are not strings are malformed too. So is, where the
    preset offers it, a `top_k` that is not a list of whole numbers, one for each query; a number out of range counts as
    the nearest one in it.
    """
    ids = [int(id) for id in output]
    text = preset.prefill + chat.decode(ids)
    if "<think>" not in text or "</think>" not in text:
        return Malformed("no closed <think>")
    if "<answer>" in text:
        answer, closing, _ = text.partition("<answer>")[2].partition("</answer>")
        return Answer(answer.strip()) if closing else Malformed("<answer> is not closed")
    payload = _between(ids, chat.control["<tool_call>"], chat.control["</tool_call>"])
    if payload is None:
        return Malformed("neither a closed <tool_call> nor an <answer>")
    return _parse_call(chat.decode(payload), preset)


def _between(ids: list[int], opening: int, closing: int) -> list[int] | None:
    if opening not in ids:
        return None
    start = ids.index(opening) + 1
    return ids[start : ids.index(closing, start)] if closing in ids[start:] else None


def _parse_call(text: str, preset: Preset) -> ToolCall | Malformed:
    if len(text) > _MAX_CALL_CHARS:
        return Malformed(f"call longer than {_MAX_CALL_CHARS} characters")
    try:
        call = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        return Malformed(f"not JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return Malformed("a call is an object with name and arguments")
    name = call.get("name")
    if name not in [schema["function"]["name"] for schema in preset.tools]:
        return Malformed("unknown tool")
    items = call["arguments"].get(_ARGUMENT[name])
    if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
        return Malformed(f"{_ARGUMENT[name]} is not a list of strings")
    if len(items) < _MIN_ITEMS[name]:
        return Malformed(f"{_ARGUMENT[name]} is empty")
    if name == "browse_webpage":
        return ToolCall(name, tuple(items[: preset.max_urls]))
    top_k = call["arguments"].get("top_k") if preset.max_top_k else None
    if top_k is None:
        return ToolCall(name, tuple(items[: preset.max_queries]))
    if not isinstance(top_k, list) or len(top_k) != len(items) or not all(type(count) is int for count in top_k):
        return Malformed("top_k is not a list of whole numbers, one for each query")
    counts = (min(max(count, 1), preset.max_top_k) for count in top_k[: preset.max_queries])
    return ToolCall(name, tuple(items[: preset.max_queries]), tuple(counts))


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("duplicate key")
    return members


@dataclasses.dataclass(frozen=True)
class Found:
    """What one item of a call came to: an entry of the observation, or one that names the failure."""

    entry: dict[str, Any]  # keys in alphabetical order, as the reference prints them
    failure: Failure | None = None


class Toolbox:
    """The tools of one episode. Remembers which URLs its searches returned and what it has read; closes nothing."""

    def __init__(
        self,
        question: str,
        preset: Preset,
        *,
        searcher: Searcher,
        browser: Browser,
        reader: Reader,
        clock: Callable[[], float],
    ) -> None:
        self._question = question
        self._preset = preset
        self._searcher = searcher
        self._browser = browser
        self._reader = reader
        self._clock = clock
        self._admitted: dict[str, str] = {}  # URL -> the query that found it
        self._notes: list[str] = []

    async def use(self, call: ToolCall) -> ToolUse:
        """Carries out `call`: its items at once, their results in the order of the request.

        *Differs from the reference*: only the queries that are answered are sent; a URL found by two queries is read
        once; a failure is named in its entry instead of looking like an empty result.
        """
        started_s = self._clock()
        found = await (self._search(call) if call.tool == "web_search" else self._browse(call.items))
        top_k = {"top_k": list(call.top_k)} if call.top_k else {}
        return ToolUse(
            tool=call.tool,
            arguments={_ARGUMENT[call.tool]: list(call.items), **top_k},
            failures=tuple(one.failure for one in found if one.failure),
            seconds=self._clock() - started_s,
            observation=repr([one.entry for one in found]),
        )

    async def _search(self, call: ToolCall) -> list[Found]:
        queries, counts = call.items, call.top_k or (self._preset.search_top_k,) * len(call.items)
        results = await _at_once(lambda asked: self._search_one(*asked), list(zip(queries, counts, strict=True)))
        if self._preset.admitted == "last_search":
            self._admitted.clear()
        for query, result in zip(queries, results, strict=True):
            for hit in () if isinstance(result, Failure) else result:
                self._admitted.setdefault(hit.url, query)
        return [_search_entry(query, result) for query, result in zip(queries, results, strict=True)]

    async def _search_one(self, query: str, top_k: int) -> tuple[Hit, ...] | Failure:
        if not query.strip() or len(query) > _MAX_QUERY_CHARS or not _is_unicode(query):
            return Failure(FailureKind.BAD_REQUEST, "a query is text of 1 to 2048 characters")
        return await self._searcher.search(query, top_k=top_k)

    async def _browse(self, urls: Sequence[str]) -> list[Found]:
        known = tuple(self._notes)  # the same for all pages of a call, whichever comes first
        once = list(dict.fromkeys(urls))  # a page that is named twice is read once
        pages = dict(zip(once, await _at_once(lambda url: self._browse_one(url, known), once), strict=True))
        found = []
        for url, result in ((url, pages[url]) for url in urls):
            if isinstance(result, Failure):
                found.append(Found({"error": str(result.kind), "information": [], "url": url}, result))
                continue
            new = [(segment, text) for segment, text in result if text not in self._notes]
            self._notes.extend(text for _, text in new)
            information = [{"page_number": segment, "page_summary": text} for segment, text in new]
            found.append(Found({"information": information, "url": url}))
        return found

    async def _browse_one(self, url: str, known: Sequence[str]) -> tuple[tuple[int, str], ...] | Failure:
        if url not in self._admitted:
            return Failure(FailureKind.NOT_IN_RESULTS)
        page = await self._browser.browse(url)
        if isinstance(page, Failure):
            return page
        return await self._reader.read(page, question=self._question, query=self._admitted[url], notes=known)


def _search_entry(query: str, result: tuple[Hit, ...] | Failure) -> Found:
    shown = query[:_MAX_QUERY_CHARS]
    if isinstance(result, Failure):
        return Found({"error": str(result.kind), "search_query": shown, "web_page_info_list": []}, result)
    pages = [{"quick_summary": hit.snippet, "title": hit.title, "url": hit.url} for hit in result]
    return Found({"search_query": shown, "web_page_info_list": pages})


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


async def _at_once(one: Callable[[Any], Coroutine[Any, Any, Any]], items: Sequence[Any]) -> list[Any]:
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(one(item)) for item in items]
    return [task.result() for task in running]
