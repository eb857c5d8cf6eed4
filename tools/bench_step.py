"""What one optimizer step costs on a CPU against Tunix's, on the same checkpoint and batch, in turns.

    python tools/bench_step.py --vs_tunix=VENV [--cases=default,vocab32k,ragged] [--turns=3] [--json]

VENV is a virtual environment with Tunix in it (`pip install torch==2.13.0 google-tunix==0.1.7 jax==0.10.2
flax==0.12.8`); without it only our own figures are printed. Each run is a process of its own. Compared are CPU seconds
of a step (the least of some) and peak memory over that of the process with the model loaded, as ratios ours / Tunix:
the medians of the turns. Loss and gradient norm of both are printed, and have to agree to five digits.

The work: 16 rollouts of 128 + 384 tokens, a random Qwen2.5 of 6 layers and 256 channels in f32, GRPO with a KL
coefficient of 0.04, AdamW. 'vocab32k' has a vocabulary of 32,768 instead of 4,096; 'ragged' has answers of
log-normal lengths, which Tunix pads and we pack.

    python tools/bench_step.py --scaling [--json]

times the step of 'default' for more and more rows, two in a micro-batch, with a straight line through them, and the
compiler for more and more layers.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

PROMPT, ANSWER, ROLLOUTS = 128, 384, 16
KL_COEF = 0.04
# Vocabulary, ragged answers, and rows of one of our micro-batches: all 16 at once, as Tunix takes them, unless packing
# leaves rows empty.
CASES = {"default": (4096, False, 16), "vocab32k": (32768, False, 16), "ragged": (4096, True, 2)}
CHUNK, REMAT = 1024, "mlp"  # of our side
SCALING_ROWS, SCALING_LAYERS = (2, 4, 8, 16, 32), (2, 6, 12, 24)
INSTALL = "bin/pip install torch==2.13.0 google-tunix==0.1.7 jax==0.10.2 flax==0.12.8"
STEPS = 3  # of each run; the first, which compiles, comes before them
SIZES = dict(
    num_hidden_layers=6, hidden_size=256, intermediate_size=688, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-6, rope_theta=1_000_000.0, max_position_embeddings=4096, tie_word_embeddings=False,
)  # fmt: skip


def batch(vocabulary: int, ragged: bool) -> dict[str, np.ndarray]:
    """Prompts, answers with their mask, advantages, and the noise of the log-probabilities they were sampled with."""
    rng = np.random.default_rng(0)
    prompt_bt = rng.integers(2, vocabulary, (ROLLOUTS, PROMPT)).astype(np.int32)
    answer_bt = rng.integers(2, vocabulary, (ROLLOUTS, ANSWER)).astype(np.int32)
    mask_bt = np.ones((ROLLOUTS, ANSWER), np.int32)
    if ragged:  # a long tail of lengths: one full, the others about four tenths of it
        length_b = np.clip(rng.lognormal(np.log(0.4 * ANSWER * 0.8), 0.6, ROLLOUTS), 16, ANSWER).astype(int)
        length_b[0] = ANSWER
        mask_bt = (np.arange(ANSWER)[None] < length_b[:, None]).astype(np.int32)
        answer_bt = answer_bt * mask_bt
    advantage_b = rng.normal(size=ROLLOUTS).astype(np.float32)
    noise_bt = 0.01 * rng.normal(size=(ROLLOUTS, ANSWER)).astype(np.float32)
    return dict(prompt=prompt_bt, answer=answer_bt, mask=mask_bt, advantage=advantage_b, noise=noise_bt)


def make_checkpoint(directory: pathlib.Path, vocabulary: int) -> None:
    """A random checkpoint in Hugging Face's format; weights large enough that a mistake shows."""
    import jax

    from dr_jax.model import hf, weights
    from dr_jax.model.config import ModelConfig

    directory.mkdir()
    told = SIZES | dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2", vocab_size=vocabulary)
    (directory / "config.json").write_text(json.dumps(told))
    config, rng = ModelConfig.from_hf(directory), np.random.default_rng(0)

    def leaf(row: weights.Weight) -> jax.Array:
        middle, width = dict(normal=(0, 0.05), ones=(1, 0.1), zeros=(0, 0.1))[row.init]
        return jax.numpy.asarray(middle + width * rng.normal(size=weights.shape(row, config)).astype(np.float32))

    params = weights.tree(config, leaf)
    hf.save(params, config, base_dir=directory, out_dir=directory / "hf", dtype="float32", max_shard_bytes=5e9)


