"""TPU slices by name: how many chips of which kind, and what one chip can do.

A slice is named by kind and sides, as the compiler does: 'v5p:4x4x4' is 64 chips. Product names of v4 and v5p count two
cores a chip, so the same slice is sold as v5p-128.
"""

from __future__ import annotations

import dataclasses
import math

from dr_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip's data sheet: peak figures, which no program reaches."""

    flops_per_s: float  # bfloat16, multiply and add counted apart
    hbm_gib: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # of one link between neighbours, one way
    clock_hz: float  # of the matrix units; turns the compiler's cycles into seconds
    host_chips: int  # chips of one host, at most
    dimensions: int  # of the torus
    ring: int  # a side that is a multiple of this many chips is wired into a ring
    cores: int  # per chip, as product names count them
    matrix_side: int = 128  # of a matrix unit: a product over fewer channels leaves part of it empty


# Peak FLOPs, HBM and its bandwidth: cloud.google.com/tpu/docs/v4, /v5p, /v5e, /v6e ("System architecture").
# Links and clocks: jax-ml.github.io/scaling-book/tpus, where a v5e or v6e side is a ring at 16 chips.
CHIPS = {
    "v4": Chip(275e12, 32, 1228e9, 45e9, 1.05e9, host_chips=4, dimensions=3, ring=4, cores=2),
    "v5e": Chip(197e12, 16, 819e9, 45e9, 1.5e9, host_chips=8, dimensions=2, ring=16, cores=1),
    "v5p": Chip(459e12, 95, 2765e9, 90e9, 1.75e9, host_chips=4, dimensions=3, ring=4, cores=2),
    "v6e": Chip(918e12, 32, 1640e9, 90e9, 1.75e9, host_chips=8, dimensions=2, ring=16, cores=1, matrix_side=256),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Some chips of one kind, wired as a grid of `sides`."""

    kind: str
    sides: tuple[int, ...]

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def chips(self) -> int:
        return math.prod(self.sides)

    @property
    def rings(self) -> tuple[bool, ...]:
        """Which sides are rings. v4 and v5p are cut from cubes: all sides are, or none."""
        rings = tuple(side % self.chip.ring == 0 for side in self.sides)
        return rings if self.chip.dimensions == 2 else (all(rings),) * 3

    def part(self, chips: int) -> Slice:
        """The slice that some of the chips of one host would be: 1, 2, 4 or 8 neighbours."""
        sides = {1: (1, 1, 1), 2: (1, 2, 1), 4: (2, 2, 1), 8: (2, 4, 1)}
        if chips not in sides:
            raise ConfigError(f"config.engine.tensor: got {chips}; on a TPU host allowed: {', '.join(map(str, sides))}")
        return Slice(self.kind, sides[chips][: self.chip.dimensions])

    @property
    def name(self) -> str:
        """What the compiler calls it."""
        return f"{self.kind}:{'x'.join(map(str, self.sides))}"

    @property
    def product(self) -> str:
        """What it is sold as."""
        return f"{self.kind}-{self.chips * self.chip.cores}"


def find(name: str) -> Slice:
    """The slice called `name`, such as 'v5p:4x4x4' or 'v6e:8x8'. Raises `ConfigError`."""
    kind, _, shape = name.partition(":")
    sides = tuple(int(side) for side in shape.split("x") if side.isdecimal())
    if kind not in CHIPS or "x".join(map(str, sides)) != shape or 0 in sides:
        raise ConfigError(
            f"config.topology: got {name!r}; need a kind of chip ({', '.join(CHIPS)}) and the slice's sides, such as "
            "'v5p:4x4x4' (sold as v5p-128) or 'v6e:8x8' (v6e-64), or '' for the devices of this machine"
        )
    chip = CHIPS[kind]
    if len(sides) != chip.dimensions or (chip.dimensions == 2 and max(sides) > 16):
        example = "4x4x4" if chip.dimensions == 3 else "8x8, at most 16x16"
        raise ConfigError(f"config.topology: {name!r}: {kind} slices have {chip.dimensions} sides, such as {example}")
    return Slice(kind, sides)
