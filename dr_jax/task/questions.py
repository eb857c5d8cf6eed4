"""Questions from a file, and the order in which training sees them."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dr_jax.errors import ConfigError
from dr_jax.records import Question

ANSWER_SPLIT = "<|answer_split|>"  # between alternatives in the reference's `ground_truth`
_MAX_QUESTION_CHARS = 10_000
_SHUFFLE_STREAM = 0x51


def load(path: str | pathlib.Path) -> tuple[Question, ...]:
    """The questions of a `.jsonl` or `.parquet` file, in file order.

    A JSONL line is `{"id", "text", "answers": [...]}` with optional `source`, `hops` and `evidence`; a Parquet row has
    either those columns or the reference's (`prompt`, `reward_model.ground_truth`, `extra_info.index`, `data_source`).
    Raises `ConfigError` with file and line (JSONL, from 1) or row (Parquet, from 1) for anything else, and for two
    questions of one id.
    """
    path = pathlib.Path(path)
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        raise ConfigError(f"questions: {path} ends in {path.suffix!r}. Allowed: {', '.join(readers)}.")
    if not path.is_file():
        raise ConfigError(f"questions: {path} does not exist. Give the path of a .jsonl or .parquet file.")
    questions: dict[str, Question] = {}
    for place, row in readers[path.suffix](path):
        question = _question(row, place)
        if question.id in questions:
            raise ConfigError(f"{place}: id {question.id!r} stands there twice. Give each question its own id.")
        questions[question.id] = question
    if not questions:
        raise ConfigError(f"questions: {path} holds no question.")
    return tuple(questions.values())


@dataclasses.dataclass(frozen=True)
class QuestionOrder:
    """An endless order over `questions`: each epoch is one permutation, a pure function of (seed, epoch)."""

    questions: tuple[Question, ...]
    seed: int

    def __post_init__(self) -> None:
        if not self.questions:
            raise ConfigError("questions: none to train on.")

    def take(self, cursor: int, n: int) -> tuple[Question, ...]:
        """The `n` questions from position `cursor` on; the next call continues at `cursor + n`."""
        size = len(self.questions)
        return tuple(
            self.questions[_permutation(size, self.seed, i // size)[i % size]] for i in range(cursor, cursor + n)
        )


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([_SHUFFLE_STREAM, seed, epoch]).permutation(size).tolist())


def _read_jsonl(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{path}:{number}"
                try:
                    yield place, json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{place}: not a line of JSON ({error}). Mend or remove the line.") from error


def _read_parquet(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
    import pyarrow  # slow to import, and only this format needs it
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"questions: {path} is not a Parquet file ({error}).") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", _from_reference(row) if "reward_model" in row else row


def _from_reference(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of the reference's schema in our field names. What does not fit is left for `_question` to name."""
    messages = [message for message in row.get("prompt") or () if isinstance(message, Mapping)]
    users = [message.get("content") for message in messages if message.get("role") == "user"]
    reward, extra = (row[name] if isinstance(row.get(name), Mapping) else {} for name in ("reward_model", "extra_info"))
    truth = reward.get("ground_truth")
    return {
        "id": extra.get("index"),
        "text": users[0] if users else None,
        "answers": truth.split(ANSWER_SPLIT) if isinstance(truth, str) else truth,
        "source": row.get("data_source") or "",
    }


def _question(row: Any, place: str) -> Question:
    """`row` as a checked `Question`; `place` names it in the error."""
    if not isinstance(row, Mapping):
        raise ConfigError(f"{place}: got {type(row).__name__}, need an object with id, text and answers.")
    id, text, answers = row.get("id"), row.get("text"), row.get("answers")
    source, hops, evidence = row.get("source") or "", row.get("hops") or 0, row.get("evidence") or ()
    checks = {
        "id": (id, isinstance(id, str | int) and not isinstance(id, bool) and id != "", "a string or an integer"),
        "text": (
            text,
            _is_text(text) and len(text) <= _MAX_QUESTION_CHARS,
            f"text of 1 to {_MAX_QUESTION_CHARS} characters",
        ),
        "answers": (answers, bool(answers) and _is_texts(answers), "a list of at least one non-empty string"),
        "source": (source, isinstance(source, str), "a string"),
        "hops": (hops, isinstance(hops, int) and hops >= 0, "a whole number, 0 = unknown"),
        "evidence": (evidence, _is_texts(evidence), "a list of URLs"),
    }
    for field, (value, valid, need) in checks.items():
        if not valid:
            raise ConfigError(f"{place}: {field} is {_short(value)}, need {need}.")
    return Question(str(id), text, tuple(answers), source, hops, tuple(evidence))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_texts(values: Any) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(_is_text(value) for value in values)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
