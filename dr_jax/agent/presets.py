"""Presets: everything about an episode that is data. A config names a row of `PRESETS`.

The system texts are our own; the grammar (tags, JSON shapes, limits) is that of DeepResearcher.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, Literal

from dr_jax.errors import ConfigError
from dr_jax.task.rewards import REWARDS

# What Qwen2.5's chat template writes after the system text where tools are given: the model was trained on this.
_QWEN_TOOLS_SECTION = (
    "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>{schemas}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """How an episode is prompted, parsed, limited and rewarded."""

    name: str
    system: str  # `{today}` becomes the run's date
    tools: tuple[Mapping[str, Any], ...]  # JSON schemas, as the prompt shows them
    tools_section: str = _QWEN_TOOLS_SECTION  # follows the system text; `{schemas}` becomes the schemas, one per line
    prefill: str = "<think>"  # forced start of every policy turn, never trained
    max_turns: int = 10  # generations in all, the answer included
    max_turn_tokens: int = 2000
    context_tokens: int = 32_767  # a prompt may have this less one turn: 30,767 tokens, the reference's limit
    observation_tokens: int = 4096  # a longer observation is cut, and says so
    search_top_k: int = 10  # results of a query that does not say how many
    max_top_k: int = 0  # the most that a query may ask for; 0 = it may not say, and the tool does not offer it
    max_queries: int = 3  # of one call; more are not sent
    max_urls: int = 5  # of one call; more are not read
    admitted: Literal["last_search", "all_searches"] = "last_search"  # whose results may be browsed
    invalid_action: Literal["end", "tell"] = "end"  # a turn that is neither call nor answer: over, or told so
    final_turn: Literal["tell_to_answer", "nothing"] = "tell_to_answer"  # before the last turn there is room for
    answer_source: Literal["policy", "transcript"] = "policy"  # 'transcript' also reads answers out of observations
    reward: str = "deepresearcher"  # a row of task.rewards.REWARDS

    def __post_init__(self) -> None:
        for field in ("max_turns", "max_turn_tokens", "search_top_k", "max_queries", "max_urls"):
            if getattr(self, field) < 1:
                raise ConfigError(f"preset.{field}: got {getattr(self, field)}, need at least 1.")
        literals = {
            field: typing.get_args(hint)
            for field, hint in typing.get_type_hints(type(self)).items()
            if typing.get_origin(hint) is Literal
        }
        for field, allowed in {**literals, "reward": tuple(REWARDS)}.items():
            if getattr(self, field) not in allowed:
                raise ConfigError(f"preset.{field}: got {getattr(self, field)!r}; allowed are {', '.join(allowed)}.")
        offered = [schema["function"]["parameters"]["properties"].get("top_k") for schema in self.tools]
        caps = {one["items"]["maximum"] for one in offered if one} or {0}
        if caps != {self.max_top_k}:
            raise ConfigError(f"preset.max_top_k: got {self.max_top_k}, the tools offer {sorted(caps)}; say the same.")
        if self.observation_tokens < 16:
            raise ConfigError(f"preset.observation_tokens: got {self.observation_tokens}, need at least 16.")
        if self.context_tokens <= self.max_turn_tokens:
            raise ConfigError(
                f"preset.context_tokens: {self.context_tokens} leaves no room for a prompt beside a turn of "
                f"max_turn_tokens={self.max_turn_tokens}. Raise the one or lower the other."
            )


def _tool(
    name: str, description: str, argument: str, argument_description: str, item_description: str
) -> dict[str, Any]:
    """A tool that takes one list of strings, in the reference's shape (its `minItems` stand one level too high)."""
    items = {"type": "string", "description": item_description}
    return {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {argument: {"type": "array", "items": items, "description": argument_description}},
                "required": [argument],
                "minItems": 1,
                "uniqueItems": True,
            },
        },
    }


_WEB_SEARCH = _tool(
    "web_search",
    "Looks up queries in a web search engine. Call it when what you know so far does not settle the question, or when "
    "the results of your last call missed the point.",
    "query",
    "The queries to run, best written from different angles.",
    "One query.",
)
_BROWSE_WEBPAGE = _tool(
    "browse_webpage",
    "Reads web pages and reports what they say about the question that this conversation does not hold yet. Call it "
    "after a search that returned pages worth reading.",
    "url_list",
    "Addresses of the pages to read; each must come from your search results.",
    "One address.",
)

_MAX_TOP_K = 20  # what most providers return for one call; of one that returns fewer, fewer come


def _with_top_k(tool: Mapping[str, Any], most: int) -> dict[str, Any]:
    """`tool`, offering how many results each query is to return."""
    offering = copy.deepcopy(dict(tool))
    offering["function"]["parameters"]["properties"]["top_k"] = {
        "type": "array",
        "items": {"type": "integer", "minimum": 1, "maximum": most},
        "description": "How many results each query is to return, in the order of the queries. Few save room.",
    }
    return offering


_SYSTEM = """\
## Background information
* Today is {today}
* You are Deep AI Research Assistant

The question you are given is hard and calls for deep research: no single lookup will settle it.

Two tools are at your disposal: a web search engine, and a reader of web pages.

Do not answer at once. Begin by thinking about a plan, or about what to look up next.

Every message you write takes exactly one of these two forms, each tag on a line of its own:

<think>
YOUR THINKING
</think>
<answer>
YOUR ANSWER
</answer>

or

<think>
YOUR THINKING
</think>
<tool_call>
YOUR CALL AS JSON
</tool_call>

Keep to these forms without exception:
1. The final answer stands inside <answer>, and consists of words, a number or a phrase. Do not explain it there.
2. A question that asks for yes or no is answered by yes or no alone.
"""

_DEEPRESEARCHER = Preset(name="deepresearcher", system=_SYSTEM, tools=(_WEB_SEARCH, _BROWSE_WEBPAGE))

PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        _DEEPRESEARCHER,
        # The published behaviour, its two defects included: a page can write the reward, and nobody asks for an answer.
        # 30,767 is the longest prompt there is, so an observation of that size ends the episode instead of being cut.
        dataclasses.replace(
            _DEEPRESEARCHER,
            name="deepresearcher_reference",
            answer_source="transcript",
            final_turn="nothing",
            observation_tokens=30_767,
        ),
        # The paper's first future direction: the policy decides how many results each query returns.
        dataclasses.replace(
            _DEEPRESEARCHER,
            name="deepresearcher_top_k",
            tools=(_with_top_k(_WEB_SEARCH, _MAX_TOP_K), _BROWSE_WEBPAGE),
            max_top_k=_MAX_TOP_K,
        ),
        # The same grammar for a model of a million parameters on a CPU, where every token of the prompt costs time.
        Preset(
            name="quickstart",
            system="Research the question, then answer it.",
            tools=(_WEB_SEARCH, _BROWSE_WEBPAGE),
            tools_section="\n# Tools\nweb_search(query: list)\nbrowse_webpage(url_list: list)",
            max_turn_tokens=96,
            context_tokens=2048,
            observation_tokens=192,
            search_top_k=2,
        ),
    )
}
