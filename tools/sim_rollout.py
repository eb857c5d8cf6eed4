"""A run on a pod in simulated time: the real scheduler, and models of what it schedules (engines, learner, web).

Hours take seconds: nothing waits in real time, and the same seed gives the same run. What is modelled, and from what:

    chips      peak FLOPs and HBM bandwidth of `dr_jax.chips`; a chip runs one program at a time, the learner's too
    programs   their seconds as `sim_costs.py` says
    prefill    siblings share a prompt, a turn prefills what is new, and after a change of weights the whole history of
               an episode is prefilled again
    learner    whole micro-batches, on all chips at once; episodes are placed in rows by the real packer, and what rows
               lack is paid too
    policy     tool calls, turns and observations as in `Load`, the same for every way of scheduling
    web        log-normal latency, some of it failing after the tool's last second, as in `Load`
"""

from __future__ import annotations

import asyncio
import bisect
import collections
import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
from sim_costs import Costs

from dr_jax.agent.transcript import seed_of
from dr_jax.records import Call, Episode, Finish, Question, Role, StopReason
from dr_jax.rollout.pack import place
from dr_jax.rollout.scheduler import Scheduler


@dataclasses.dataclass(frozen=True)
class Load:
    """What is asked for. The paper's: 256 questions x 16 rollouts, about 3 tool calls each."""

    questions: int = 256
    rollouts: int = 16
    prompt_tokens: int = 1000  # system, tools, question
    mean_calls: float = 3.0  # tool calls of an episode; its question decides: 1 + Poisson of a log-normal mean
    max_calls: int = 9  # of 10 turns, the last one answers
    turn_tokens: tuple[float, float] = (200.0, 0.6)  # of the policy, log-normal: median, sigma; at most 2,000
    observation_tokens: tuple[int, int] = (2587, 1155)  # of a search, of a page: measured on the reference's own
    web_s: tuple[float, float] = (1.5, 1.575)  # log-normal: median; this sigma puts 5% over 20 s
    web_max_s: float = 100.0  # of one tool call: 20 s of the network, and up to 60 in line for a site, retries apart
    web_failed: float = 0.01  # after the last second
    deadline_s: float = 1800.0  # of one episode
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Turn:
    """One call of an episode, and the tool call after it."""

    output_tokens: int
    web_s: float
    observation_tokens: int  # 0 = this was the answer


def script(load: Load, question: str, rollout: int) -> list[Turn]:
    """The turns of one episode: a function of its names alone."""
    of_question = np.random.default_rng(seed_of(load.seed, question))
    mean = (load.mean_calls - 1) * of_question.lognormal(-0.125, 0.5)
    rng = np.random.default_rng(seed_of(load.seed, question, rollout))
    calls = min(1 + rng.poisson(mean), load.max_calls)
    turns = []
    for call in range(calls + 1):
        median, sigma = load.turn_tokens
        output = int(min(max(16, rng.lognormal(math.log(median), sigma)), 2000))
        median_s, sigma = load.web_s
        wait_s = min(rng.lognormal(math.log(median_s), sigma), load.web_max_s)
        wait_s = load.web_max_s if rng.random() < load.web_failed else wait_s
        last = call == calls
        turns.append(Turn(output, 0.0 if last else wait_s, 0 if last else load.observation_tokens[call % 2]))
    return turns


class Chips:
    """The chips of one host: one program at a time, in the order of asking. `busy` lists (start, end, what) in s."""

    def __init__(self) -> None:
        self.busy: list[tuple[float, float, str]] = []
        self.free = asyncio.Lock()

    async def work(self, seconds: float, what: str) -> None:
        """Occupies the chips, which the caller holds (`free`)."""
        start_s = asyncio.get_running_loop().time()
        await asyncio.sleep(seconds)
        self.busy.append((start_s, start_s + seconds, what))


@dataclasses.dataclass(eq=False)
class _Sequence:
    to_prefill: int
    length: int  # tokens in the cache once prefilled
    left: int  # to draw
    step: int  # of its episode
    done: asyncio.Future[int]


