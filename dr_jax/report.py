"""What a person sees of a run: a progress line a step, a plot, and a table at the end."""

from __future__ import annotations

import math
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from dr_jax import metrics


class Progress:
    """Prints one line a step, with the time left."""

    def __init__(self, *, steps: int, done: int):
        self._steps, self._done, self._first = steps, done, done
        self._started_s = time.monotonic()

    def step(self, values: Mapping[str, float]) -> None:
        """The line of one finished step."""
        self._done += 1
        elapsed_s = time.monotonic() - self._started_s
        left_s = elapsed_s / (self._done - self._first) * (self._steps - self._done)
        print(
            f"step {self._done:>{len(str(self._steps))}}/{self._steps}"
            f"  reward {values['reward']:+.3f}  F1 {values.get('score/f1', math.nan):.3f}"
            f"  calls {values['tools/calls_mean']:.2f}  length {values['completions/mean_length']:.0f}"
            f"  {values['perf/tokens_per_s']:,.0f} tokens/s  {values['timing_s/step']:.1f} s"
            f"  left {_clock(left_s)}",
            flush=True,
        )

    def note(self, text: str) -> None:
        print(text, flush=True)


def episodes_bar(total: int, label: str) -> tqdm:
    """A bar to `.update(1)` as episodes end; use as a context manager. Silent where stderr is no terminal."""
    return tqdm(total=total, desc=label, unit="episode", leave=False, disable=not sys.stderr.isatty())


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A small aligned table of text: names to the left, values to the right, floats to three places."""
    cells = [tuple(header), *(tuple(map(_cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Draws reward, held-out F1, tool calls and response length over steps from the run's own `metrics.jsonl`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = metrics.read(pathlib.Path(workdir) / "metrics.jsonl")
    panels = [
        ("reward", "training reward", "reward"),
        ("eval/f1", "held-out F1, greedy", "F1"),
        ("tools/calls_mean", "tool calls", "per episode"),
        ("completions/mean_length", "response length", "policy tokens per episode"),
    ]
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 6.4), constrained_layout=True)
    for axis, (name, title, unit) in zip(axes.flat, panels, strict=True):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        style = {}
        if name == "eval/f1":  # few points, of a score whose range is known
            style = dict(marker="o", markersize=4)
            axis.set_ylim(0, 1)
        axis.plot([step for step, _ in points], [value for _, value in points], color="#1f5f8b", **style)
        axis.set(title=title, ylabel=unit, xlabel="optimizer step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path = pathlib.Path(workdir) / "plot.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}h{minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m{seconds:02d}s"
