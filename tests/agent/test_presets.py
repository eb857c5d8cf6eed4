from __future__ import annotations

import dataclasses

import pytest

from dr_jax.agent.presets import PRESETS
from dr_jax.errors import ConfigError
from dr_jax.task.rewards import REWARDS


def test_limits_of_the_reference():
    preset = PRESETS["deepresearcher_reference"]
    assert preset.max_turns == 10
    assert preset.max_turn_tokens == 2000
    assert preset.context_tokens - preset.max_turn_tokens == 30_767
    assert (preset.search_top_k, preset.max_queries, preset.admitted) == (10, 3, "last_search")
    assert (preset.prefill, preset.invalid_action) == ("<think>", "end")


def test_the_two_fixes_can_be_switched_off_by_name():
    ours, theirs = (dataclasses.asdict(PRESETS[name]) for name in ("deepresearcher", "deepresearcher_reference"))
    different = {field: (ours[field], theirs[field]) for field in ours if ours[field] != theirs[field]}
    assert different.pop("name")
    assert different == {
        "answer_source": ("policy", "transcript"),
        "final_turn": ("tell_to_answer", "nothing"),
        "observation_tokens": (4096, 30_767),
    }


def test_tool_schemas_have_the_shape_of_the_reference():
    search, browse = (schema["function"] for schema in PRESETS["deepresearcher"].tools)
    assert (search["name"], browse["name"]) == ("web_search", "browse_webpage")
    for schema, argument in ((search, "query"), (browse, "url_list")):
        parameters = schema["parameters"]
        assert parameters["required"] == [argument]
        assert parameters["properties"][argument]["type"] == "array"
        assert parameters["properties"][argument]["items"]["type"] == "string"
        assert (parameters["minItems"], parameters["uniqueItems"]) == (1, True)


def test_the_schema_of_the_reference_offers_no_number_of_results():
    for name in ("deepresearcher", "deepresearcher_reference", "quickstart"):
        search = PRESETS[name].tools[0]["function"]["parameters"]
        assert (list(search["properties"]), PRESETS[name].max_top_k) == (["query"], 0)


def test_a_preset_of_its_own_offers_it_within_a_cap():
    preset = PRESETS["deepresearcher_top_k"]
    offered = preset.tools[0]["function"]["parameters"]["properties"]["top_k"]
    assert (offered["items"]["type"], offered["items"]["maximum"]) == ("integer", preset.max_top_k)
    same = dataclasses.replace(preset, name="deepresearcher", tools=PRESETS["deepresearcher"].tools, max_top_k=0)
    assert same == PRESETS["deepresearcher"]


def test_every_preset_names_a_reward_and_itself():
    assert all(preset.reward in REWARDS and preset.name == name for name, preset in PRESETS.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_turns": 0}, "preset.max_turns: got 0"),
        ({"max_queries": 0}, "preset.max_queries: got 0"),
        ({"observation_tokens": 3}, "preset.observation_tokens: got 3"),
        ({"context_tokens": 2000}, "leaves no room for a prompt"),
        ({"reward": "f2"}, "preset.reward: got 'f2'"),
        ({"max_top_k": 5}, r"preset.max_top_k: got 5, the tools offer \[0\]"),
        ({"tools": PRESETS["deepresearcher_top_k"].tools}, r"preset.max_top_k: got 0, the tools offer \[20\]"),
        ({"admitted": "any"}, "preset.admitted: got 'any'"),
    ],
)
def test_an_impossible_preset_is_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        dataclasses.replace(PRESETS["deepresearcher"], **change)
