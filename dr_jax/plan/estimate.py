"""How long a program should take on chips nobody has rented yet: every term by itself, and what it rests on.

    matrix      the compiler's own cycles of every fusion that multiplies, over the clock
    memory      of everything else: bytes over HBM bandwidth, or the compiler's cycles where those are fewer
    kernels     attention in the learner: the compiler's schedule of the kernel, see `kernels`; of other Pallas kernels
                FLOPs over the peak times `KERNEL_EFFICIENCY`; of the engine's, if that is longer, what it reads over
                HBM bandwidth times `KERNEL_BANDWIDTH`
    exposed     bytes on the wire over the links that the group of chips spans; nothing else runs meanwhile
    overlapped  the same for collectives that run beside other work, one after another; what is waited for where the
                schedule needs a result is exposed, and of the rest counts what outlasts all other work

Nothing here has been compared with a chip.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from dr_jax.chips import Slice
from dr_jax.plan import flops, hlo, kernels
from dr_jax.plan.programs import Program, Work

KERNEL_EFFICIENCY = 0.35  # assumed, of the peak, for kernels without a schedule
KERNEL_BANDWIDTH = 0.8  # assumed, of HBM's, for the engine's kernel, which streams the cache
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Traced:
    """What is known of a program without a compiler."""

    flops: flops.Flops  # of all chips together
    lowered: Any


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of one chip. Seconds are estimates; `failure` is set where it did not compile, and
    nothing else is."""

    failure: str = ""
    compile_s: float = 0.0
    temp_bytes: int = 0  # what it needs beside its arguments, results included that do not take their place
    alias_bytes: int = 0
    hbm_bytes: float = 0.0  # moved
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)  # by the terms above
    collectives: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)  # kind -> runs, wire bytes

    @property
    def step_s(self) -> float:
        """The terms together."""
        terms = self.seconds
        busy = terms["matrix"] + terms["memory"] + terms["kernels"] + terms["exposed"]
        return max(busy, terms["overlapped"])


def trace(program: Program) -> Traced:
    """The program's multiplications. Shapes that do not fit each other raise here."""
    with jax.sharding.use_abstract_mesh(_abstract(program.scope)):
        traced = program.function.trace(*program.args)
    counted = flops.count(traced.jaxpr.jaxpr, dynamic_trips=program.dynamic_trips)
    if program.paged:
        counted = counted._replace(kernel=program.paged.flops * program.mesh.size)
    return Traced(counted, traced)


def compile_for(program: Program, traced: Traced, piece: Slice) -> Compiled:
    """Compiles for the slice's chips. A program that is too large for them is a `failure`, not an exception."""
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        # Written while it compiles, because `as_text` cannot read back every module that the compiler makes.
        options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            with jax.sharding.use_abstract_mesh(_abstract(program.scope)):
                compiled = traced.lowered.lower().compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return Compiled(failure=_reason(str(error)), compile_s=time.monotonic() - started_s)
        (text,) = (path.read_text() for path in pathlib.Path(folder).glob("*.after_codegen.txt"))
    compile_s = time.monotonic() - started_s
    memory = compiled.memory_analysis()
    ops = hlo.read(text, devices=program.mesh.size, dynamic_trips=program.dynamic_trips)
    kernel_s = _attention_seconds(program, ops)
    kernel_flops = 0.0 if kernel_s or program.paged else traced.flops.kernel / program.mesh.size
    coordinates = [device.coords for device in program.mesh.devices.flat]
    if program.paged:  # to the compiler, its kernel reads the whole pool
        ops = [dataclasses.replace(op, hbm_bytes=0.0) if op.kind == "kernel" else op for op in ops]
    terms = seconds(ops, piece, coordinates, kernel_flops, kernel_s)
    if program.paged:
        terms |= {"kernels": paged_seconds(program.paged, piece)}
    return Compiled(
        compile_s=compile_s,
        temp_bytes=memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        hbm_bytes=sum(op.runs * op.hbm_bytes for op in ops if op.kind in ("matrix", "memory", "kernel"))
        + (program.paged.hbm_bytes if program.paged else 0.0),
        seconds=terms,
        collectives=_by_kind(ops),
    )


