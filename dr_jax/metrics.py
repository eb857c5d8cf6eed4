"""A run's numbers: `metrics.jsonl` and TensorBoard events in the workdir, and the per-step summary of rollouts.

Names are those that users of TRL and verl know (`reward`, `completions/mean_length`, `frac_reward_zero_std`, `kl`,
`clip_ratio/low_mean`, `timing_s/gen`, ...).
"""

from __future__ import annotations

import collections
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


def rollout_summary(groups: Sequence[Sequence[Episode]], *, step: int = 0) -> dict[str, float]:
    """Means over the episodes of one step. Rewards and scores are of trainable episodes; the rest is counted apart.

    `policy_lag/*`: how many steps older than version `step` the weights were that drew an episode's oldest call."""
    episodes = [episode for group in groups for episode in group]
    good = [episode for episode in episodes if episode.trainable]
    rewards = [[e.reward for e in group if e.trainable] for group in groups]
    spreads = [float(np.std(r, ddof=1)) for r in rewards if len(r) > 1]
    lengths = [policy_tokens(episode) for episode in good]
    calls = [len(episode.tool_uses) for episode in good]
    lags = [policy_lag(episode, step) for episode in good]
    failures = collections.Counter(f.kind for e in episodes for use in e.tool_uses for f in use.failures)
    tools = collections.Counter(use.tool for e in episodes for use in e.tool_uses)
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
    if reads := [call for e in good for call in e.calls if call.role is Role.READER]:
        summary["reader/calls_mean"] = len(reads) / len(good)
        summary["reader/mean_length"] = _mean([len(call.output) for call in reads])
    for score in sorted({name for e in good for name in e.scores}):
        summary[f"score/{score}"] = _mean([e.scores[score] for e in good])
    for reason in StopReason:
        summary[f"stop/{reason}"] = _mean([e.stop is reason for e in episodes])
    summary |= {f"tools/{tool}": float(count) for tool, count in sorted(tools.items())}
    return summary | {f"failures/{kind}": float(failures[kind]) for kind in FailureKind if failures[kind]}


def tokens(episode: Episode) -> int:
    """How many tokens the sampler had before it in all: those of the conversation, which each turn extends, and those
    of every call beside it."""
    whole = [len(call.prompt) + len(call.output) for call in episode.calls if call.role is Role.POLICY]
    aside = [len(call.prompt) + len(call.output) for call in episode.calls if call.role is not Role.POLICY]
    return max(whole, default=0) + sum(aside)


def policy_lag(episode: Episode, step: int) -> int:
    """How many steps older than version `step` the weights were that drew the episode's oldest call."""
    return step - min((call.version for call in episode.calls), default=step)


def policy_tokens(episode: Episode) -> int:
    """How many tokens the policy itself wrote in its own name."""
    return sum(len(call.output) for call in episode.calls if call.role is Role.POLICY)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else math.nan
