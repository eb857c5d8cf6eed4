"""How fast the engine samples, against Tunix's vanilla sampler on the same checkpoint and prompts, in turns.

    python tools/bench_engine.py --vs_tunix=VENV [--cases=full,group] [--turns=3] [--json]

VENV is a virtual environment with Tunix in it (`pip install torch==2.13.0 google-tunix==0.1.7 jax==0.10.2
flax==0.12.8`); without it only our own figures are printed. Compared are useful new tokens a second, the best of the
turns on both sides; `cpu` has the same ratios by CPU seconds, for a machine that others use too. Every turn has new
prompts, so nothing is found in our cache that the turn itself did not put there.

The work: a random Qwen2.5 of 6 layers and 256 channels in f32, at temperature 1.

    full                 16 prompts of 128 tokens, 128 new ones each
    cache2048            the same, Tunix's cache sized for the longest conversation (ours always is)
    half_stop            64 prompts of 128 tokens in a queue, 16 at a time; every other one stops at 16 of 128 tokens
    group                2 prompts of 1,024 tokens, 8 samples of 32 tokens each
    agentic_padded       16 trajectories of 4 turns: 32 new tokens, then 96 of an observation; Tunix pads prompts to the
                         next power of two
    agentic_documented   the same, padded to 1,024 as its documents say

Last, the hand-over of weights to the engine: alone, and how long samples in flight stand still for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.engine.service import Engine
from dr_jax.model import hf, weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import DEFAULT_RULES, make_mesh
from dr_jax.records import Finish, Sampled, Sampling

SIZES = dict(
    architectures=["Qwen2ForCausalLM"], model_type="qwen2", num_hidden_layers=6, hidden_size=256,
    intermediate_size=688, num_attention_heads=4, num_key_value_heads=2, vocab_size=4096, rms_norm_eps=1e-6,
    rope_theta=1_000_000.0, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip
ENGINE = dict(slots=16, context=2048, prefill_rows=16, prefill_chunk=128, decode_steps=16)
STOP_AT = 16
# (prompts, their tokens, new tokens)
WORK = {
    "full": (16, 128, 128),
    "cache2048": (16, 128, 128),
    "half_stop": (64, 128, 128),
    "group": (2, 1024, 32),
    "agentic_padded": (16, 128, 32),
    "agentic_documented": (16, 128, 32),
}
SAMPLES, TURNS, OBSERVATION = 8, 4, 96  # of each prompt of a group; of a trajectory; tokens


def make_checkpoint(directory: pathlib.Path) -> pathlib.Path:
    """A random checkpoint in Hugging Face's format."""
    base = directory / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(SIZES))
    config = ModelConfig.from_hf(base)
    params = weights.init(config, jax.random.key(0), jnp.float32)
    return hf.save(params, config, base_dir=base, out_dir=directory / "checkpoint", dtype="float32")


async def run(engine: Engine, case: str, prompts: list[list[int]], new: int) -> int:
    """Useful tokens of one turn on our side."""
    if case.startswith("agentic"):
        return sum(await asyncio.gather(*(_trajectory(engine, i, prompt, new) for i, prompt in enumerate(prompts))))
    budgets = [STOP_AT if case == "half_stop" and i % 2 == 0 else new for i in range(len(prompts))]
    asked = [engine.generate(prompt, Sampling(budgets[i], seed=i)) for i, prompt in enumerate(prompts)]
    return sum(_useful(sampled) for sampled in await asyncio.gather(*asked))


async def _trajectory(engine: Engine, number: int, prompt: list[int], new: int) -> int:
    text, useful = prompt, 0
    for turn in range(TURNS):
        sampled = await engine.generate(text, Sampling(new, seed=number * 7 + turn))
        useful += _useful(sampled)
        text = [*text, *sampled.tokens.tolist(), *[5] * OBSERVATION]
    return useful


def _useful(sampled: Sampled) -> int:
    assert sampled.finish is Finish.LENGTH, sampled.detail
    return len(sampled.tokens)


