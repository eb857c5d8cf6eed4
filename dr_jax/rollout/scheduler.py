"""Many episodes at once: bounded in flight, groups kept whole, one bad episode never hurts another."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Awaitable, Callable, Sequence

from dr_jax.errors import RolloutHalted
from dr_jax.records import Episode, Question, StopReason

log = logging.getLogger(__name__)

RunEpisode = Callable[[Question, int], Awaitable[Episode]]


@dataclasses.dataclass(frozen=True)
class Group:
    """The rollouts of one question, by rollout index."""

    question: Question
    episodes: tuple[Episode, ...]


async def _at_once() -> None:
    """Admission without conditions."""


async def run_groups(
    questions: Sequence[Question],
    *,
    rollouts: int,
    run_episode: RunEpisode,
    max_in_flight: int,
    admit: Callable[[], Awaitable[None]] = _at_once,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> tuple[Group, ...]:
    """The groups of `questions`, in their order, whatever the order in which episodes finish.

    Episodes start question by question, so that siblings share the sampler's prompt cache. A waiting episode costs
    memory only: the sampler decides how many of those in flight hold an accelerator slot. `admit` is awaited before
    each start, and holds it back while there is no memory for it (`admission.Admission.wait`). `on_episode` sees each
    episode as it ends (for progress); it must not block.
    """
    slots = asyncio.Semaphore(max_in_flight)
    done: dict[tuple[int, int], Episode] = {}
    reported: set[str] = set()

    async def one(row: int, question: Question, rollout: int) -> None:
        async with slots:
            await admit()
            episode = await _guarded(run_episode, question, rollout, reported)
        done[row, rollout] = episode
        on_episode(episode)

    async with asyncio.TaskGroup() as tasks:
        for row, question in enumerate(questions):
            for rollout in range(rollouts):
                tasks.create_task(one(row, question, rollout))
    return tuple(
        Group(question, tuple(done[row, rollout] for rollout in range(rollouts)))
        for row, question in enumerate(questions)
    )


async def _guarded(run_episode: RunEpisode, question: Question, rollout: int, reported: set[str]) -> Episode:
    """The one place that catches everything: a defect in one episode is recorded and counted, and the others go on.

    The traceback of a defect is logged once, however many episodes it hits; `reported` remembers which were."""
    try:
        return await run_episode(question, rollout)
    except Exception as error:  # noqa: BLE001
        detail = f"{type(error).__name__}: {error}"
        if detail not in reported:
            reported.add(detail)
            log.exception("episode failed: question %s, rollout %d", question.id, rollout)
        return Episode(question, rollout, (), (), StopReason.INFRASTRUCTURE, detail=detail)


def check_health(groups: Sequence[Group], *, max_infra_fraction: float) -> None:
    """Raises `RolloutHalted` where too many episodes failed for outside reasons: such a step must not be trained on."""
    episodes = [episode for group in groups for episode in group.episodes]
    failed = [episode for episode in episodes if not episode.trainable]
    if len(failed) <= max_infra_fraction * len(episodes):
        return
    kinds = sorted({f.kind for e in failed for use in e.tool_uses for f in use.failures if f.infrastructure})
    details = sorted({e.detail for e in failed if e.detail})[:3]
    raise RolloutHalted(
        f"{len(failed)} of {len(episodes)} episodes failed for outside reasons (allowed: {max_infra_fraction:.0%}); "
        f"this step was not trained on. Failures: {', '.join([*kinds, *details]) or 'unknown'}. "
        "Mend the provider or network and start the same command again: it resumes from the last checkpoint."
    )