def seconds(
    ops: Sequence[hlo.Op],
    piece: Slice,
    coordinates: Sequence[tuple[int, ...]],
    kernel_flops: float,
    kernel_s: Mapping[str, float],
) -> dict[str, float]:
    """Estimated seconds by term. `kernel_s`: of one run, by the kernel's name in the module; `kernel_flops`: of the
    kernels that are not in it."""
    chip = piece.chip
    terms = dict(matrix=0.0, memory=0.0, kernels=kernel_flops / (chip.flops_per_s * KERNEL_EFFICIENCY))
    terms |= dict(exposed=0.0, overlapped=0.0)
    now, free, ends = 0.0, 0.0, {}  # along one run of everything: the links are one resource
    for op in ops:
        by_cycles, by_bytes = op.cycles / chip.clock_hz, op.hbm_bytes / chip.hbm_bytes_per_s
        if op.kind == "matrix":
            term, took_s = "matrix", by_cycles
        elif op.kind == "memory":
            term, took_s = "memory", min(by_cycles, by_bytes)
        elif op.kind == "kernel":
            term, took_s = "kernels", kernel_s.get(op.name, 0.0)
        elif op.kind == "wait":
            term, took_s = "exposed", max(ends.pop(op.name, 0.0) - now, 0.0)
        else:
            term = "overlapped" if op.overlapped else "exposed"
            took_s = wire_bytes(op) / link_bytes_per_s(op.group, piece, coordinates)
        terms[term] += op.runs * took_s
        if term == "overlapped":
            free = ends[op.handle] = max(now, free) + took_s
        else:
            now += took_s
    return terms


def _attention_seconds(program: Program, ops: Sequence[hlo.Op]) -> dict[str, float]:
    """Of one run of each attention kernel among `ops`, by its name there."""
    if program.attention is None:
        return {}
    known = "|".join(kernels.PRODUCTS[program.attention.kernel])
    names = {op.name: found[0] for op in ops if (found := re.match(known, op.name))}
    if not names:
        return {}
    scheduled = kernels.schedules(program.attention)
    once = {kind: kernels.seconds(program.attention, kind, schedule) for kind, schedule in scheduled.items()}
    return {name: once[kind] for name, kind in names.items()}


def paged_seconds(work: Work, piece: Slice) -> float:
    """Estimated seconds of the engine's attention kernel: multiplying or reading, whichever takes longer."""
    chip = piece.chip
    multiplying_s = work.flops / (chip.flops_per_s * KERNEL_EFFICIENCY)
    return max(multiplying_s, work.hbm_bytes / (chip.hbm_bytes_per_s * KERNEL_BANDWIDTH))


def wire_bytes(op: hlo.Op) -> float:
    """Bytes that one chip sends in one run of a collective, by the ring algorithm."""
    n = max(len(op.group), 1)
    share = (n - 1) / n
    factor = {"all-reduce": 2 * share, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
    return op.hbm_bytes * factor.get(op.kind, share)


def link_bytes_per_s(group: Sequence[int], piece: Slice, coordinates: Sequence[tuple[int, ...]]) -> float:
    """What a chip can send to a group: a link for each side that the group spans, two where it spans a whole ring."""
    places = [coordinates[member] for member in group]
    links = 0
    for axis, (side, ring) in enumerate(zip(piece.sides, piece.rings, strict=True)):
        extent = len({place[axis] for place in places})
        links += (2 if ring and extent == side else 1) if extent > 1 else 0
    return max(links, 1) * piece.chip.link_bytes_per_s


def _by_kind(ops: Sequence[hlo.Op]) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for op in ops:
        if op.kind in hlo.COLLECTIVES:
            runs, sent = found[op.kind]
            found[op.kind] = (runs + op.runs, sent + op.runs * wire_bytes(op))
    return dict(found)


def bytes_per_chip(tree: Any) -> int:
    """Of abstract arrays with placements."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _abstract(mesh: Any) -> Any:
    return mesh.abstract_mesh if mesh is not None else jax.sharding.get_abstract_mesh()


def _reason(message: str) -> str:
    """The line of the compiler's message that says how much was wanted."""
    wanted = [line for line in message.splitlines() if "Used " in line or "exceeded" in line.lower()]
    return (wanted or message.splitlines())[0].strip()[:300]
