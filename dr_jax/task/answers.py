"""Answer metrics of the field, each as published: how texts are normalised, and how a prediction meets a gold answer.

Systems differ in both, so their numbers differ on the same predictions; `tests/task/test_answers.py` holds the table.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable

Metric = Callable[[str, str], float]
"""(prediction, gold) -> score in [0, 1]."""

_PUNCTUATION = frozenset(string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def first_answer(text: str) -> str | None:
    """What stands in the first closed `<answer>` of `text`; None without one. As in the reference, case is ignored."""
    found = _ANSWER.search(text)
    return found.group(1).strip() if found else None


def normalise_squad(text: str) -> str:
    """Lower case, punctuation deleted, articles deleted, white space collapsed."""
    kept = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def normalise_spaced(text: str) -> str:
    """Lower case, each punctuation mark becomes a space, articles kept (DeepResearcher)."""
    return " ".join("".join(" " if c in _PUNCTUATION else c for c in text.lower()).split())


def normalise_cover(text: str) -> str:
    """`normalise_spaced` with curly quotes as punctuation too, then articles deleted (R1-Searcher)."""
    return " ".join(_ARTICLES.sub(" ", normalise_spaced(re.sub("[‘’´`]", " ", text))).split())


def set_f1(prediction: str, gold: str) -> float:
    """F1 of the two *sets* of words; 0 where either is empty.

    *Differs from SQuAD*: repeated words count once, articles count, and punctuation separates words.
    *Source*: the reward of DeepResearcher.
    """
    predicted, wanted = set(normalise_spaced(prediction).split()), set(normalise_spaced(gold).split())
    return _f1(len(predicted & wanted), len(predicted), len(wanted))


def squad_f1(prediction: str, gold: str) -> float:
    """F1 of the two multisets of words after SQuAD's normalisation; 0 where either is empty."""
    predicted, wanted = normalise_squad(prediction).split(), normalise_squad(gold).split()
    return _f1((Counter(predicted) & Counter(wanted)).total(), len(predicted), len(wanted))


def exact_match(prediction: str, gold: str) -> float:
    """1 where both are equal after SQuAD's normalisation; as published, even where both normalise to nothing."""
    return float(normalise_squad(prediction) == normalise_squad(gold))


def sub_em(prediction: str, gold: str) -> float:
    """1 where the gold is a substring of the prediction, both normalised ("Catherine" holds "Cat"). (Search-R1)"""
    return float(normalise_squad(gold) in normalise_squad(prediction))


def cover_em(prediction: str, gold: str) -> float:
    """1 where every word of gold stands in the prediction, in any order. *Source*: R1-Searcher's cover exact match."""
    return float(set(normalise_cover(gold).split()) <= set(normalise_cover(prediction).split()))


def best(metric: Metric, prediction: str, golds: Iterable[str]) -> float:
    """`metric` against the alternative that suits the prediction best; 0 without alternatives."""
    return max((metric(prediction, gold) for gold in golds), default=0.0)


def _f1(shared: int, predicted: int, wanted: int) -> float:
    return 2 * shared / (predicted + wanted) if shared else 0.0
