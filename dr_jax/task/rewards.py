"""What an episode is worth: rewards by name, and the scores that are logged beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from dr_jax.records import Question, StopReason
from dr_jax.task import answers

Reward = Callable[[Question, "str | None", str, StopReason], float]
"""(question, answer, response_text, stop) -> reward. `answer` is None where the episode gave none."""

FORMAT_ERROR = -1.0
_TAGS = ("tool_call", "think", "answer")


def well_formed(response_text: str) -> bool:
    """True where each of `<tool_call>`, `<think>`, `<answer>` opens as often as it closes, and closes after it opened.

    As in the reference there is no check of order between tags, nor that there is any thinking, nor of one answer only.
    """
    text = response_text.lower()
    return all(_balanced(text, f"<{tag}>", f"</{tag}>") for tag in _TAGS)


def deepresearcher(question: Question, answer: str | None, response_text: str, stop: StopReason) -> float:
    """-1 for a format error or no answer; else the best set-F1 over the question's answers.

    *Differs from the reference*: it is handed the policy's own text and answer, so a page that holds `<answer>` or a
    stray `<think>` can neither write nor spoil the reward. The preset 'deepresearcher_reference' hands over everything.
    """
    if answer is None or not well_formed(response_text):
        return FORMAT_ERROR
    return answers.best(answers.set_f1, answer, question.answers)


def scores(question: Question, answer: str | None) -> Mapping[str, float]:
    """Every metric of one answer by its name in the logs; 0 without an answer."""
    return {name: _graded(metric, question, answer) for name, metric in _METRICS.items()}


def _graded(metric: answers.Metric, question: Question, answer: str | None) -> float:
    # A gold answer that normalises to nothing ("The") would match anything, so it grades nothing.
    golds = [gold for gold in question.answers if answers.normalise_squad(gold)]
    return answers.best(metric, answer, golds) if answer else 0.0


def _outcome(metric: answers.Metric) -> Reward:
    return lambda question, answer, response_text, stop: _graded(metric, question, answer)


def _balanced(text: str, opening: str, closing: str) -> bool:
    if text.count(opening) != text.count(closing):
        return False
    # With equal counts every opening has a later closing exactly when the last opening has one.
    return text.rfind(opening) <= text.rfind(closing)


_METRICS = {
    "f1": answers.set_f1,
    "squad_f1": answers.squad_f1,
    "em": answers.exact_match,
    "cover_em": answers.cover_em,
}

REWARDS: Mapping[str, Reward] = {
    "deepresearcher": deepresearcher,
    "squad_f1": _outcome(answers.squad_f1),
    "em": _outcome(answers.exact_match),
    "cover_em": _outcome(answers.cover_em),
}