def ours(directory: pathlib.Path, vocabulary: int, ragged: bool, micro_rows: int) -> dict[str, float]:
    """Our side: the train step that a run jits, the reference's forward pass in it."""
    import jax

    from dr_jax.learner.grpo import GrpoConfig, token_logps
    from dr_jax.learner.head import Head
    from dr_jax.learner.optim import OptimConfig
    from dr_jax.learner.state import init_state
    from dr_jax.learner.step import make_train_step, put_batch
    from dr_jax.model import hf, letters
    from dr_jax.model.config import ModelConfig
    from dr_jax.rollout.pack import Segment, pack

    mesh, rules = letters.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}), letters.DEFAULT_RULES
    config, given = ModelConfig.from_hf(directory), batch(vocabulary, ragged)
    reference = hf.load(directory, config, dtype="float32", mesh=mesh, rules=rules)
    base_mb = resident_mb()

    def packed(logp_bt: np.ndarray, row_tokens: int, rows: int) -> Any:
        segments = []
        for i, length in enumerate(given["mask"].sum(1)):
            untrained = np.zeros(PROMPT, np.float32)
            token = np.concatenate([given["prompt"][i], given["answer"][i, :length]])
            weight = np.concatenate([untrained, np.full(length, 1 / length, np.float32)])  # each answer counts the same
            logp = np.concatenate([untrained, logp_bt[i, :length]])
            segments.append(Segment(token, weight, logp, float(given["advantage"][i])))
        return pack(segments, rows=rows, row_tokens=row_tokens)

    def logps(rows: Any) -> dict[float, np.ndarray]:
        """Of the answers, by advantage, which no two rollouts share."""
        with jax.set_mesh(mesh):
            logp_bt, _ = jax.jit(lambda params: token_logps(Head(config, rules), params, rows))(reference)
        return {a: np.asarray(logp_bt)[(rows.advantage_bt == np.float32(a)) & (rows.weight_bt > 0)]
                for a in given["advantage"].tolist()}  # fmt: skip

    nothing_bt = np.zeros_like(given["noise"])
    alone = logps(packed(nothing_bt, PROMPT + ANSWER, ROLLOUTS))  # told apart by their padding: nothing shares a row
    old_bt = given["noise"].copy()
    for i, logp in enumerate(alone.values()):
        old_bt[i, : len(logp)] += logp
    row_tokens = PROMPT + ANSWER
    rows = packed(old_bt, row_tokens, ROLLOUTS)
    together = logps(rows)
    apart = max(np.abs(alone[a] - together[a]).max() for a in alone)
    optim = OptimConfig(weight_decay=1e-4, max_grad_norm=1e9)  # optax's default; Tunix does not clip here
    step = make_train_step(
        config, GrpoConfig(kl_coef=KL_COEF), mesh, rules, optim=optim, micro_rows=micro_rows, chunk=CHUNK, remat=REMAT
    )
    state, placed = init_state(reference, config, optim, mesh, rules), put_batch(rows, mesh, rules)
    kept = [state]

    def once() -> tuple[float, float]:
        kept[0], metrics = step(kept[0], reference, placed)
        return float(metrics["loss"]), float(metrics["grad_norm"])

    return measure(once, base_mb) | {"packed_logp_diff": float(apart)}


def tunix_sizes(vocabulary: int) -> Any:
    """`SIZES` as Tunix wants to be told of them."""
    import jax.numpy as jnp
    from tunix.models.qwen2 import model as models

    return models.ModelConfig(
        num_layers=SIZES["num_hidden_layers"], vocab_size=vocabulary, embed_dim=SIZES["hidden_size"],
        hidden_dim=SIZES["intermediate_size"], num_heads=SIZES["num_attention_heads"],
        head_dim=SIZES["hidden_size"] // SIZES["num_attention_heads"], num_kv_heads=SIZES["num_key_value_heads"],
        rope_theta=int(SIZES["rope_theta"]), norm_eps=SIZES["rms_norm_eps"], use_tied_embedding=False,
        dtype=jnp.float32, param_dtype=jnp.float32,
    )  # fmt: skip


