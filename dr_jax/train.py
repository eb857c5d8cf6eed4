"""Trains a policy to research, from rollouts on the web to a Hugging Face export.

    python -m dr_jax.train --config=configs/quickstart.py --workdir=runs/quickstart [--config.section.field=value ...]

One directory owns a run: `config.json`, `metrics.jsonl`, TensorBoard events, `rollouts/`, `checkpoints/`, `export/`,
`plot.png` and `summary.json`. The same command resumes it, or says that it is finished; another config is refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import fcntl
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from dr_jax import assemble, entry, evaluate, metrics, report, run_config
from dr_jax.agent import episode
from dr_jax.batch import PackedBatch
from dr_jax.engine.service import Engine
from dr_jax.errors import ConfigError
from dr_jax.learner.checkpoint import Checkpoints
from dr_jax.learner.state import TrainState, abstract_state, init_state
from dr_jax.learner.step import make_train_step, put_batch
from dr_jax.model import hf
from dr_jax.records import Question
from dr_jax.rollout import journal, scheduler
from dr_jax.rollout.advantages import group_advantages
from dr_jax.rollout.pack import pack_by_length, segments
from dr_jax.rollout.scheduler import Group
from dr_jax.run_config import RunConfig
from dr_jax.task.questions import QuestionOrder
from dr_jax.web.budget import NOTHING_SPENT, Spent


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
        self.run, self.workdir = run, workdir
        assemble.check(run)
        train, self.heldout = assemble.questions(run)
        self.order = QuestionOrder(train, run.seed)
        self.device = assemble.device(run)
        self._lock = claim(workdir, run)
        self.checkpoints = Checkpoints(workdir / "checkpoints", keep=run.checkpoint.keep)
        self.standing = self._restore()
        self.spent = spent(workdir)  # before the log forgets the steps that the checkpoint does not know
        self.log = metrics.MetricsLog(
            workdir, last_step=self.standing.step or -1
        )  # a run that starts over also evaluates again
        device = self.device
        self.train_step = make_train_step(
            device.config, device.grpo, device.mesh, device.rules, optim=device.optim, micro_rows=run.batch.micro_rows,
            compute_dtype=run.model.dtype, remat=run.model.remat, kernel=run.model.attention,
            compiler=run.model.compiler,
        )  # fmt: skip

    def _restore(self) -> Standing:
        device = self.device
        if self.checkpoints.latest() is None:
            state = init_state(
                device.params, device.config, device.optim, device.mesh, device.rules, seed=self.run.seed
            )
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            return Standing(state, step=0, cursor=0, today=today, train_seconds=0.0, infra_failures=0)
        abstract = abstract_state(device.config, device.optim, device.mesh, device.rules)
        state, meta = self.checkpoints.restore(abstract)
        return Standing(
            state, meta["step"], meta["cursor"], meta["today"], meta["train_seconds"], meta["infra_failures"]
        )

    def close(self) -> None:
        self.checkpoints.close()
        self.log.close()
        self._lock.close()

    async def train(self, host: assemble.Host, engine: Engine, *, until: int) -> None:
        """Optimizer steps up to `until`, with evaluations and checkpoints where the config asks for them."""
        standing, run = self.standing, self.run
        lines = report.Progress(steps=run.steps, done=standing.step)
        await asyncio.to_thread(engine.set_weights, standing.state.params, standing.step)
        if standing.step == 0:
            await self.evaluate(host, engine, lines)
        while standing.step < until:
            started_s = time.monotonic()
            values = await self.step(host, engine)
            standing.train_seconds += time.monotonic() - started_s
            lines.step(values)
            due = run.eval.every_steps and standing.step % run.eval.every_steps == 0
            if due or standing.step == run.steps:
                values |= await self.evaluate(host, engine, lines)
            self.log.write(standing.step, values | host.budget.metrics())  # evaluations are paid too
            if standing.step % run.checkpoint.every_steps == 0 or standing.step in (until, run.steps):
                await asyncio.to_thread(self.checkpoints.save, standing.step, standing.state, standing.meta(run))

    async def step(self, host: assemble.Host, engine: Engine) -> dict[str, float]:
        """One optimizer step on the next questions: rollouts, packed rows, update, new weights to the engine."""
        run, standing = self.run, self.standing
        started_s = time.monotonic()
        host.budget.begin_step()
        questions = self.order.take(standing.cursor, run.rollout.questions)
        groups = await self.rollouts(host, engine, questions)
        generated_s = time.monotonic()
        host.budget.check()
        scheduler.check_health(groups, max_infra_fraction=run.rollout.max_infra_fraction)
        batches = self.pack(groups)
        learned = await asyncio.to_thread(self.learn, batches)
        learned_s = time.monotonic()
        standing.step += 1
        standing.cursor += len(questions)
        await asyncio.to_thread(engine.set_weights, standing.state.params, standing.step)
        episodes = [e for group in groups for e in group.episodes]
        await asyncio.to_thread(journal.write, self.workdir / "rollouts", standing.step, episodes)
        summary = metrics.rollout_summary([group.episodes for group in groups])
        standing.infra_failures += int(summary["infra_failures"])
        step_s = time.monotonic() - started_s
        tokens = sum(len(e.calls[-1].prompt) + len(e.calls[-1].output) for e in episodes if e.calls)
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

    async def rollouts(self, host: assemble.Host, engine: Engine, questions: Sequence[Question]) -> tuple[Group, ...]:
        run, standing = self.run, self.standing
        seed = episode.seed_of(run.seed, standing.cursor)  # a question met again in a later epoch is drawn anew
        context = host.context(run, engine, seed=seed, today=standing.today)
        with report.episodes_bar(len(questions) * run.rollout.rollouts, f"step {standing.step + 1}") as bar:
            return await scheduler.run_groups(
                questions,
                rollouts=run.rollout.rollouts,
                run_episode=lambda question, rollout: episode.run(question, rollout, context),
                max_in_flight=run.rollout.max_in_flight,
                on_episode=lambda episode: bar.update(1),
            )

    def pack(self, groups: Sequence[Group]) -> tuple[PackedBatch, ...]:
        """The checked batches of one step, by length of row; episodes that an outage touched are left out.

        `equal_groups='skip'` also leaves out the groups that say nothing about the policy, and with them their tokens
        in the loss's denominator: DAPO's filter (arXiv 2503.14476, section 3.2) without drawing others in their place.
        """
        run, rows = self.run, []
        for group in groups:
            trainable = [e.trainable for e in group.episodes]
            rewards = [e.reward for e in group.episodes]
            advantages = group_advantages(rewards, trainable, normalise=run.grpo.advantage)
            if run.grpo.equal_groups == "skip" and not advantages.any():
                continue
            for e, advantage in zip(group.episodes, advantages, strict=True):
                if e.trainable:
                    rows += segments(e, float(advantage))
        lengths = (*run.batch.shorter_rows, run.batch.row_tokens)
        batches = pack_by_length(rows, rows=run.batch.rows, lengths=lengths)
        for batch in batches:
            batch.check()
        return batches

    def learn(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """Updates the state (which is donated) and returns the learner's metrics. Runs in a thread."""
        device = self.device
        rows = tuple(put_batch(batch, device.mesh, device.rules) for batch in batches)
        reference = device.params if device.grpo.kl_coef > 0 else None
        self.standing.state, values = self.train_step(self.standing.state, reference, rows)
        return {name: float(value) for name, value in jax.device_get(values).items()}

    async def evaluate(self, host: assemble.Host, engine: Engine, lines: report.Progress) -> dict[str, float]:
        """Held-out scores under the current weights, named 'eval/...'; those of step 0 are logged here."""
        with report.episodes_bar(len(self.heldout), "evaluation") as bar:
            episodes = await evaluate.heldout(
                self.run, host, engine, self.heldout, today=self.standing.today, on_episode=lambda e: bar.update(1)
            )
        host.budget.check()  # scores of the questions that were still paid for are not those of all
        self.standing.infra_failures += sum(e.infra_failures for e in episodes)
        values = {f"eval/{name}": value for name, value in evaluate.scores(episodes).items()}
        lines.note(f"held-out F1 {values['eval/f1']:.3f} over {len(episodes)} questions (step {self.standing.step})")
        if self.standing.step == 0:
            self.log.write(0, values | host.budget.metrics())
        return values

    def finish(self) -> dict[str, Any]:
        """Exports, plots and writes `summary.json`; returns it."""
        run, device = self.run, self.device
        export = self.workdir / "export"
        if not export.exists():
            hf.save(
                self.standing.state.params, device.config, base_dir=assemble.model_path(run), out_dir=export,
                dtype=run.export.dtype, max_shard_bytes=run.export.max_shard_gb * 1e9,
            )  # fmt: skip
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


