"""A run's numbers: `metrics.jsonl` and TensorBoard events in the workdir, and the per-step summary of rollouts.

Names are those that users of TRL and verl know (`reward`, `completions/mean_length`, `frac_reward_zero_std`, `kl`,
`clip_ratio/low_mean`, `timing_s/gen`, ...).
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dr_jax.records import Episode, FailureKind, Role, StopReason


class MetricsLog:
    """Appends one JSON line a step, and the same scalars to TensorBoard. Close it to flush both."""

    def __init__(self, workdir: str | os.PathLike[str], *, last_step: int):
        """Opens the log of a run that stands at `last_step`; lines past it (from before a resume) are dropped."""
        from tensorboardX import SummaryWriter  # here: floor 0 imports without it

        self.path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = [row for row in read(self.path) if row["step"] <= last_step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.replace(self.path)
        self._file = open(self.path, "a", buffering=1)  # noqa: SIM115  (closed in `close`)
        self._board = SummaryWriter(str(pathlib.Path(workdir) / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds `values` for `step`. Values that are not finite are written as null: JSON has no NaN."""
        finite = {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; empty where there is no file. A last line cut by a crash is left out."""
    try:
        lines = pathlib.Path(path).read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What is counted of an episode: plain values, so that hosts can tell each other in JSON."""

    trainable: bool
    reward: float
    scores: Mapping[str, float]
    stop: str  # a `StopReason`
    answered: bool
    tokens: int
    policy_tokens: int
    reads: Sequence[int]  # tokens that a model wrote about a page, one number a call
    tools: Sequence[str]  # one name a call
    failures: Sequence[str]  # `FailureKind`s
    infra_failures: int
    version: int | None  # of the weights that drew the oldest call


def outcome(episode: Episode) -> Outcome:
    """What is counted of `episode`."""
    return Outcome(
        trainable=episode.trainable,
        reward=episode.reward,
        scores=episode.scores,
        stop=episode.stop,
        answered=episode.answer is not None,
        tokens=tokens(episode),
        policy_tokens=policy_tokens(episode),
        reads=[len(call.output) for call in episode.calls if call.role is Role.READER],
        tools=[use.tool for use in episode.tool_uses],
        failures=[failure.kind for use in episode.tool_uses for failure in use.failures],
        infra_failures=episode.infra_failures,
        version=oldest_version(episode),
    )


def rollout_summary(groups: Sequence[Sequence[Outcome]], *, step: int = 0) -> dict[str, float]:
    """Means over the episodes of one step. Rewards and scores are of trainable episodes; the rest is counted apart.

    `policy_lag/*`: how many steps older than version `step` the weights were that drew an episode's oldest call."""
    episodes = [episode for group in groups for episode in group]
    good = [episode for episode in episodes if episode.trainable]
    rewards = [[e.reward for e in group if e.trainable] for group in groups]
    spreads = [float(np.std(r, ddof=1)) for r in rewards if len(r) > 1]
    lengths = [episode.policy_tokens for episode in good]
    calls = [len(episode.tools) for episode in good]
    lags = [step - episode.version for episode in good]
    failures = collections.Counter(kind for e in episodes for kind in e.failures)
    tools = collections.Counter(tool for e in episodes for tool in e.tools)
    summary = {
        "reward": _mean([e.reward for e in good]),
        "reward_std": _mean(spreads),
        "frac_reward_zero_std": _mean([spread == 0 for spread in spreads]),
        "completions/mean_length": _mean(lengths),
        "completions/max_length": float(max(lengths, default=0)),
        "tools/calls_mean": _mean(calls),
        "policy_lag/mean": _mean(lags),
        "policy_lag/max": float(max(lags, default=0)),
        "infra_failures": float(sum(e.infra_failures for e in episodes)),
        "episodes": float(len(episodes)),
        "episodes/untrained": float(len(episodes) - len(good)),
    }
    if reads := [length for e in good for length in e.reads]:
        summary["reader/calls_mean"] = len(reads) / len(good)
        summary["reader/mean_length"] = _mean(reads)
    for score in sorted({name for e in good for name in e.scores}):
        summary[f"score/{score}"] = _mean([e.scores[score] for e in good])
    for reason in StopReason:
        summary[f"stop/{reason}"] = _mean([e.stop == reason for e in episodes])
    summary |= {f"tools/{tool}": float(count) for tool, count in sorted(tools.items())}
    return summary | {f"failures/{kind}": float(failures[kind]) for kind in FailureKind if failures[kind]}


def tokens(episode: Episode) -> int:
    """How many tokens the sampler had before it in all: those of the conversation, which each turn extends, and those
    of every call beside it."""
    whole = [len(call.prompt) + len(call.output) for call in episode.calls if call.role is Role.POLICY]
    aside = [len(call.prompt) + len(call.output) for call in episode.calls if call.role is not Role.POLICY]
    return max(whole, default=0) + sum(aside)


def oldest_version(episode: Episode) -> int | None:
    """Of the weights that drew the episode's oldest call; None where there is no call."""
    return min((call.version for call in episode.calls), default=None)


def policy_lag(episode: Episode, step: int) -> int:
    """How many steps older than version `step` the weights were that drew the episode's oldest call."""
    version = oldest_version(episode)
    return 0 if version is None else step - version


def policy_tokens(episode: Episode) -> int:
    """How many tokens the policy itself wrote in its own name."""
    return sum(len(call.output) for call in episode.calls if call.role is Role.POLICY)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
