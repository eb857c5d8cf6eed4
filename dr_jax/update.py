"""One optimizer step from groups of episodes, begun while others of its groups still run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import jax

from dr_jax import hosts
from dr_jax.assemble import Device
from dr_jax.batch import PackedBatch
from dr_jax.errors import Diverged
from dr_jax.learner.state import TrainState
from dr_jax.learner.step import Sums, make_train_step, put_batch
from dr_jax.records import Role
from dr_jax.rollout.advantages import group_advantages
from dr_jax.rollout.pack import Segment, fill, place, segments
from dr_jax.rollout.scheduler import Group
from dr_jax.run_config import RunConfig

MAX_SKIPPED = 3  # steps in a row without a finite gradient: the run does not heal by itself

log = logging.getLogger(__name__)


class Update:
    """The step of a run: `add` groups as they end, then `finish` with the last. Both run in a thread, on all hosts
    together.

    With `batch.parts` 1 it is one program, called at the end. With more, `add` learns at once what fills whole
    micro-batches on every host, and the rest waits for company: no row is computed that would not be otherwise.
    """

    def __init__(self, run: RunConfig, device: Device):
        self._run, self._device = run, device
        self._step = make_train_step(
            device.config, device.grpo, device.mesh, device.rules, optim=device.optim, micro_rows=run.batch.micro_rows,
            compute_dtype=run.model.dtype, remat=run.model.remat, kernel=run.model.attention,
            compiler=run.model.compiler,
        )  # fmt: skip
        self._lengths = (*run.batch.shorter_rows, run.batch.row_tokens)
        self._rows = run.batch.rows // hosts.count()
        self._reference = device.params if device.grpo.kl_coef > 0 else None
        self._waiting: list[Segment] = []
        self._reads: list[Segment] = []  # which take what room is left at the end
        self._sums: Sums | None = None
        self._skipped = 0  # steps in a row

    def add(self, state: TrainState, groups: Sequence[Group]) -> None:
        """Learns from `groups`, as far as they make whole micro-batches with those that wait."""
        self._take_in(groups)
        placed = place([len(segment.token) for segment in self._waiting], rows=self._rows, lengths=self._lengths)
        at_once = [
            self._run.batch.micro_rows * self._lengths[-1] // length // hosts.count() for length in self._lengths
        ]
        ours = [len(rows) // some for rows, some in zip(placed, at_once, strict=True)]
        agreed = [min(theirs) for theirs in zip(*hosts.gather(ours), strict=True)]
        if not any(agreed):
            return
        ready = [rows[: count * some] for rows, count, some in zip(placed, agreed, at_once, strict=True)]
        self._learn(state, self._filled(self._waiting, ready))
        learned = {number for rows in ready for row in rows for number in row}
        self._waiting = [segment for number, segment in enumerate(self._waiting) if number not in learned]

    def finish(self, state: TrainState, groups: Sequence[Group]) -> tuple[TrainState, dict[str, float]]:
        """The state after the step, with `groups` the last; `state` is donated. And the learner's metrics."""
        self._take_in(groups)
        every = [*self._waiting, *self._reads]
        placed = place(
            [len(segment.token) for segment in self._waiting], rows=self._rows, lengths=self._lengths,
            optional=[len(segment.token) for segment in self._reads],
        )  # fmt: skip
        if left_out := len(every) - sum(len(row) for rows in placed for row in rows):
            log.warning(
                "%d of %d calls of the reader are not trained: raise config.batch.rows", left_out, len(self._reads)
            )
        batches = self._filled(every, placed)
        self._waiting, self._reads = [], []
        return self.apply(state, batches)

    def apply(self, state: TrainState, batches: Sequence[PackedBatch]) -> tuple[TrainState, dict[str, float]]:
        """As `finish`, with these rows the last."""
        if self._run.batch.parts == 1:
            state, values = self._step(state, self._reference, self._put(batches))
        else:
            self._learn(state, batches)
            state, values = self._step.update(state, self._sums)
            self._sums = None
        learned = {name: float(value) for name, value in jax.device_get(values).items()}
        return state, learned

    def check(self, learned: Mapping[str, float]) -> None:
        """Raises `Diverged` for a loss or gradient that is not finite, for the third time in a row. The parameters are
        as before the first."""
        broken = learned["step/skipped"] and learned["step/weight"] > 0  # a step without trained tokens is skipped too
        self._skipped = self._skipped + 1 if broken else 0
        with hosts.agreed():
            if self._skipped == MAX_SKIPPED:
                raise Diverged(
                    f"loss or gradient were not finite in {MAX_SKIPPED} steps in a row; none of them changed the "
                    "parameters. Lower config.optim.lr or config.optim.grad_clip, or go on from an earlier checkpoint."
                )

    def _learn(self, state: TrainState, batches: Sequence[PackedBatch]) -> None:
        sums = self._step.nothing() if self._sums is None else self._sums
        self._sums = jax.block_until_ready(self._step.add(state, self._reference, self._put(batches), sums))

    def _filled(self, some: Sequence[Segment], placed: Sequence[Sequence[Sequence[int]]]) -> tuple[PackedBatch, ...]:
        batches = fill(some, placed, rows=self._rows, lengths=self._lengths)
        for batch in batches:
            batch.check()
        return batches

    def _put(self, batches: Sequence[PackedBatch]) -> tuple[PackedBatch, ...]:
        return tuple(put_batch(batch, self._device.mesh, self._device.rules) for batch in batches)

    def _take_in(self, groups: Sequence[Group]) -> None:
        """The segments of `groups`; episodes that an outage touched are left out.

        `equal_groups='skip'` also leaves out the groups that say nothing about the policy, and with them their tokens
        in the loss's denominator: DAPO's filter (arXiv 2503.14476, section 3.2) without drawing others in their place.
        """
        run = self._run
        for group in groups:
            trainable = [e.trainable for e in group.episodes]
            rewards = [e.reward for e in group.episodes]
            advantages = group_advantages(rewards, trainable, normalise=run.grpo.advantage)
            if run.grpo.equal_groups == "skip" and not advantages.any():
                continue
            for e, advantage in zip(group.episodes, advantages, strict=True):
                if e.trainable:
                    self._waiting += segments(e, float(advantage))
                    self._reads += segments(e, float(advantage), Role.READER) if run.reading.train else ()
