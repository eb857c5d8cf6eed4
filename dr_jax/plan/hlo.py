"""What a compiled module does, read from the text of its optimised HLO: each operation with how often it runs.

The compiler's own totals are no help here: `cost_analysis` counts the body of a loop once. So the loops are followed,
and what they hold is multiplied by their trips.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = dict(pred=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, s4=0.5, u4=0.5)


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation of the schedule. `hbm_bytes` and `cycles` are of one run, on one chip."""

    kind: str  # matrix | memory | kernel | a row of COLLECTIVES | wait, for the collective with this `handle`
    name: str
    runs: int
    hbm_bytes: float  # operands and results outside on-chip memory, each counted whole; of a collective: its result
    cycles: int = 0  # the compiler's estimate; 0 where it makes none (collectives, kernels, the CPU)
    group: tuple[int, ...] = ()  # of a collective: the devices that take part, as the first of them sees it
    overlapped: bool = False  # of a collective: started and awaited apart, or fused with other work
    handle: str = ""  # of one that is awaited apart: its name there


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    shape: str
    op: str
    rest: str

    def called(self, *names: str) -> list[str]:
        return [found for name in names for found in re.findall(rf"\b{name}=\{{?%?([\w.\-]+)", self.rest)]


def read(text: str, *, devices: int, dynamic_trips: int = 1) -> list[Op]:
    """The operations of a module. A loop whose trips the module does not fix counts `dynamic_trips`; of a conditional,
    every branch counts: the most that can happen."""
    computations, entry = _computations(text)
    return list(_walk(computations, entry, 1, devices, dynamic_trips, set()))


def _walk(
    computations: dict[str, list[_Line]], name: str, runs: int, devices: int, dynamic_trips: int, seen: set[str]
) -> Iterator[Op]:
    lines = computations[name]
    named = {line.name: line for line in lines}
    for line in lines:
        kind = line.op.removesuffix("-start")
        if line.op == "while":
            trips = _trips(computations, line) or dynamic_trips
            for body in line.called("body"):
                yield from _walk(computations, body, runs * trips, devices, dynamic_trips, seen)
        elif line.op in ("conditional", "call"):
            branches = line.called("to_apply", "true_computation", "false_computation")
            listed = re.search(r"branch_computations=\{([^}]*)\}", line.rest)
            branches += [branch.strip().lstrip("%") for branch in listed[1].split(",")] if listed else []
            for branch in branches:
                yield from _walk(computations, branch, runs, devices, dynamic_trips, seen)
        elif kind in COLLECTIVES:
            apart = line.op.endswith("-start")
            yield _collective(line, runs, devices, overlapped=apart, handle=line.name if apart else "")
        elif line.op in ("fusion", "async-start", "async-update"):
            yield from _fusion(computations, line, named, runs, devices, seen)
        elif line.op.endswith("-done"):
            yield Op("wait", _operands(line)[0], runs, 0.0)
        elif line.op == "custom-call" and "tpu_custom_call" in line.rest:
            yield Op("kernel", line.name, runs, _hbm_bytes(line, named))
        elif line.op in ("dot", "convolution"):
            yield Op("matrix", line.name, runs, _hbm_bytes(line, named), _cycles(line))
        elif _cycles(line):
            yield Op("memory", line.name, runs, _hbm_bytes(line, named), _cycles(line))


def _fusion(
    computations, line: _Line, named: dict[str, _Line], runs: int, devices: int, seen: set[str]
) -> Iterator[Op]:
    task = line
    if line.rest.startswith("async-start()"):  # of a sparse core, which begins with the update
        return
    if line.op == "async-update":
        task = named[_operands(line)[0]]
    inside = list(_inside(computations, task))
    for inner in inside:
        channel = re.search(r"channel_id=(\d+)", inner.rest)
        if inner.op in COLLECTIVES and (channel is None or channel[1] not in seen):
            seen |= {channel[1]} if channel else set()  # a collective spread over several fusions counts once
            # An all-reduce of which only a part is kept is a reduce-scatter by another name, and is waited for.
            scattered = line.op == "fusion" and inner.op == "all-reduce" and _size(line.shape) < _size(inner.shape)
            handle = "" if line.op == "fusion" else line.name
            op = _collective(inner, runs, devices, overlapped=not scattered, handle=handle)
            if scattered:
                op = dataclasses.replace(op, kind="reduce-scatter", hbm_bytes=op.hbm_bytes / len(op.group))
            yield op
    if line.op == "fusion":
        matrix = any(inner.op in ("dot", "convolution") for inner in inside)
        yield Op("matrix" if matrix else "memory", line.name, runs, _hbm_bytes(line, named), _cycles(line))


