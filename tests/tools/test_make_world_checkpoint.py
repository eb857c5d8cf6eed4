"""The script that makes the embedded checkpoint runs from end to end, on a thousandth of its texts."""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np
import pytest

from dr_jax.agent.chat import Chat
from dr_jax.model import hf
from dr_jax.model.config import ModelConfig

TOOLS = pathlib.Path(__file__).parents[2] / "tools"
CHECKPOINT = pathlib.Path(__file__).parents[2] / "dr_jax" / "world" / "checkpoint"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TOOLS))
        tool = __import__("make_world_checkpoint")
    sys.modules.pop("make_world_checkpoint")
    tool.SCHEDULE = ((1.0, 1.0),)  # one learning rate is one compilation
    out = tmp_path_factory.mktemp("made") / "checkpoint"
    careless = tool.Authors(0.4, tool.Habits(guess=0.15, skim=0.9, stop=0.9))
    tool.make(out, 0, [tool.Round(careless, 12, 8, 4, 2e-3, 0.1)], tokenizer_episodes=20)
    return out


def test_it_is_a_checkpoint_like_the_one_that_ships(made):
    assert {path.name for path in made.iterdir()} == {path.name for path in CHECKPOINT.iterdir()}
    assert ModelConfig.from_hf(made) == ModelConfig.from_hf(CHECKPOINT)
    params = hf.load(made, ModelConfig.from_hf(made), dtype="float32")
    assert np.isfinite(np.asarray(params["embed"])).all()
    assert "4 steps on 12\ntranscripts and 8 reading exercises" in (made / "README.md").read_text()


def test_its_control_tokens_are_where_its_config_says(made):
    chat = Chat.load(made)
    config, generation = (json.loads((made / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert config["eos_token_id"] == chat.control["<|im_end|>"]
    assert config["bos_token_id"] == chat.control["<|endoftext|>"]
    assert set(generation["eos_token_id"]) == set(chat.eos_ids)
    text = "<think>\nWho directed Rusted Tunnel?\n</think>"
    assert chat.decode(chat.plain(text)) == text
