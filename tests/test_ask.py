"""`ask` shows an episode in the order in which it happened."""

from __future__ import annotations

import asyncio
import pathlib
import re

from dr_jax import ask, serve
from dr_jax.endpoint import server
from dr_jax.records import Episode, Question, StopReason, ToolUse

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


def test_transcript_puts_each_observation_after_the_turn_that_asked_for_it():
    call, answer = "<think> one</think>\n<tool_call>\n{}\n</tool_call>", "<think> two</think>\n<answer> x</answer>"
    response = f"{call}<|im_end|>\n{answer}<|im_end|>"
    use = ToolUse("web_search", {}, (), 0.25, "[found]")
    record = Episode(Question("q", "?", ()), 0, (), (use,), StopReason.ANSWERED, answer="x", response=response)
    assert ask.transcript(record) == (
        "<think> one</think>\n<tool_call>\n{}\n</tool_call>\n"
        "[web_search, 0.25 s]\n[found]\n\n"
        "<think> two</think>\n<answer> x</answer>\n\n"
        "answered: x"
    )


def test_one_question_on_the_embedded_web(capsys):
    question = "What is the film Rusted Tunnel's director's birthplace?"
    assert ask.main(["ask", f"--config={QUICKSTART}", f"--question={question}"]) == 0
    assert "<think>" in capsys.readouterr().out


async def test_an_endpoint_answers_as_the_engine_does(capsys, monkeypatch):
    monkeypatch.setenv("DR_JAX_API_KEY", "sesame")
    argv = ["ask", f"--config={QUICKSTART}", "--question=What is the film Rusted Tunnel's director's birthplace?"]
    engine, model = serve.load("world", slots=2)
    async with engine, server.serve(model, api_key="sesame") as url:
        assert await asyncio.to_thread(ask.main, [*argv, f"--server={url}"]) == 0
    there = capsys.readouterr().out
    assert await asyncio.to_thread(ask.main, argv) == 0
    here = capsys.readouterr().out
    untimed = [re.sub(r"[\d.]+ s\]", "s]", text) for text in (there, here)]
    assert untimed[0] == untimed[1]
    assert "[web_search" in there


def test_an_endpoint_that_is_not_there_is_one_line(capsys):
    assert ask.main(["ask", f"--config={QUICKSTART}", "--question=Who?", "--server=models.example"]) == 2
    assert "error: server: a server such as http://127.0.0.1:8000/v1 needs an http(s) URL" in capsys.readouterr().err


def test_a_missing_checkpoint_is_one_line(capsys):
    assert ask.main(["ask", f"--config={QUICKSTART}", "--question=Who?", "--checkpoint=/nowhere"]) == 2
    assert "no Hugging Face checkpoint at /nowhere" in capsys.readouterr().err
