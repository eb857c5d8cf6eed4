"""Answers held-out questions greedily and grades them.

    python -m dr_jax.evaluate --config=configs/quickstart.py --workdir=runs/quickstart [--checkpoint=DIR]

`--checkpoint` is a Hugging Face directory (an export); without it the model that the config starts from is evaluated.
With `--server` the endpoint draws instead (`endpoint/remote.py`), and the checkpoint is there for its tokenizer.
Prints a table, then one JSON object, and writes every episode to `<workdir>/evaluation.jsonl.gz`.
"""

from __future__ import annotations

import asyncio
import collections
import datetime
import json
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from dr_jax import assemble, entry, metrics, report
from dr_jax.agent import episode
from dr_jax.interfaces import Sampler
from dr_jax.metrics import Outcome
from dr_jax.records import Episode, Question
from dr_jax.rollout import journal, scheduler
from dr_jax.run_config import RunConfig

BOOTSTRAPS = 1000  # resamples behind the 95% interval


async def heldout(
    run: RunConfig,
    host: assemble.Host,
    sampler: Sampler,
    questions: Sequence[Question],
    *,
    today: str,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> tuple[Episode, ...]:
    """One greedy episode for each question, in the order of `questions`."""
    context = host.context(run, sampler, seed=run.seed, today=today, temperature=0.0)
    groups = await scheduler.run_groups(
        questions,
        rollouts=1,
        run_episode=lambda question, rollout: episode.run(question, rollout, context),
        in_flight=host.in_flight,
        admit=host.admission.wait,
        on_episode=on_episode,
    )
    return tuple(group.episodes[0] for group in groups)


def scores(episodes: Sequence[Outcome]) -> dict[str, float]:
    """Means over the episodes that no outage touched: f1 (0 for a format error), em, ..., and tool calls.

    `f1_low` and `f1_high` bound the 95% bootstrap interval of the mean F1.
    """
    good = [e for e in episodes if e.trainable]
    if not good:
        return {"f1": float("nan"), "infra_failures": float(sum(e.infra_failures for e in episodes))}
    names = sorted({name for e in good for name in e.scores})
    means = {name: float(np.mean([e.scores[name] for e in good])) for name in names}
    f1 = np.array([e.scores["f1"] for e in good])
    resampled = np.random.default_rng(0).choice(f1, (BOOTSTRAPS, len(f1))).mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return means | {
        "f1_low": float(low),
        "f1_high": float(high),
        "tool_calls": float(np.mean([len(e.tools) for e in good])),
        "answered": float(np.mean([e.answered for e in good])),
        "infra_failures": float(sum(e.infra_failures for e in episodes)),
    }


def by_source(episodes: Sequence[Episode]) -> dict[str, float]:
    """Mean F1 of each data set, and of each number of hops where it is known."""
    groups = collections.defaultdict(list)
    for e in episodes:
        if e.trainable:
            groups[e.question.source or "questions"].append(e.scores["f1"])
            if e.question.hops:
                groups[f"{e.question.hops}-hop"].append(e.scores["f1"])
    return {name: float(np.mean(values)) for name, values in sorted(groups.items())}


def main(argv: Sequence[str] | None = None) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Where the cache and the episodes go.", flag_values=values, required=True)
    flags.DEFINE_string("checkpoint", None, "Hugging Face directory to evaluate.", flag_values=values)
    flags.DEFINE_string("server", None, entry.SERVER_HELP, flag_values=values)
    return entry.run(_evaluate, values, about=__doc__, argv=argv)


def _evaluate(run: RunConfig, values: flags.FlagValues) -> None:
    run = assemble.with_checkpoint(run, values.checkpoint)
    workdir = pathlib.Path(values.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    _, questions = assemble.questions(run)

    async def work() -> tuple[Episode, ...]:
        async with assemble.answering(run, workdir, values.server) as (host, sampler):
            with report.episodes_bar(len(questions), "evaluation") as bar:
                today = datetime.datetime.now(datetime.UTC).date().isoformat()
                return await heldout(
                    run, host, sampler, questions, today=today, on_episode=lambda episode: bar.update(1)
                )

    episodes = asyncio.run(work())
    journal.write_file(workdir / "evaluation.jsonl.gz", episodes)
    total = scores([metrics.outcome(e) for e in episodes])
    print(report.table(("", "F1"), [*by_source(episodes).items(), ("all", total["f1"])]))
    print(json.dumps(total))


if __name__ == "__main__":
    sys.exit(main())
