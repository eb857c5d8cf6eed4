"""Writes a checkpoint of a run as a Hugging Face directory that transformers and vLLM load.

    python tools/export_hf.py --workdir=runs/a --base_model=/models/Qwen2.5-7B-Instruct --out=/models/ours --verify

Runs on the host's CPU, beside a training run if need be. The last line is one JSON object.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from absl import flags

from dr_jax.errors import CheckpointError, ConfigError, DrJaxError
from dr_jax.learner.checkpoint import Checkpoints
from dr_jax.model import hf, weights
from dr_jax.model.config import ModelConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line about a mistake the user can correct."""
    argv = list(sys.argv if argv is None else argv)
    values = _flags()
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\nFlags:\n{values.get_help()}")
        return 0
    try:
        values(argv)
        print(json.dumps(export(values)))
    except (DrJaxError, flags.Error) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    return 0


def export(values: flags.FlagValues) -> dict[str, object]:
    """What the last line says: where the export lies, of which step, and how far its logits are from transformers'."""
    checkpoints, step = _place(values.workdir, values.checkpoint)
    config = ModelConfig.from_hf(values.base_model)
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    # The run's parameters are f32 whatever it computed in (learner.state.TrainState).
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host), weights.abstract(config, jnp.float32)
    )
    with Checkpoints(checkpoints) as opened:
        params, meta = opened.restore_params(abstract, step)
    out = hf.save(
        params, config, base_dir=values.base_model, out_dir=values.out, dtype=values.dtype,
        max_shard_bytes=values.max_shard_gb * 1e9,
    )  # fmt: skip
    said = {"export": str(out), "step": meta["step"], "parameters": weights.count(config), "dtype": values.dtype}
    return said | ({"max_logit_difference": hf.verify(out, config, params)} if values.verify else {})


def _place(workdir: str | None, checkpoint: str | None) -> tuple[pathlib.Path, int | None]:
    """(directory of checkpoints, step or None for the newest)."""
    if (workdir is None) == (checkpoint is None):
        raise ConfigError("give one of --workdir=RUN (its newest step) and --checkpoint=RUN/checkpoints/STEP")
    if workdir is not None:
        return pathlib.Path(workdir) / "checkpoints", None
    path = pathlib.Path(checkpoint)
    if not (path.name.isdigit() and path.is_dir()):
        raise CheckpointError(f"--checkpoint: {path} is not a step directory such as RUN/checkpoints/40")
    return path.parent, int(path.name)


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "The run; its newest checkpoint is exported.", flag_values=values)
    flags.DEFINE_string("checkpoint", None, "Or one step: RUN/checkpoints/STEP.", flag_values=values)
    flags.DEFINE_string("base_model", None, "Directory the run started from.", flag_values=values, required=True)
    flags.DEFINE_string("out", None, "Directory to write; new or empty.", flag_values=values, required=True)
    flags.DEFINE_string("dtype", "bfloat16", "Of the safetensors: bfloat16, float16 or float32.", flag_values=values)
    flags.DEFINE_float("max_shard_gb", 5.0, "Largest safetensors file.", flag_values=values, lower_bound=0.001)
    flags.DEFINE_bool("verify", False, "Load with transformers (needs torch) and compare logits.", flag_values=values)
    return values


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # leaves an accelerator to the run that is using it
    sys.exit(main())
