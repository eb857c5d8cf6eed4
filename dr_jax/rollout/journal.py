"""What was done in each step, for people: one JSON line an episode, one file a step, written whole or not at all."""

from __future__ import annotations

import gzip
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from dr_jax.metrics import policy_tokens
from dr_jax.records import Episode


def write(directory: str | os.PathLike[str], step: int, episodes: Iterable[Episode]) -> pathlib.Path:
    """The path of `step_000012.jsonl.gz`. A step that is run again after a resume replaces its own file."""
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    return write_file(folder / f"step_{step:06d}.jsonl.gz", episodes)


def write_file(path: pathlib.Path, episodes: Iterable[Episode]) -> pathlib.Path:
    """`path`, holding one line for each episode; it appears whole or not at all."""
    partial = path.with_suffix(".partial")
    with gzip.open(partial, "wt", encoding="utf-8", compresslevel=3) as file:
        for episode in episodes:
            file.write(json.dumps(_row(episode), ensure_ascii=True, allow_nan=False) + "\n")
    partial.replace(path)
    return path


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of one step, as dictionaries."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _row(episode: Episode) -> dict[str, Any]:
    finite = episode.reward == episode.reward
    return {
        "question": episode.question.text,
        "question_id": episode.question.id,
        "answers": list(episode.question.answers),
        "rollout": episode.rollout,
        "answer": episode.answer,
        "reward": episode.reward if finite else None,
        "scores": dict(episode.scores),
        "stop": episode.stop,
        "detail": episode.detail,
        "trainable": episode.trainable,
        "response": episode.response,
        "policy_tokens": policy_tokens(episode),
        "tools": [
            {
                "tool": use.tool,
                "arguments": use.arguments,
                "failures": [failure.kind for failure in use.failures],
                "seconds": round(use.seconds, 4),
                "observation": use.observation,
            }
            for use in episode.tool_uses
        ],
    }