def tunix(directory: pathlib.Path, vocabulary: int, ragged: bool, _: int) -> dict[str, float]:
    """Tunix's side: its GRPO loss, its trainer's jitted step, and the reference's log-probabilities that it needs."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.qwen2 import params as loading
    from tunix.rl import common, function_registry
    from tunix.rl import trainer as trainers
    from tunix.rl.agentic.agentic_grpo_learner import GRPOConfig
    from tunix.sft import peft_trainer

    sizes = tunix_sizes(vocabulary)
    model = loading.create_model_from_safe_tensors(str(directory), sizes, dtype=jnp.float32)
    reference = nnx.split(nnx.clone(model))
    base_mb = resident_mb()
    given = {name: jnp.asarray(value) for name, value in batch(vocabulary, ragged).items()}
    logps = jax.jit(
        lambda state: common.compute_per_token_logps(
            reference[0], state, given["prompt"], given["answer"], pad_id=0, eos_id=1
        )
    )
    old_bt = logps(reference[1]) + given["noise"]
    # k3, as ours; its own default is log(policy / reference), whose gradient is another.
    how = GRPOConfig(num_generations=8, beta=KL_COEF, epsilon=0.2, kl_loss_mode="low_var_kl")
    how.temperature = 1.0
    settings = peft_trainer.TrainingConfig(eval_every_n_steps=10**9, max_steps=None, gradient_accumulation_steps=1)
    trainer = trainers.Trainer(
        model=model, optimizer=optax.adamw(1e-6), training_config=settings, custom_checkpoint_metadata_fn=dict
    )
    loss = function_registry.get_policy_loss_fn("grpo")
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algo_config, pad_id=0, eos_id=1
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda example: {"train_example": example, "algo_config": how})
    step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def once() -> tuple[float, float]:
        example = common.TrainExample(
            prompt_ids=given["prompt"], prompt_mask=given["prompt"] != 0, completion_ids=given["answer"],
            completion_mask=given["mask"], advantages=given["advantage"], old_per_token_logps=old_bt,
            ref_per_token_logps=logps(reference[1]),
        )  # fmt: skip
        value, _, norm = step(example)
        jax.block_until_ready(nnx.state(model))
        return float(value), float(norm)

    return measure(once, base_mb)


def measure(once: Callable[[], tuple[float, float]], base_mb: float) -> dict[str, float]:
    """One step that compiles, whose loss and gradient norm are kept, then some that are timed."""
    loss, grad_norm = once()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    cpu_s = []
    for _ in range(STEPS):
        started_s = time.process_time()
        once()
        cpu_s.append(time.process_time() - started_s)
    return dict(cpu_s=min(cpu_s), memory_mb=resident_mb("VmHWM") - base_mb, loss=loss, grad_norm=grad_norm)


def resident_mb(field: str = "VmRSS") -> float:
    """Of this process: now, or 'VmHWM' for the most since the peak was reset."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


def scaling(*_: Any) -> dict[str, Any]:
    """CPU seconds of a step by rows, the line through them, and CPU seconds of its compilation by layers."""
    import jax

    from dr_jax.batch import PackedBatch
    from dr_jax.learner.grpo import GrpoConfig
    from dr_jax.learner.optim import OptimConfig
    from dr_jax.learner.state import abstract_state, init_state
    from dr_jax.learner.step import make_train_step, put_batch
    from dr_jax.model import letters, weights
    from dr_jax.model.config import ModelConfig

    mesh, rules, optim = letters.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}), letters.DEFAULT_RULES, OptimConfig()

    def step_of(layers: int) -> tuple[ModelConfig, Callable]:
        config = ModelConfig.from_hf(
            SIZES | dict(model_type="qwen2", vocab_size=CASES["default"][0], num_hidden_layers=layers)
        )
        how = dict(optim=optim, micro_rows=2, chunk=CHUNK, remat=REMAT)
        return config, make_train_step(config, GrpoConfig(kl_coef=KL_COEF), mesh, rules, **how)

    def rows_of(count: int) -> PackedBatch:
        token_bt = np.random.default_rng(0).integers(2, CASES["default"][0], (count, PROMPT + ANSWER), np.int32)
        position_bt = np.broadcast_to(np.arange(token_bt.shape[1], dtype=np.int32), token_bt.shape)
        answer_bt = (position_bt >= PROMPT).astype(np.float32)
        one_bt = np.ones_like(answer_bt)
        return put_batch(PackedBatch(token_bt, one_bt.astype(np.int32), position_bt, answer_bt, -9 * answer_bt, one_bt),
                         mesh, rules)  # fmt: skip

    config, step = step_of(SIZES["num_hidden_layers"])
    reference, seconds = weights.init(config, jax.random.key(0)), {}
    for count in SCALING_ROWS:
        kept, rows = [init_state(reference, config, optim, mesh, rules)], rows_of(count)

        def once(kept: list = kept, rows: PackedBatch = rows) -> tuple[float, float]:
            kept[0], metrics = step(kept[0], reference, rows)
            return float(metrics["loss"]), float(metrics["grad_norm"])

        seconds[count] = measure(once, 0.0)["cpu_s"]
    compile_s = {}
    for layers in SCALING_LAYERS:
        config, step = step_of(layers)
        state = abstract_state(config, optim, mesh, rules)
        lowered = step.whole.lower(state, weights.abstract(config, "float32"), rows_of(SCALING_ROWS[0]))
        started_s = time.process_time()
        lowered.compile()
        compile_s[layers] = time.process_time() - started_s
    return {"cpu_s": seconds, **line_through(seconds), "compile_s": compile_s}