def spent(workdir: pathlib.Path) -> Spent:
    """What the run in `workdir` has spent, as far as its log knows; what is repeated after a crash is paid twice."""
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "budget/run_usd" in row]
    if not rows:
        return NOTHING_SPENT
    last = rows[-1]
    return Spent(int(last["budget/run_calls"]), int(last["budget/run_bytes"]), last["budget/run_usd"])


def claim(workdir: pathlib.Path, run: RunConfig) -> Any:
    """Locks the workdir for this process and records its config there. Close the result to let go.

    Raises:
      ConfigError: another process trains there, or the workdir belongs to a run with another config.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / ".lock", "w")  # noqa: SIM115  (held until the run closes it)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"--workdir: another process is training in {workdir}; wait for it, or choose another"
        ) from error
    path, ours = workdir / "config.json", run_config.as_dict(run)
    if path.exists():
        # A budget may be raised under way: it decides how far a run gets, not what it learns.
        lines = run_config.difference(json.loads(path.read_text()) | {"budget": ours["budget"]}, ours)
        if lines:
            raise ConfigError(
                f"--workdir: {workdir} was made by another config; nothing was changed. Choose another workdir, or "
                "undo the difference:\n  " + "\n  ".join(lines)
            )
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(ours, indent=1) + "\n")
    partial.replace(path)
    return lock


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
    return entry.run(_train, values, about=__doc__, argv=argv)


def _train(run: RunConfig, values: flags.FlagValues) -> None:
    workdir = pathlib.Path(values.workdir)
    done = workdir / "summary.json"
    if done.exists():
        claim(workdir, run).close()
        print(f"finished: {run.steps} steps are done in {workdir}; choose another --workdir to train again")
        print(json.dumps(json.loads(done.read_text())))
        return
    trainer = Trainer(run, workdir)
    try:
        until = run.steps
        if values.stop_after is not None:
            until = min(until, trainer.standing.step + values.stop_after)
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
    async with assemble.host(trainer.run, trainer.workdir, trainer.spent) as host:
        async with assemble.engine(trainer.run, trainer.device, host) as engine:
            await trainer.train(host, engine, until=until)


def _table(before: dict[str, Any], after: dict[str, Any]) -> str:
    names = ("f1", "em", "cover_em", "tool_calls", "answered")
    rows = [(name, before[f"eval/{name}"], after[f"eval/{name}"]) for name in names]
    return report.table(("held out, greedy", "before", "after"), rows)


if __name__ == "__main__":
    sys.exit(main())