class Tunix:
    """Its sampler, in a process of its own."""

    def __init__(self, venv: pathlib.Path, checkpoint: pathlib.Path):
        driver = pathlib.Path(__file__).with_name("tunix_sampler.py")
        self.process = subprocess.Popen(
            [venv / "bin" / "python", "-W", "ignore", driver, checkpoint], text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def run(self, case: str, prompts: list[list[int]], new: int) -> dict[str, float]:
        """Seconds, CPU seconds and useful tokens of one turn."""
        job = dict(case=case, prompts=prompts, new=new, observation=OBSERVATION, turns=TURNS)
        print(json.dumps(job), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"Tunix's sampler ended with code {self.process.wait()} in case {case}")
        return json.loads(answer)


@contextlib.contextmanager
def opened(venv: pathlib.Path | None, checkpoint: pathlib.Path) -> Iterator[Tunix | None]:
    """Tunix's sampler, ended at the end; None without a virtual environment."""
    if venv is None:
        yield None
        return
    tunix = Tunix(venv, checkpoint)
    try:
        yield tunix
    finally:
        tunix.process.stdin.close()
        tunix.process.wait()


async def compare(engine: Engine, tunix: Tunix | None, case: str, turns: int) -> dict[str, list[dict[str, float]]]:
    """What each turn took on either side; the first one of Tunix compiles and is left out."""
    took: dict[str, list[dict[str, float]]] = {"ours": [], "tunix": []}
    for turn in range(turns + 1):
        count, length, new = WORK[case]
        rng = np.random.default_rng(turn)
        prompts = rng.integers(2, SIZES["vocab_size"], (count, length)).tolist()
        prompts = [prompt for prompt in prompts for _ in range(SAMPLES if case == "group" else 1)]
        started_s, cpu_s = time.perf_counter(), time.process_time()
        tokens = await run(engine, case, prompts, new)
        ours = dict(seconds=time.perf_counter() - started_s, cpu_s=time.process_time() - cpu_s, tokens=tokens)
        theirs = await asyncio.to_thread(tunix.run, case, prompts, new) if tunix else None
        if turn:
            took["ours"].append(ours)
            took["tunix"] += [theirs] if theirs else []
    return took


def rate(took: list[dict[str, float]], clock: str) -> float:
    """Useful tokens a second of the best turn."""
    return max(turn["tokens"] / turn[clock] for turn in took)


async def hand_over(engine: Engine, config: ModelConfig) -> dict[str, float]:
    """Milliseconds that new weights take, alone and while 16 sequences draw, with the tokens/s of those meanwhile."""
    params = weights.init(config, jax.random.key(1), jnp.float32)
    took_ms = []
    for version in range(5):
        started_s = time.perf_counter()
        await asyncio.to_thread(engine.set_weights, params, version)
        took_ms.append(1e3 * (time.perf_counter() - started_s))
    prompts = np.random.default_rng(0).integers(2, SIZES["vocab_size"], (16, 128)).tolist()
    drawing = asyncio.gather(*(engine.generate(prompt, Sampling(128)) for prompt in prompts))
    await asyncio.sleep(0.1)
    started_s = time.perf_counter()
    await asyncio.to_thread(engine.set_weights, params, 5)
    busy_ms = 1e3 * (time.perf_counter() - started_s)
    await drawing
    megabytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e6
    return {"mb": round(megabytes, 1), "idle_ms": round(min(took_ms), 2), "busy_ms": round(busy_ms, 2)}


async def bench(checkpoint: pathlib.Path, tunix: Tunix | None, cases: list[str], turns: int) -> dict[str, Any]:
    """The object of `--json`; prints a line for each case."""
    config = ModelConfig.from_hf(checkpoint)
    params = hf.load(checkpoint, config, dtype=jnp.float32)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1})
    figures: dict[str, Any] = dict.fromkeys(WORK)
    by_cpu: dict[str, float] = {}
    compiled: list[str] = []
    async with Engine(config, params, mesh=mesh, rules=DEFAULT_RULES, **ENGINE) as engine:
        await engine.generate([1], Sampling(2))  # once it answers it is warm
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: compiled.append(event) if "backend_compile" in event else None
        )
        print(f"{'case':<20}{'ours tok/s':>12}{'Tunix':>10}{'ratio':>8}{'by CPU s':>10}")
        for case in cases:
            took = await compare(engine, tunix, case, turns)
            line = f"{case:<20}{rate(took['ours'], 'seconds'):>12.0f}"
            if tunix:
                ratio, cpu = (rate(took["ours"], clock) / rate(took["tunix"], clock) for clock in ("seconds", "cpu_s"))
                figures[case], by_cpu[case] = round(ratio, 2), round(cpu, 2)
                line += f"{rate(took['tunix'], 'seconds'):>10.0f}{ratio:>8.2f}{cpu:>10.2f}"
            print(line, flush=True)
        figures["compiles_after_warmup"] = len(compiled)
        handed = await hand_over(engine, config)
    print(f"hand-over of {handed['mb']} MB: {handed['idle_ms']} ms, {handed['busy_ms']} ms while 16 sequences draw")
    return figures | {"cpu": by_cpu, "hand_over": handed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs_tunix", type=pathlib.Path, metavar="VENV")
    parser.add_argument("--cases", default=",".join(WORK), help="some of them, with commas between")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args()
    cases = args.cases.split(",")
    unknown = [case for case in cases if case not in WORK]
    if unknown:
        parser.error(f"--cases: unknown {', '.join(unknown)}; allowed are {', '.join(WORK)}")
    if args.vs_tunix and not (args.vs_tunix / "bin" / "python").exists():
        parser.error(f"--vs_tunix: {args.vs_tunix} is no virtual environment")
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = make_checkpoint(pathlib.Path(directory))
        with opened(args.vs_tunix, checkpoint) as tunix:
            figures = asyncio.run(bench(checkpoint, tunix, cases, args.turns))
    if args.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    sys.exit(main())