def line_through(seconds: dict[int, float]) -> dict[str, float]:
    """The line with the least relative errors: its seconds a row and at no row, and the greatest of the errors."""
    rows, cpu_s = np.array(list(seconds)), np.array(list(seconds.values()))
    (row_s, start_s), *_ = np.linalg.lstsq(np.stack([rows, np.ones_like(rows)], 1) / cpu_s[:, None], cpu_s / cpu_s)
    worst = np.abs((row_s * rows + start_s) / cpu_s - 1).max()
    return dict(row_s=float(row_s), start_s=float(start_s), worst_error=float(worst))


SIDES = {"ours": ours, "tunix": tunix, "scaling": scaling}


def run_side(python: str, side: str, case: str, directory: pathlib.Path) -> dict[str, float]:
    """The figures of one side, from a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    if side != "tunix":
        env["PYTHONPATH"] = str(pathlib.Path(__file__).parents[1])
    command = [python, "-W", "ignore", __file__, f"--side={side}", f"--cases={case}", f"--checkpoint={directory}"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {side}, {case}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(python: str, cases: Sequence[str], turns: int) -> dict[str, dict[str, float]]:
    """Ratios ours / Tunix by case; without Tunix's python, our own figures."""
    found = {}
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            directory = pathlib.Path(folder) / "checkpoint"
            make_checkpoint(directory, CASES[case][0])
            turn_of = [
                {side: run_side(command, side, case, directory / "hf")
                 for side, command in (("ours", sys.executable), ("tunix", python)) if command}
                for _ in range(turns)
            ]  # fmt: skip
        for side in turn_of[0]:
            middle = {name: statistics.median(turn[side][name] for turn in turn_of) for name in turn_of[0][side]}
            print(
                f"{case:<9} {side:<6}", "  ".join(f"{name} {value:.7g}" for name, value in middle.items()), flush=True
            )
        if python:
            found[case] = {
                f"{name}_ratio": round(statistics.median(t["ours"][of] / t["tunix"][of] for t in turn_of), 3)
                for name, of in (("cpu", "cpu_s"), ("rss", "memory_mb"))
            }
        else:
            found[case] = {name: turn_of[0]["ours"][name] for name in ("cpu_s", "memory_mb")}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vs_tunix", default="", metavar="VENV")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--scaling", action="store_true", help="cost by rows and by layers, without Tunix")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # a process of our own: one side, one case
    parser.add_argument("--checkpoint", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cases = args.cases.split(",")
    if unknown := [case for case in cases if case not in CASES]:
        print(f"error: --cases: unknown {unknown[0]!r}; allowed: {', '.join(CASES)}", file=sys.stderr)
        return 2
    python = str(pathlib.Path(args.vs_tunix) / "bin" / "python") if args.vs_tunix else ""
    if python and not os.access(python, os.X_OK):
        print(
            f"error: --vs_tunix: no {python}; make it: python3 -m venv {args.vs_tunix}, then {INSTALL}", file=sys.stderr
        )
        return 2
    if args.side:
        print(json.dumps(SIDES[args.side](args.checkpoint, *CASES[cases[0]])))
        return 0
    if args.scaling:
        found = run_side(sys.executable, "scaling", "default", pathlib.Path())
    else:
        found = compare(python, cases, args.turns)
    for case, figures in found.items():
        figures = figures if isinstance(figures, dict) else {"": figures}
        print(case, *(f"{name} {value:.4g}".strip() for name, value in figures.items()))
    if args.json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
