"""Says which TPU slice a config is for, before one is asked for: one line for `launch_tpu.sh`.

    python tools/slice.py --config=configs/deepresearcher_7b_v5p128.py [--accelerator_type=v5p-128] [--programs]

Prints `ACCELERATOR_TYPE RUNTIME_VERSION WORKERS`, as `gcloud compute tpus` names them. Needs no JAX and no cloud; with
`--programs` JAX is asked whether the network and its rows divide over the mesh, as far as the network is known here.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from dr_jax import chips, entry
from dr_jax.errors import ConfigError
from dr_jax.run_config import RunConfig

# cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
SOLD_AS = {"v5e": "v5litepod"}  # where the product has another name than its chip
HOST_CHIPS = 4  # of each host where a slice has several


def main(argv: Sequence[str] | None = None) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("accelerator_type", "", "The slice you have, such as v5p-128.", flag_values=values)
    flags.DEFINE_bool("programs", False, "Also checks the mesh against the network.", flag_values=values)
    return entry.run(_say, values, about=__doc__, argv=argv)


def _say(run: RunConfig, values: flags.FlagValues) -> None:
    if not run.topology:
        raise ConfigError(
            "config.topology: '' names no slice; set it, e.g. --config.topology=v5p:2x2x1, or use --backend=local"
        )
    piece = chips.find(run.topology)
    name = accelerator_type(piece)
    if values.accelerator_type not in ("", name):
        raise ConfigError(
            f"--accelerator_type: {values.accelerator_type} is not the {name} of config.topology = {run.topology!r}. "
            "Leave it out, or take a config for that slice."
        )
    workers = 1 if piece.chips <= piece.chip.host_chips else piece.chips // HOST_CHIPS
    for field, value in (("rollout.questions", run.rollout.questions), ("batch.rows", run.batch.rows)):
        if value % workers:
            raise ConfigError(f"config.{field}: {value} do not divide over the {workers} hosts of {name}")
    if values.programs:
        _check_programs(run)
    print(name, RUNTIMES[piece.kind], workers)


def _check_programs(run: RunConfig) -> None:
    """Builds what a run would jit, from shapes alone: whatever it refuses is refused before there are chips."""
    from dr_jax.model.config import published  # here, since they need JAX, and seconds
    from dr_jax.plan import programs

    path = pathlib.Path(run.model.path)
    if path.exists() or published(path.name):
        programs.programs(programs.setup(run, compiler=False))


def accelerator_type(piece: chips.Slice) -> str:
    """What a slice is ordered as. `ConfigError` where that order would get other sides."""
    sides = _usual_sides(piece)
    if sorted(piece.sides) != sorted(sides):
        raise ConfigError(
            f"config.topology: {piece.name!r} cannot be ordered by name: {piece.chips} chips of {piece.kind} come as "
            f"{piece.kind}:{'x'.join(map(str, sides))}. Use that, and a mesh for it."
        )
    return f"{SOLD_AS.get(piece.kind, piece.kind)}-{piece.chips * piece.chip.cores}"


def _usual_sides(piece: chips.Slice) -> tuple[int, ...]:
    """The sides of the slice that a product name gets: as near to a cube or square as doublings allow."""
    sides = [1] * piece.chip.dimensions
    for _ in range(round(math.log2(piece.chips))):
        sides[sides.index(min(sides))] *= 2
    return tuple(sorted(sides, reverse=piece.chips == HOST_CHIPS))


if __name__ == "__main__":
    sys.exit(main())
