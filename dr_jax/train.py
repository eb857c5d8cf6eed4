"""Trains a policy to research, from rollouts on the web to a Hugging Face export.

    python -m dr_jax.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.section.field=value ...]

One directory owns a run: `config.json`, `metrics.jsonl`, TensorBoard events, `rollouts/`, `checkpoints/`, `export/`,
`plot.png` and `summary.json`. The same command resumes it, or says that it is finished; another config is refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import json
import logging
import operator
import pathlib
import sys
import time
from collections.abc import Awaitable, Sequence
from typing import Any

from absl import flags

from dr_jax import assemble, entry, evaluate, hosts, metrics, preemption, report, run_config, workdirs
from dr_jax.agent import episode
from dr_jax.engine.service import Engine
from dr_jax.learner.checkpoint import Checkpoints
from dr_jax.learner.state import TrainState, abstract_state, init_state
from dr_jax.metrics import Outcome
from dr_jax.model import hf
from dr_jax.records import Episode, Question
from dr_jax.rollout import journal, scheduler
from dr_jax.rollout.scheduler import Group, Scheduler
from dr_jax.run_config import RunConfig
from dr_jax.task.questions import QuestionOrder
from dr_jax.update import Update
from dr_jax.web.budget import Spent

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Standing:
    """Where a run stands. All of it is in the checkpoint, so that a resumed run is the same run."""

    state: TrainState
    step: int  # optimizer steps done
    cursor: int  # questions taken
    today: str  # the date told to the policy, fixed for the whole run
    train_seconds: float
    infra_failures: int

    def meta(self, run: RunConfig) -> dict[str, Any]:
        """What the checkpoint says beside the arrays."""
        kept = {field: getattr(self, field) for field in ("step", "cursor", "today", "train_seconds", "infra_failures")}
        return kept | {"config": run_config.as_dict(run)}


class Trainer:
    """One run: owns its workdir (locked), checkpoints, log, engine and train step until `close`."""

    def __init__(self, run: RunConfig, workdir: pathlib.Path):
        self.run, self.workdir, self.own = run, workdir, hosts.own(workdir)
        with hosts.agreed():
            assemble.check(run)
            hosts.check(run)
            train, self.heldout = assemble.questions(run)
            self.order = QuestionOrder(train, run.seed)
            self.device = assemble.device(run)
            self._lock = workdirs.claim(workdir, run) if hosts.first() else None
            self.own.mkdir(parents=True, exist_ok=True)
        self.alarm = hosts.Alarm(hosts.longest_silence_s(run))
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep=run.checkpoint.keep, failed=hosts.fail)
        self.standing = self._restore()
        self.saved = self.standing.step  # its newest checkpoint
        # Before the log forgets the steps that the checkpoint does not know.
        self.spent = Spent(*hosts.gather(dataclasses.astuple(workdirs.spent(workdir)))[0])
        last_step = self.standing.step or -1  # a run that starts over also evaluates again
        self._log = metrics.MetricsLog(workdir, last_step=last_step) if hosts.first() else None
        self.update = Update(run, self.device)

    def _restore(self) -> Standing:
        device = self.device
        if self.checkpoints.latest() is None:
            state = init_state(
                device.params, device.config, device.optim, device.mesh, device.rules, seed=self.run.seed
            )
            today = hosts.gather(datetime.datetime.now(datetime.UTC).date().isoformat())[0]
            return Standing(state, step=0, cursor=0, today=today, train_seconds=0.0, infra_failures=0)
        abstract = abstract_state(device.config, device.optim, device.mesh, device.rules)
        state, meta = self.checkpoints.restore(abstract)
        return Standing(
            state, meta["step"], meta["cursor"], meta["today"], meta["train_seconds"], meta["infra_failures"]
        )

    def close(self) -> None:
        self.alarm.close()
        self.checkpoints.close()
        if self._log and self._lock:
            self._log.close()
            self._lock.close()

    def log(self, values: dict[str, float], host: assemble.Host) -> None:
        """Writes the line of a step: with what all hosts have spent by now, and how the first one is."""
        values = values | hosts.total(host.budget.metrics()) | host.health()
        if self._log:
            self._log.write(self.standing.step, values)

    async def train(self, host: assemble.Host, engine: Engine, *, until: int) -> None:
        """Optimizer steps up to `until`, with evaluations and checkpoints where the config asks for them."""
        standing, run = self.standing, self.run
        lines = report.Progress(steps=run.steps, done=standing.step)
        await asyncio.to_thread(self.give_weights, engine)
        if standing.step == 0:
            await self.evaluate(host, engine, lines)
        async with preemption.listening() as present, self.rollouts(host, engine, until) as rollouts:
            while standing.step < until:
                started_s = time.monotonic()
                try:
                    values = await self.step(host, engine, rollouts, present)
                except preemption.Preempted:
                    break
                standing.train_seconds += time.monotonic() - started_s
                lines.step(values)
                due = run.eval.every_steps and standing.step % run.eval.every_steps == 0
                if due or standing.step == run.steps:
                    values |= await self.evaluate(host, engine, lines)
                await asyncio.to_thread(self.log, values, host)  # evaluations are paid too
                if standing.step % run.checkpoint.every_steps == 0:
                    await asyncio.to_thread(self.keep)
        await asyncio.to_thread(self.keep)

    def keep(self) -> None:
        """Saves the last step, if it is not saved. Runs in a thread."""
        if self.saved < self.standing.step:
            self.saved = self.standing.step
            self.checkpoints.save(self.saved, self.standing.state, self.standing.meta(self.run))

    async def step(
        self, host: assemble.Host, engine: Engine, rollouts: Scheduler, present: preemption.Preemption
    ) -> dict[str, float]:
        """One optimizer step on the next questions: rollouts, packed rows, update, new weights to the engine.

        The update begins with the first part of the groups, while the others still run (`batch.parts`)."""
        run, standing = self.run, self.standing
        started_s = time.monotonic()
        self.alarm.put_off()
        await asyncio.to_thread(hosts.agree, host.budget.begin_step)
        ours = len(hosts.share(range(run.rollout.questions)))
        groups: list[Group] = []
        with report.episodes_bar(ours * run.rollout.rollouts, f"step {standing.step + 1}") as bar:
            for part in range(run.batch.parts):
                taken = await present.unless(
                    rollouts.take(standing.step, ours // run.batch.parts, on_episode=lambda episode: bar.update(1))
                )
                groups += taken
                self.alarm.put_off()
                if part < run.batch.parts - 1:
                    await asyncio.to_thread(self.update.add, standing.state, taken)
        groups.sort(key=operator.attrgetter("row"))
        generated_s = time.monotonic()
        await asyncio.to_thread(self.check_health, host, groups)
        standing.state, learned = await asyncio.to_thread(self.update.finish, standing.state, taken)
        await asyncio.to_thread(self.update.check, learned)
        learned_s = time.monotonic()
        self.alarm.put_off()
        standing.step += 1
        standing.cursor += run.rollout.questions
        await asyncio.to_thread(self.give_weights, engine)
        episodes = [e for group in groups for e in group.episodes]
        await asyncio.to_thread(journal.write, self.own / "rollouts", standing.step, episodes)
        everywhere = await asyncio.to_thread(_outcomes, [group.episodes for group in groups])
        summary = metrics.rollout_summary(everywhere, step=standing.step - 1)
        standing.infra_failures += int(summary["infra_failures"])
        step_s = time.monotonic() - started_s
        tokens = sum(outcome.tokens for group in everywhere for outcome in group)
        return (
            summary
            | learned
            | {
                "num_tokens": float(tokens),
                "timing_s/gen": generated_s - started_s,
                "timing_s/update_actor": learned_s - generated_s,
                "timing_s/step": step_s,
                "perf/tokens_per_s": tokens / step_s,
            }
        )

    def rollouts(self, host: assemble.Host, engine: Engine, until: int) -> Scheduler:
        """This host's episodes from here to step `until`, each a function of its questions' place in the order."""
        run, standing = self.run, self.standing
        size, first, start = run.rollout.questions, standing.step, standing.cursor

        def cursor(step: int) -> int:
            return start + (step - first) * size

        def run_episode(step: int, question: Question, rollout: int) -> Awaitable[Episode]:
            seed = episode.seed_of(run.seed, cursor(step))  # a question met again in a later epoch is drawn anew
            context = host.context(run, engine, seed=seed, today=standing.today, priority=step)
            return episode.run(question, rollout, context)

        return Scheduler(
            lambda step: hosts.share(self.order.take(cursor(step), size)),
            run_episode,
            steps=range(first, until),
            rollouts=run.rollout.rollouts,
            in_flight=host.in_flight,
            max_policy_lag=run.rollout.max_policy_lag,
            admit=host.admission.wait,
        )

    def check_health(self, host: assemble.Host, groups: Sequence[Group]) -> None:
        """Raises `RolloutHalted` on all hosts where one must not train on this step. Runs in a thread: it waits."""
        with hosts.agreed():
            host.budget.check()
            scheduler.check_health(groups, max_infra_fraction=self.run.rollout.max_infra_fraction)

    def give_weights(self, engine: Engine) -> None:
        """Hands the current parameters to this host's engine, on the devices. Runs in a thread."""
        engine.set_weights(self.device.to_engine(self.standing.state.params), self.standing.step)

    async def evaluate(self, host: assemble.Host, engine: Engine, lines: report.Progress) -> dict[str, float]:
        """Held-out scores under the current weights, named 'eval/...'; those of step 0 are logged here."""
        self.alarm.put_off()
        questions = hosts.share(self.heldout)
        with report.episodes_bar(len(questions), "evaluation") as bar:
            episodes = await evaluate.heldout(
                self.run, host, engine, questions, today=self.standing.today, on_episode=lambda e: bar.update(1)
            )
        self.alarm.put_off()
        # Scores of the questions that were still paid for are not those of all.
        await asyncio.to_thread(hosts.agree, host.budget.check)
        outcomes = [outcome for theirs in await asyncio.to_thread(_outcomes, [episodes]) for outcome in theirs]
        self.standing.infra_failures += sum(outcome.infra_failures for outcome in outcomes)
        values = {f"eval/{name}": value for name, value in evaluate.scores(outcomes).items()}
        lines.note(f"held-out F1 {values['eval/f1']:.3f} over {len(outcomes)} questions (step {self.standing.step})")
        if self.standing.step == 0:
            await asyncio.to_thread(self.log, values, host)
        return values

    def finish(self) -> dict[str, Any]:
        """Exports, plots and writes `summary.json`; returns it."""
        run, device = self.run, self.device
        self.alarm.close()
        export = self.workdir / "export"
        if not hosts.gather(export.exists())[0]:
            hf.save(
                self.standing.state.params, device.config, base_dir=assemble.model_path(run), out_dir=export,
                dtype=run.export.dtype, max_shard_bytes=run.export.max_shard_gb * 1e9,
            )  # fmt: skip
        return hosts.gather(self._summary(export) if hosts.first() else None)[0]

    def _summary(self, export: pathlib.Path) -> dict[str, Any]:
        plot = report.plot(self.workdir)
        rows = metrics.read(self.workdir / "metrics.jsonl")
        evaluations = [row for row in rows if row.get("eval/f1") is not None]
        summary = {
            "f1_before": evaluations[0]["eval/f1"],
            "f1_after": evaluations[-1]["eval/f1"],
            "steps": self.standing.step,
            "train_seconds": round(self.standing.train_seconds, 1),
            "infra_failures": self.standing.infra_failures,
            "export": str(export),
            "plot": str(plot),
        }
        (self.workdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(_table(evaluations[0], evaluations[-1]))
        return summary


def _outcomes(groups: Sequence[Sequence[Episode]]) -> list[list[Outcome]]:
    """What is counted of the episodes of all hosts: the groups of the first, then those of the next."""
    ours = [[dataclasses.asdict(metrics.outcome(e)) for e in group] for group in groups]
    return [[Outcome(**one) for one in group] for theirs in hosts.gather(ours) for group in theirs]


def main(argv: Sequence[str] | None = None) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Directory that owns the run.", flag_values=values, required=True)
    flags.DEFINE_integer(
        "stop_after",
        None,
        "Stop after this many more optimizer steps, to go on later.",
        lower_bound=1,
        flag_values=values,
    )
    flags.DEFINE_string(
        "coordinator", "", "ip:port of process 0, where the cluster does not tell; 'auto' where it does.",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_integer("processes", None, "How many hosts take part.", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0, flag_values=values)
    return entry.run(_train, values, about=__doc__, argv=argv)


def _train(run: RunConfig, values: flags.FlagValues) -> None:
    hosts.join(run, coordinator=values.coordinator, processes=values.processes, process=values.process)
    with hosts.one_for_all():
        workdir = pathlib.Path(values.workdir)
        hosts.check_shared(workdir)
        _run(run, workdir, values.stop_after)


def _run(run: RunConfig, workdir: pathlib.Path, stop_after: int | None) -> None:
    done = workdir / "summary.json"
    if hosts.gather(done.exists())[0]:
        with hosts.agreed():
            if hosts.first():
                workdirs.claim(workdir, run).close()
        print(f"finished: {run.steps} steps are done in {workdir}; choose another --workdir to train again")
        print(json.dumps(json.loads(done.read_text())))
        return
    trainer = Trainer(run, workdir)
    try:
        until = run.steps
        if stop_after is not None:
            until = min(until, trainer.standing.step + stop_after)
        left = until - trainer.standing.step
        if cost := assemble.cost_usd(run, left):
            print(f"{left} steps cost at most {cost:,.2f} USD; {trainer.spent.usd:,.2f} USD are spent", flush=True)
        asyncio.run(_session(trainer, until))
        if trainer.standing.step == run.steps:
            print(json.dumps(trainer.finish()))
        else:
            print(f"stopped after step {trainer.standing.step} of {run.steps}; the same command goes on from there")
    finally:
        trainer.close()


async def _session(trainer: Trainer, until: int) -> None:
    run, share = trainer.run, dict(index=hosts.index(), count=hosts.count())
    async with assemble.host(run, trainer.own, trainer.spent, **share) as host:
        async with assemble.engine(run, trainer.device, host) as engine:
            with hosts.one_for_all():
                await trainer.train(host, engine, until=until)


def _table(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = ("f1", "em", "cover_em", "tool_calls", "answered")
    rows = [(name, before[f"eval/{name}"], after[f"eval/{name}"]) for name in names]
    return report.table(("held out, greedy", "before", "after"), rows)


if __name__ == "__main__":
    sys.exit(main())