def _inside(computations: dict[str, list[_Line]], line: _Line) -> Iterator[_Line]:
    for called in line.called("calls", "called_computations"):
        for inner in computations[called]:
            yield inner
            yield from _inside(computations, inner)


def _collective(line: _Line, runs: int, devices: int, *, overlapped: bool, handle: str) -> Op:
    kind, group = line.op.removesuffix("-start"), _group(line, devices)
    size = _size(line.shape)
    if line.op.endswith("-start") and kind == "all-gather":  # its shape is (operand, result)
        size *= len(group) / (len(group) + 1)
    elif line.op.endswith("-start") and kind == "collective-permute":
        size /= 2
    return Op(kind, line.name, runs, size, group=group, overlapped=overlapped, handle=handle)


def _group(line: _Line, devices: int) -> tuple[int, ...]:
    """The first replica group. XLA writes groups in three ways: listed, as an iota to reshape, and by mesh axis."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line.rest)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line.rest)
    if iota:
        shape, source = (tuple(map(int, iota[i].split(","))) for i in (1, 2))
        numbers = np.arange(math.prod(source)).reshape(source)
        numbers = numbers.transpose(tuple(map(int, iota[3].split(",")))) if iota[3] else numbers
        return tuple(numbers.reshape(shape)[0].tolist())
    by_axis = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*(?:device_ids=\S+\s*)?\{([^}]*)\}", line.rest)
    if by_axis:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", by_axis[1])}
        used = set(re.findall(r"'([^']+)'", by_axis[2]))
        numbers = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        return tuple(numbers[tuple(slice(None) if name in used else 0 for name in sizes)].ravel().tolist())
    return tuple(range(2 if line.op.startswith("collective-permute") else devices))


def _trips(computations: dict[str, list[_Line]], line: _Line) -> int | None:
    """Trips of a loop that the module fixes. The TPU's text drops the count; the loop's condition compares with it."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line.rest)
    if known:
        return int(known[1])
    (condition,) = line.called("condition")
    constants = [
        int(found[1])
        for inner in computations[condition]
        if inner.op == "constant"
        and inner.shape.startswith(("s32[]", "u32[]"))
        and (found := re.search(r"\((\d+)\)", inner.rest))
    ]
    return max(constants, default=None)


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    computations: dict[str, list[_Line]] = {}
    entry, lines = "", None
    for row in text.splitlines():
        if lines is None:
            head = re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$", row)
            if head and not row.startswith("HloModule"):
                lines = computations[head[2]] = []
                entry = head[2] if head[1] else entry
        # A computation of the sparse cores says so behind its end; "}}" ends a kernel's data, which has line breaks.
        elif row.startswith("}") and not row.startswith("}}"):
            lines = None
        elif line := _line(row):
            lines.append(line)
    return computations, entry


def _line(row: str) -> _Line | None:
    found = re.match(r"\s*(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(.+)$", row)
    if found is None:
        return None
    name, rest = found.groups()
    end = _closing(rest) if rest.startswith("(") else rest.find(" ")
    op = re.match(r"\s*([\w\-]+)\(", rest[end:])
    return _Line(name, rest[:end], op[1] if op else "", rest[end:].strip())


def _closing(text: str) -> int:
    """Index after the bracket that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    return len(text)


def _size(shape: str) -> float:
    """Bytes of an array, or of a tuple's arrays together."""
    found = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return sum(_BYTES.get(dtype, 0) * math.prod(map(int, dims.split(",") if dims else ())) for dtype, dims in found)


def _hbm_bytes(line: _Line, named: dict[str, _Line]) -> float:
    read = [named[name].shape for name in _operands(line) if name in named]
    return sum(_size(_in_hbm(shape)) for shape in (line.shape, *read))


def _operands(line: _Line) -> list[str]:
    operands = re.match(r"[\w\-]+\(([^)]*)\)", line.rest)
    return re.findall(r"%([\w.\-]+)", operands[1]) if operands else []


def _in_hbm(shape: str) -> str:
    return re.sub(r"\w+\[[\d,]*\]\{[^}]*S\(1\)[^}]*\}", "", shape)  # memory space 1 is on the chip


def _cycles(line: _Line) -> int:
    found = re.search(r'"estimated_cycles":"?(\d+)', line.rest)
    return int(found[1]) if found else 0