class SimulatedEngine:
    """Continuous batching over slots: rounds of at most one prefill and some decode steps, as `engine.service`."""

    ROUND_STEPS, PREFILL_TOKENS = 16, 4 * 1024  # configs/deepresearcher_7b.py

    def __init__(self, costs: Costs, chips: Chips, *, slots: int) -> None:
        self._costs, self._chips, self._slots = costs, chips, slots
        self.version = 0
        self._waiting: list[_Sequence] = []
        self._serving: list[_Sequence] = []
        self._work = asyncio.Event()

    async def generate(self, kept: int, new: int, output: int, *, step: int = 0) -> int:
        """Draws `output` tokens after `kept` cached and `new` tokens; returns the version of the weights.

        Those of the lowest `step` come first."""
        sequence = _Sequence(new, kept + new, output, step, asyncio.get_running_loop().create_future())
        bisect.insort(self._waiting, sequence, key=operator.attrgetter("step"))
        self._work.set()
        return await sequence.done

    async def serve(self) -> None:
        while True:
            while self._waiting and len(self._serving) < self._slots:
                self._serving.append(self._waiting.pop(0))
            if not self._serving:
                self._work.clear()
                await self._work.wait()
                continue
            async with self._chips.free:
                await self._chips.work(self._round_s(), "engine")
            for sequence in [s for s in self._serving if not s.left and not s.done.done()]:
                sequence.done.set_result(self.version)
            self._serving = [s for s in self._serving if not s.done.done()]

    def _round_s(self) -> float:
        """Prefills and decodes a round, and says how long it takes."""
        seconds, room, pairs = 0.0, self.PREFILL_TOKENS, 0.0
        for sequence in self._serving:
            piece = min(sequence.to_prefill, room)
            pairs += piece * (sequence.length - sequence.to_prefill + piece / 2)
            sequence.to_prefill, room = sequence.to_prefill - piece, room - piece
        if room < self.PREFILL_TOKENS:
            seconds += self._costs.prefill_s(self.PREFILL_TOKENS - room, pairs)
        drawing = [s for s in self._serving if not s.to_prefill and s.left]
        steps = min(self.ROUND_STEPS, max((s.left for s in drawing), default=0))
        if steps:
            seconds += steps * self._costs.decode_s(sum(s.length for s in drawing) + len(drawing) * steps // 2)
        for sequence in drawing:
            drawn = min(steps, sequence.left)
            sequence.left, sequence.length = sequence.left - drawn, sequence.length + drawn
        return seconds


@dataclasses.dataclass
class Report:
    """What a simulated run did: `steps` (start, end of the update, in s), and per host what its chips did."""

    lag: int
    steps: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    busy: list[list[tuple[float, float, str]]] = dataclasses.field(default_factory=list)
    stops: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def window_s(self) -> tuple[float, float]:
        """Between the ends of two updates: the pipeline is full, and not yet running dry."""
        return self.steps[self.lag][1], self.steps[-1 - self.lag][1]

    def step_s(self) -> float:
        start_s, end_s = self.window_s()
        return (end_s - start_s) / (len(self.steps) - 1 - 2 * self.lag)

    def busy_fraction(self, what: str = "") -> float:
        """Of the chips' seconds in the window; of one kind of program where `what` names it."""
        start_s, end_s = self.window_s()
        seconds = sum(_overlap(a, b, start_s, end_s) for host in self.busy for a, b, k in host if what in ("", k))
        return seconds / (len(self.busy) * (end_s - start_s))

    def busy_over_time(self, bin_s: float) -> Iterator[tuple[float, float, float]]:
        """(time in s, busy with the engine, busy with the learner) of each bin of the whole run."""
        edges = np.arange(0.0, self.steps[-1][1] + bin_s, bin_s)
        sums = {kind: np.zeros(len(edges) - 1) for kind in ("engine", "learner")}
        for start_s, end_s, kind in (interval for host in self.busy for interval in host):
            for i in range(int(start_s / bin_s), min(int(end_s / bin_s) + 1, len(edges) - 1)):
                sums[kind][i] += _overlap(start_s, end_s, edges[i], edges[i + 1])
        whole = bin_s * len(self.busy)
        yield from zip(edges[:-1].tolist(), sums["engine"] / whole, sums["learner"] / whole, strict=True)


def _overlap(a_s: float, b_s: float, start_s: float, end_s: float) -> float:
    return max(0.0, min(b_s, end_s) - max(a_s, start_s))


Train = Callable[["Pod", int, int], Coroutine[Any, Any, None]]  # of a host, for some steps


class Pod:
    """Hosts with an engine each and one learner over all; an episode lives on one host."""

    def __init__(self, costs: Costs, load: Load, *, slots: int, lag: int = 0) -> None:
        self.costs, self.load, self.report = costs, load, Report(lag)
        self.chips = [Chips() for _ in range(costs.hosts)]
        self.engines = [SimulatedEngine(costs, chips, slots=slots) for chips in self.chips]
        self.report.busy = [chips.busy for chips in self.chips]
        self.meet = asyncio.Barrier(costs.hosts)
        self._lengths: list[list[int]] = [[] for _ in self.chips]  # of each host's episodes that are to be learned
        self._placed: list[tuple[list[list[int]], ...]] = [() for _ in self.chips]
        self._attended: list[list[list[int]]] = [[] for _ in self.chips]  # by lengths of row: of each micro-batch
        self._prompts: set[tuple[int, str, int]] = set()

    def questions(self, host: int, step: int) -> list[Question]:
        each = self.load.questions // len(self.engines)
        return [Question(f"{step}/{host}/{i}", "?", ("a",)) for i in range(each)]

    async def turn(self, host: int, question: str, turn: Turn, context: int, new: int, kept: int | None) -> int:
        """Draws a turn of which `new` tokens were written since the last call, which weights `kept` drew."""
        engine, step = self.engines[host], int(question.partition("/")[0])
        if kept != engine.version:  # all of it is prefilled again, but for what a sibling has been here with
            opening = (host, question, engine.version)
            new = context - (self.load.prompt_tokens if opening in self._prompts else 0)
            self._prompts.add(opening)
        return await engine.generate(context - new, new, turn.output_tokens, step=step)

    async def episode(self, host: int, question: Question, rollout: int) -> Episode:
        calls: list[Call] = []
        context, new, kept = self.load.prompt_tokens, self.load.prompt_tokens, None
        stop = StopReason.DEADLINE
        try:
            async with asyncio.timeout(self.load.deadline_s):
                for turn in script(self.load, question.id, rollout):
                    kept = await self.turn(host, question.id, turn, context, new, kept)
                    calls.append(_call(len(calls), context, turn.output_tokens, kept))
                    await asyncio.sleep(turn.web_s)
                    context, new = context + turn.output_tokens + turn.observation_tokens, turn.observation_tokens
                stop = StopReason.ANSWERED
        except TimeoutError:
            pass
        return Episode(question, rollout, tuple(calls), (), stop)

    async def learn(self, host: int, step: int, episodes: list[Episode], *, last: bool = True) -> None:
        """Some of an update, by all hosts together, once the last of them is there: as `dr_jax.update`."""
        self.report.stops.update(str(e.stop) for e in episodes)
        lengths = self._lengths[host]
        lengths += [len(e.calls[-1].prompt) + len(e.calls[-1].output) for e in episodes if e.calls]
        self._placed[host] = placed = place(lengths, rows=len(lengths), lengths=self.costs.rows)
        await self.meet.wait()
        sizes = [self.costs.micro_rows(length) for length in self.costs.rows]
        filled = [[len(rows) for rows in everywhere] for everywhere in zip(*self._placed, strict=True)]
        counts = [-(-max(n) // size) if last else min(n) // size for n, size in zip(filled, sizes, strict=True)]
        ready = [rows[: n * size] for rows, n, size in zip(placed, counts, sizes, strict=True)]
        self._attended[host] = [
            self.costs.attended([[lengths[number] for number in row] for row in rows], length)
            for rows, length in zip(ready, self.costs.rows, strict=True)
        ]
        await self.meet.wait()
        side_by_side = (
            itertools.zip_longest(*everywhere, fillvalue=0) for everywhere in zip(*self._attended, strict=True)
        )
        micro_batches = [max(pairs) for each in side_by_side for pairs in each]
        done = [number for rows in ready for row in rows for number in row]
        self._lengths[host] = [] if last else np.delete(lengths, done).tolist()
        if not (any(counts) or last):
            return
        async with self.chips[host].free:
            await self.meet.wait()
            start_s = asyncio.get_running_loop().time()
            await self.chips[host].work(self.costs.learner_s(micro_batches), "learner")
            if last:
                self.engines[host].version = step + 1
        await self.meet.wait()
        if last and host == 0:
            self.report.steps.append((start_s, asyncio.get_running_loop().time()))
        await self.meet.wait()

    async def run(self, train: Train) -> Report:
        """Eight steps of a full pipeline, and those before and after them."""
        steps = 9 + 2 * self.report.lag
        serving = [asyncio.create_task(engine.serve()) for engine in self.engines]
        async with asyncio.TaskGroup() as hosts:
            for host in range(self.costs.hosts):
                hosts.create_task(train(self, host, steps))
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
        return self.report


def scheduled(*, in_flight: int, max_policy_lag: int, parts: int = 1) -> Train:
    """How a host of ours works: the real scheduler, and the training loop's order of things (`batch.parts`)."""

    async def train(pod: Pod, host: int, steps: int) -> None:
        async with Scheduler(
            lambda step: pod.questions(host, step),
            lambda step, question, rollout: pod.episode(host, question, rollout),
            steps=range(steps),
            rollouts=pod.load.rollouts,
            in_flight=asyncio.Semaphore(in_flight),
            max_policy_lag=max_policy_lag,
        ) as scheduler:
            for step in range(steps):
                for part in range(1, parts + 1):
                    groups = await scheduler.take(step, len(pod.questions(host, step)) // parts)
                    await pod.learn(host, step, [e for group in groups for e in group.episodes], last=part == parts)

    return train


async def lock_step(pod: Pod, host: int, steps: int) -> None:
    """The baseline: every host generates the turn of all its episodes, all hosts wait for all tools, and so on."""
    for step in range(steps):
        live = [
            _Marching(question, rollout, script(pod.load, question.id, rollout), pod.load.prompt_tokens)
            for question in pod.questions(host, step)
            for rollout in range(pod.load.rollouts)
        ]
        for _ in range(pod.load.max_calls + 1):
            turning = [one for one in live if len(one.calls) < len(one.turns)]
            await asyncio.gather(*(one.generate(pod, host) for one in turning))
            await pod.meet.wait()
            await asyncio.sleep(max((one.turns[len(one.calls) - 1].web_s for one in turning), default=0.0))
            await pod.meet.wait()
        done = [Episode(one.question, one.rollout, tuple(one.calls), (), StopReason.ANSWERED) for one in live]
        await pod.learn(host, step, done)


class _Marching:
    """An episode of the baseline."""

    def __init__(self, question: Question, rollout: int, turns: list[Turn], prompt_tokens: int) -> None:
        self.question, self.rollout, self.turns = question, rollout, turns
        self.calls: list[Call] = []
        self._context = self._new = prompt_tokens
        self._kept: int | None = None

    async def generate(self, pod: Pod, host: int) -> None:
        turn = self.turns[len(self.calls)]
        self._kept = await pod.turn(host, self.question.id, turn, self._context, self._new, self._kept)
        self.calls.append(_call(len(self.calls), self._context, turn.output_tokens, self._kept))
        self._context += turn.output_tokens + turn.observation_tokens
        self._new = turn.observation_tokens


_NO_TOKENS = np.zeros(40_000, np.int32)  # of which a call shows as many as it would have


def _call(id: int, prompt: int, output: int, version: int) -> Call:
    tokens = _NO_TOKENS
    return Call(
        id, None, Role.POLICY, tokens[:prompt], tokens[:prompt], tokens[:output], tokens[:output], Finish.STOP,
        version, 0.0, 0.0,
    )  # fmt: skip
