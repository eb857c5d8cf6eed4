"""Many episodes at once, of this step and of the next ones: bounded in flight, groups whole, one bad episode stays one.

The learner takes steps in order, each with the questions that are its own, whatever the order in which episodes end.
`max_policy_lag` says how far the episodes may run ahead of it (docs/design.md, "Scheduling").
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from dr_jax.errors import RolloutHalted
from dr_jax.metrics import policy_lag
from dr_jax.records import Episode, Question, StopReason

log = logging.getLogger(__name__)

RunEpisode = Callable[[int, Question, int], Awaitable[Episode]]  # of a step, a question, a rollout


@dataclasses.dataclass(frozen=True)
class Group:
    """The rollouts of one question, by rollout index."""

    row: int  # the question's place in its step
    question: Question
    episodes: tuple[Episode, ...]


class _Gathering:
    """The episodes of one step as they end."""

    def __init__(self, questions: Sequence[Question], rollouts: int) -> None:
        self._questions, self._rollouts = questions, rollouts
        self._rows: list[dict[int, Episode]] = [{} for _ in questions]
        self._whole: list[int] = []  # rows, in the order in which their last episode ended
        self.left = list(range(len(questions)))  # rows that nobody took

    def add(self, row: int, episode: Episode) -> None:
        self._rows[row][episode.rollout] = episode
        if len(self._rows[row]) == self._rollouts:
            self._whole.append(row)

    def take(self, count: int, *, in_order: bool) -> tuple[Group, ...] | None:
        """The first `count` groups that nobody took: in question order, or those that ended first. None before that."""
        rows = (self.left if in_order else self._whole)[:count]
        if len(rows) < count or not set(rows) <= set(self._whole):
            return None
        for row in rows:
            self.left.remove(row)
            self._whole.remove(row)
        return tuple(self._group(row) for row in sorted(rows))

    def _group(self, row: int) -> Group:
        episodes, self._rows[row] = self._rows[row], {}
        return Group(row, self._questions[row], tuple(episodes[rollout] for rollout in range(self._rollouts)))


async def _at_once() -> None:
    """Admission without conditions."""


class Scheduler:
    """Runs the episodes of `steps` between entering it and leaving it, which ends those that still run.

    An episode of step s starts once the sampler holds the weights of version s - `max_policy_lag`, so its oldest call
    is at most that much older than the weights it trains. Episodes start in the order of steps, questions, rollouts:
    siblings meet in the sampler and share its prompt cache, and what the learner waits for goes first. Each holds
    `in_flight` while it runs, which bounds them in all steps together, and whatever else holds it, such as an
    evaluation. A waiting one costs memory only, for the sampler decides which of them hold an accelerator slot. Of what
    has ended, at most 1 + `max_policy_lag` steps are kept for the learner.

    `questions_of(step)` is asked twice and has to give the same. `admit()` is awaited before each start, and holds it
    back for as long as it does not return (say, while memory is short); those in flight go on.
    """

    def __init__(
        self,
        questions_of: Callable[[int], Sequence[Question]],
        run_episode: RunEpisode,
        *,
        steps: range,
        rollouts: int,
        in_flight: asyncio.Semaphore,
        max_policy_lag: int = 0,
        admit: Callable[[], Awaitable[None]] = _at_once,
    ) -> None:
        self._questions_of, self._run_episode = questions_of, run_episode
        self._steps, self._rollouts, self._lag = steps, rollouts, max_policy_lag
        self._admit = admit
        self._in_flight = in_flight
        self._newest = steps.start - 1  # the last step whose episodes may start
        self._newer = asyncio.Event()
        self._ended: dict[int, asyncio.Queue[tuple[int, Episode] | None]] = collections.defaultdict(asyncio.Queue)
        self._gathering: dict[int, _Gathering] = {}
        self._reported: set[str] = set()
        self._starting: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Scheduler:
        self._starting = asyncio.create_task(self._start_all())
        self._starting.add_done_callback(lambda _: [ended.put_nowait(None) for ended in self._ended.values()])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._starting.cancel()
        await asyncio.wait([self._starting])
        if not self._starting.cancelled():
            self._starting.exception()  # `take` has raised it where anybody waited

    async def take(
        self, step: int, count: int = 0, on_episode: Callable[[Episode], None] = lambda episode: None
    ) -> tuple[Group, ...]:
        """The next `count` groups of `step` (0 = all that are left), in question order, once all of their episodes have
        ended. Without lag the next ones are those of the next questions; with lag, those that end first.

        Says too that the sampler now draws with the weights of version `step`, which lets later steps start.
        `on_episode` sees each episode that has ended (for progress); it must not block. An episode whose oldest call
        is older than the lag allows is `StopReason.STALE`.

        Raises what broke the scheduler, if anything did: no episode can.
        """
        self._newest = max(self._newest, step + self._lag)
        self._newer.set()
        if step not in self._gathering:
            self._gathering[step] = _Gathering(self._questions_of(step), self._rollouts)
        gathering = self._gathering[step]
        count = count or len(gathering.left)
        while (groups := gathering.take(count, in_order=not self._lag)) is None:
            row, episode = await self._next(step)
            episode = self._judged(episode, step)
            gathering.add(row, episode)
            on_episode(episode)
        if not gathering.left:
            del self._gathering[step]
            self._ended.pop(step, None)
        return groups

    async def _next(self, step: int) -> tuple[int, Episode]:
        ended = self._ended[step]
        item = None if self._starting.done() and ended.empty() else await ended.get()
        if item is not None:
            return item
        self._starting.result()
        raise AssertionError(f"step {step} is not one of {self._steps}, or was taken before")

    async def _start_all(self) -> None:
        try:
            async with asyncio.TaskGroup() as episodes:
                async for step, row, question, rollout in self._next_starts():
                    episodes.create_task(self._one(step, row, question, rollout))
                    await asyncio.sleep(0)  # openings are encoded one at a time; others get their turn in between
        except ExceptionGroup as broken:  # of one: episodes do not raise
            raise broken.exceptions[0] from None

    async def _next_starts(self) -> AsyncIterator[tuple[int, int, Question, int]]:
        """(step, row, question, rollout) of each episode, when it is time to start it."""
        for step in self._steps:
            while step > self._newest:
                self._newer.clear()
                await self._newer.wait()
            for row, question in enumerate(self._questions_of(step)):
                for rollout in range(self._rollouts):
                    await self._in_flight.acquire()
                    await self._admit()
                    yield step, row, question, rollout

    async def _one(self, step: int, row: int, question: Question, rollout: int) -> None:
        """The one place that catches everything: a defect in one episode is recorded and counted, and the others go on.

        The traceback of a defect is logged once, however many episodes it hits."""
        try:
            episode = await self._run_episode(step, question, rollout)
        except Exception as error:  # noqa: BLE001
            detail = f"{type(error).__name__}: {error}"
            if detail not in self._reported:
                self._reported.add(detail)
                log.exception("episode failed: question %s, rollout %d", question.id, rollout)
            episode = Episode(question, rollout, (), (), StopReason.INFRASTRUCTURE, detail=detail)
        finally:
            self._in_flight.release()
        self._ended[step].put_nowait((row, episode))

    def _judged(self, episode: Episode, step: int) -> Episode:
        lag = policy_lag(episode, step)
        if lag <= self._lag:
            return episode
        detail = f"drawn with weights {lag} steps older than those it would train; allowed: {self._lag}"
        return dataclasses.replace(episode, stop=StopReason.STALE, detail=detail)


async def run_groups(
    questions: Sequence[Question],
    *,
    rollouts: int,
    run_episode: Callable[[Question, int], Awaitable[Episode]],
    in_flight: asyncio.Semaphore,
    admit: Callable[[], Awaitable[None]] = _at_once,
    on_episode: Callable[[Episode], None] = lambda episode: None,
) -> tuple[Group, ...]:
    """The groups of `questions`, in their order: one step alone, such as an evaluation."""
    async with Scheduler(
        lambda step: questions,
        lambda step, question, rollout: run_episode(question, rollout),
        steps=range(1),
        rollouts=rollouts,
        in_flight=in_flight,
        admit=admit,
    ) as scheduler:
        return await scheduler.take(0, on_episode=on_episode)


def check_health(groups: Sequence[Group], *, max_infra_fraction: float) -> None:
    """Raises `RolloutHalted` where too many episodes failed for outside reasons: such a step must not be trained on."""
    episodes = [episode for group in groups for episode in group.episodes]
    failed = [episode for episode in episodes if not episode.trainable and episode.stop is not StopReason.STALE]
    if len(failed) <= max_infra_fraction * len(episodes):
        return
    kinds = sorted({f.kind for e in failed for use in e.tool_uses for f in use.failures if f.infrastructure})
    details = sorted({e.detail for e in failed if e.detail})[:3]
    raise RolloutHalted(
        f"{len(failed)} of {len(episodes)} episodes failed for outside reasons (allowed: {max_infra_fraction:.0%}); "
        f"this step was not trained on. Failures: {', '.join([*kinds, *details]) or 'unknown'}. "
        "Mend the provider or network and start the same command again: it resumes from the last checkpoint."
    )
