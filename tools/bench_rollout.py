"""How busy rollouts keep the chips, and what thousands of them cost a host: `python tools/bench_rollout.py [--json]`.

The first part runs the real scheduler in simulated time (`sim_rollout.py` says what is modelled and from what), with
several policy lags and against a lock-step baseline. The second, the load, runs 4,096 episodes of 3 turns through the
real host pipeline (agent, search client, fetcher, parsers, cache) on the embedded web, with a scripted sampler.
Prints tables and draws `--plot`; with `--json` one line of JSON after them."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import pathlib
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import sim_rollout
from instruments import lag_ms, memory_mb, p99

from dr_jax import assemble, run_config
from dr_jax.agent import episode
from dr_jax.records import Episode, Question, StopReason
from dr_jax.rollout import scheduler
from dr_jax.run_config import RunConfig
from dr_jax.testing import ScriptedSampler, run_in_no_time
from dr_jax.world.pages import url

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
SLOTS = 64  # of each host's engine: configs/deepresearcher_7b_v5p128.py
IN_FLIGHT = 1024  # of the load: configs/deepresearcher_7b.py


# Simulated time -----------------------------------------------------------------------------------------------------


def simulate(
    load: sim_rollout.Load, costs: sim_rollout.Costs, lags: list[int], all_parts: list[int], oversubscription: int
) -> dict[str, sim_rollout.Report]:
    """Lock-step, then each lag with the update in so many parts."""

    def run(train: Any, lag: int) -> sim_rollout.Report:
        async def main() -> sim_rollout.Report:
            return await sim_rollout.Pod(costs, load, slots=SLOTS, lag=lag).run(train)

        return run_in_no_time(main())

    reports = {"lock-step": run(sim_rollout.lock_step, 0)}
    for lag, parts in itertools.product(lags, all_parts):
        train = sim_rollout.scheduled(in_flight=oversubscription * SLOTS, max_policy_lag=lag, parts=parts)
        reports[f"lag {lag}, {parts} part{'s' * (parts > 1)}"] = run(train, lag)
    return reports


def table(reports: Mapping[str, sim_rollout.Report]) -> str:
    """Step time, its ratio to lock-step, and what the chips did."""
    lines = ["                  step s  x lock-step  busy   engine s  learner s  idle s  stale or late"]
    slowest_s = reports["lock-step"].step_s()
    for name, report in reports.items():
        step_s, parts = report.step_s(), [report.busy_fraction(what) for what in ("", "engine", "learner")]
        lost = sum(count for stop, count in report.stops.items() if stop != StopReason.ANSWERED)
        lines.append(
            f"{name:<16}{step_s:>8.1f}  {slowest_s / step_s:>11.2f}  {parts[0]:.3f}  {parts[1] * step_s:>8.1f}"
            f"  {parts[2] * step_s:>9.1f}  {(1 - parts[0]) * step_s:>6.1f}  {lost:>13}"
        )
    return "\n".join(lines)


def draw(reports: Mapping[str, sim_rollout.Report], path: pathlib.Path, bin_s: float = 5.0) -> None:
    """Busy fraction over time, one panel for each way of scheduling."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(reports), 1, figsize=(10, 1.7 * len(reports) + 0.6), sharex=True, constrained_layout=True
    )
    end_s = max(report.window_s()[1] for name, report in reports.items() if name != "lock-step")
    for axis, (name, report) in zip(axes, reports.items(), strict=True):
        time_s, engine, learner = zip(*report.busy_over_time(bin_s), strict=True)
        axis.stackplot(
            time_s, engine, learner, step="post", colors=["#1f5f8b", "#d9822b"], labels=["rollouts", "update"]
        )
        axis.set(ylim=(0, 1), xlim=(0, end_s), ylabel="busy")
        axis.set_title(
            f"{name}: {report.step_s():.0f} s a step, busy {report.busy_fraction():.0%}", loc="left", fontsize=10
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(loc="upper right", ncols=2, fontsize=8)
    axes[-1].set_xlabel("simulated seconds")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# The load -----------------------------------------------------------------------------------------------------------


def load_config() -> RunConfig:
    """The quickstart's run, its web on loopback, with the full preset and its long prompts and observations."""
    config = runpy.run_path(str(QUICKSTART))["get_config"]()
    config.agent.preset = "deepresearcher"
    config.agent.deadline_s = 600.0
    config.engine.context = config.batch.row_tokens = 32_768
    return run_config.resolve(config.to_dict())


def _turns(entity: str) -> list[str]:
    def call(tool: str, **arguments: list[str]) -> str:
        payload = json.dumps({"name": tool, "arguments": arguments})
        return f" look</think>\n<tool_call>\n{payload}\n</tool_call><|im_end|>"

    answer = f" enough</think>\n<answer> {entity}</answer><|im_end|>"
    return [call("web_search", query=[entity]), call("browse_webpage", url_list=[url(entity)]), answer]


async def load(episodes: int, rollouts: int = 16) -> dict[str, float]:
    """Episodes of 3 turns, each about an entity of its own while the world has one."""
    run = load_config()
    names = sorted(assemble.embedded_world().entities)
    questions = [Question(str(i), f"Who or what is it? ({i})", ("it",)) for i in range(episodes // rollouts)]
    with tempfile.TemporaryDirectory() as workdir:
        async with assemble.host(run, pathlib.Path(workdir)) as host:

            async def one(question: Question, rollout: int) -> Episode:
                entity = names[(int(question.id) * rollouts + rollout) % len(names)]
                sampler = ScriptedSampler([host.chat.markup(turn) for turn in _turns(entity)])
                return await episode.run(question, rollout, host.context(run, sampler, seed=0, today="2026-01-01"))

            start_s = time.monotonic()
            async with lag_ms() as lags:
                groups = await scheduler.run_groups(
                    questions, rollouts=rollouts, run_episode=one, in_flight=asyncio.Semaphore(IN_FLIGHT)
                )
            seconds = time.monotonic() - start_s
    done = [e for group in groups for e in group.episodes]
    whole = [e for e in done if e.trainable and e.stop is StopReason.ANSWERED and len(e.tool_uses) == 2]
    return {
        "episodes": len(done),
        "seconds": seconds,
        "rss_mb": memory_mb("VmHWM"),
        "lost": episodes // rollouts * rollouts - len(whole),
        "lag_p99_ms": p99(lags),
        "lag_max_ms": max(lags),
        "tokens": sum(len(e.calls[-1].prompt) + len(e.calls[-1].output) for e in done if e.calls),
    }


# The command --------------------------------------------------------------------------------------------------------


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one line of JSON after the tables")
    parser.add_argument("--plot", type=pathlib.Path, help="where to draw busy fractions over time (a PNG)")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2], help="policy lags to simulate")
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 16], help="parts of the update, with each lag")
    parser.add_argument("--rows", type=int, nargs="+", default=[32768], help="tokens of the learner's rows, rising")
    parser.add_argument("--oversubscription", type=int, default=4, help="episodes in flight for each slot")
    parser.add_argument("--questions", type=int, default=256, help="of a simulated step, 16 rollouts each")
    parser.add_argument("--decode_over_floor", type=float, default=1.5, help="decode time over its bandwidth floor")
    parser.add_argument("--episodes", type=int, default=4096, help="of the load")
    parser.add_argument("--load_only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load_only:
        print(json.dumps(asyncio.run(load(options.episodes))))
        return
    costs = sim_rollout.Costs(decode_over_floor=options.decode_over_floor, rows=tuple(options.rows))
    asked = dataclasses.replace(sim_rollout.Load(), questions=options.questions)
    reports = simulate(asked, costs, options.lags, options.parts, options.oversubscription)
    print(table(reports))
    if options.plot:
        draw(reports, options.plot)
    command = [sys.executable, __file__, "--load_only", "--episodes", str(options.episodes)]
    loaded = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    print("\nload  " + "  ".join(f"{name} {value:,.1f}" for name, value in loaded.items()))
    if options.json:
        print(json.dumps(summary(reports, loaded)))


def summary(reports: Mapping[str, sim_rollout.Report], loaded: Mapping[str, float]) -> dict[str, Any]:
    """The last run's figures, those of every one, and the load."""
    slowest_s = reports["lock-step"].step_s()
    runs = {
        name: {
            "busy_fraction": round(report.busy_fraction(), 4),
            "step_s": round(report.step_s(), 2),
            "speedup_vs_lockstep": round(slowest_s / report.step_s(), 3),
        }
        for name, report in reports.items()
    }
    name, last = list(runs.items())[-1]
    return {
        "of": name,
        "busy_fraction": last["busy_fraction"],
        "speedup_vs_lockstep": last["speedup_vs_lockstep"],
        "load": {name: round(value, 2) for name, value in loaded.items()},
        "runs": runs,
    }


if __name__ == "__main__":
    main()
