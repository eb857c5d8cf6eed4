"""What a Pallas kernel takes, read from the program that the compiler makes of it.

XLA knows nothing of the inside of a kernel, but the compiler schedules it like everything else: instructions for the
core's units are packed into bundles, one bundle a cycle. So the attention kernels are compiled alone, for one chip,
with the compiler told to write its schedule down, and the bundles are counted as often as the grid visits them:

    body    what a pair of blocks (queries, keys) costs; pairs beyond the diagonal are skipped
    masked  the same on the diagonal, in a kernel that has two bodies; each has a loop within a step of the grid
    edges   first and last work on a block that stays while the others pass
    step    what each step of the grid costs, skipped or not

A body counts at the least what its products take of the matrix units, which the schedule may overlook. Other stalls
of the memory system are not counted. The compiler reads where to write when it is loaded, so a process of its own
compiles.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dr_jax.chips import CHIPS, find
from dr_jax.model import flash, letters, splash

# Products of a pair of blocks, by `config.model.attention` and the kernel's name in the module. Those of splash: scores
# and sum; scores, dv, dp and dk; scores, dp and dq.
PRODUCTS = {
    "splash": {"splash_mqa_fwd": 2, "splash_mqa_dkv": 4, "splash_mqa_dq": 3},
    "flash": flash.PRODUCTS,
}
# Bytes a token and channel of a kv head that move while nothing multiplies: what stays on a chip comes and goes whole.
_ALONE = {"flash_fwd": 4, "flash_bwd": 12}
KERNELS = {"splash": splash.packed, "flash": flash.packed}
_EDGE = 64  # bundles; a shorter region is bookkeeping of every step
_SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_DUMP = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles --xla_jf_dump_to="


@dataclasses.dataclass(frozen=True)
class Attention:
    """One chip's share of one attention: what decides how long its kernels take."""

    kernel: str  # a row of `PRODUCTS`
    kind: str  # of chip, a row of `chips.CHIPS`
    rows: int
    length: int  # tokens
    heads: int
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Bundles of one kernel, by how often they run; `steps` is how many steps of its grid one core takes."""

    body: int
    edges: int
    step: int
    steps: int
    masked: int = 0  # of a kernel whose bodies are loops; 0 where they are not


def schedules(attention: Attention) -> dict[str, Schedule]:
    """The schedule of each of the kernels. Takes some 15 s."""
    with tempfile.TemporaryDirectory() as folder:
        told = {"LIBTPU_INIT_ARGS": f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {_DUMP}{folder}", "JAX_PLATFORMS": "cpu"}
        given = json.dumps(dataclasses.asdict(attention))
        subprocess.run(
            [sys.executable, "-m", "dr_jax.plan.kernels", given], env=os.environ | told, check=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return {name: read(_schedule(pathlib.Path(folder), name)) for name in PRODUCTS[attention.kernel]}


def seconds(attention: Attention, name: str, schedule: Schedule) -> float:
    """Of one run of a kernel, all of whose rows are one segment."""
    chip = CHIPS[attention.kind]
    side = splash.block(attention.length)
    width = (
        math.ceil(attention.head_dim / chip.matrix_side) * chip.matrix_side
    )  # a smaller product fills no larger unit
    cycle_flops = chip.flops_per_s / chip.clock_hz / chip.cores
    least = PRODUCTS[attention.kernel][name] * 2 * side * side * width / cycle_flops
    blocks, group = attention.length // side, attention.heads // attention.kv_heads
    body = max(schedule.body, least)
    if schedule.masked:  # a step is a block of queries, and keys stay for all heads of a group
        a_step = max(schedule.masked, least) + (blocks - 1) / 2 * body + schedule.edges / (blocks * group)
    else:
        inner = blocks * (group if name == "splash_mqa_dkv" else 1)  # steps while a result stays
        a_step = (blocks + 1) / 2 / blocks * body + schedule.edges / inner
    moved = attention.rows * attention.kv_heads * attention.length * attention.head_dim * _ALONE.get(name, 0)
    return schedule.steps * (schedule.step + a_step) / chip.clock_hz + moved / chip.hbm_bytes_per_s


def read(bundles: str) -> Schedule:
    """Counts in the text of one kernel's final bundles: a line each, regions marked where they start and end."""
    starts: dict[str, int] = {}
    spans: list[tuple[int, int]] = []
    products, address, loop_start, loop_end, steps = [], 0, 0, 0, 0
    for line in bundles.splitlines():
        found = re.match(r"\s*(?:0x)?([0-9a-f]+)\s+([A-Z]{2})?\s*:", line)
        if found is None:
            continue
        address = int(found[1], 16)
        loop_start = loop_start or (address if found[2] == "LB" else 0)
        if bound := re.search(r"totalorder %\w+, (\d+) /\* loop exit", line):
            loop_end, steps = address + 1, int(bound[1])
        if "vmatmul" in line:
            products.append(address)
        for edge, region in re.findall(r"(Start|End) region (\d+)", line):
            if edge == "Start":
                starts[region] = address
            elif region in starts:
                spans.append((starts[region], address + 1))
    bodies = _bodies(spans, products)
    apart = {span for span in spans if loop_start <= span[0] and all(_apart(span, body) for body in bodies)}
    apart = {span for span in apart if _length(span) > _EDGE and not any(_within(span, other) for other in apart)}
    edges = sum(map(_length, apart))
    rest = loop_end - loop_start - sum(map(_length, bodies)) - edges
    return Schedule(_length(bodies[-1]), edges, rest, steps, masked=sum(map(_length, bodies[:-1])))


def _bodies(spans: list[tuple[int, int]], products: list[int]) -> list[tuple[int, int]]:
    """The region with all products; or, of a kernel with two loops, the one that masks and then the other."""
    held = {span: sum(span[0] <= address < span[1] for address in products) for span in spans}
    loops = [span for span in held if 0 < held[span] < len(products)]
    if not loops:
        return [min((span for span in held if held[span]), key=_length)]
    return sorted(span for span in loops if not any(_within(span, other) for other in loops))


def _apart(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span[1] <= other[0] or other[1] <= span[0]


def _length(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _within(span: tuple[int, int], other: tuple[int, int]) -> bool:
    return span != other and other[0] <= span[0] and span[1] <= other[1]


def _schedule(folder: pathlib.Path, name: str) -> str:
    (path,) = (path for path in folder.glob(f"*-{name}*-final_bundles.txt") if "analysis" not in path.name)
    return path.read_text()


def _compile(attention: Attention) -> None:
    from dr_jax.plan import programs  # not above: it takes long to import, and `read` needs none of it

    piece = find(_SMALLEST[attention.kind])
    mesh = programs.mesh(np.array(programs.devices(piece)[:1]), {"data": 1, "fsdp": 1, "tensor": 1})
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def total(q_btnh: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array, segment_bt: jax.Array) -> jax.Array:
        attend = KERNELS[attention.kernel](segment_bt, letters.DEFAULT_RULES)
        return attend(jnp.int32(0), q_btnh, k_btkh, v_btkh, None)[0].astype(jnp.float32).sum()

    b, t, h = attention.rows, attention.length, attention.head_dim
    kv = array(b, t, attention.kv_heads, h)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        gradient = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))
        gradient.lower(array(b, t, attention.heads, h), kv, kv, array(b, t, dtype=jnp.int32)).compile()


if __name__ == "__main__":
    _compile(Attention(**json.loads(sys.argv[1])))
