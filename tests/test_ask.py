"""`ask` shows an episode in the order in which it happened."""

from __future__ import annotations

import pathlib

from dr_jax import ask
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


def test_a_missing_checkpoint_is_one_line(capsys):
    assert ask.main(["ask", f"--config={QUICKSTART}", "--question=Who?", "--checkpoint=/nowhere"]) == 2
    assert "no Hugging Face checkpoint at /nowhere" in capsys.readouterr().err
