"""Multiply-adds of a traced program, counted in its jaxpr: exact, whole-program, and without a compiler.

What remat computes again is in the jaxpr, so it is counted; elementwise work is not.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax


class Flops(NamedTuple):
    """FLOPs of all devices together."""

    matrix: float  # multiplied by XLA
    kernel: float  # inside Pallas kernels

    @property
    def total(self) -> float:
        return self.matrix + self.kernel

    def times(self, factor: float) -> Flops:
        """The same, `factor` times."""
        return Flops(self.matrix * factor, self.kernel * factor)


def count(jaxpr: jax.extend.core.Jaxpr, *, dynamic_trips: int = 1) -> Flops:
    """What the program multiplies. A `while` loop counts `dynamic_trips`; of a `cond`, the dearest branch counts."""
    found = [_equation(equation, dynamic_trips) for equation in jaxpr.eqns]
    return Flops(sum(each.matrix for each in found), sum(each.kernel for each in found))


def _equation(equation: jax.extend.core.JaxprEqn, dynamic_trips: int) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(_dot(equation), 0.0)
    if name == "pallas_call" and params["cost_estimate"]:  # a kernel of ours says it: its loops only the data fixes
        return Flops(0.0, float(params["cost_estimate"].flops))
    inner = [count(jaxpr, dynamic_trips=dynamic_trips) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(inner, key=lambda branch: branch.total)
    once = Flops(sum(each.matrix for each in inner), sum(each.kernel for each in inner))
    if name == "scan":
        return once.times(params["length"])
    if name == "while":
        return once.times(dynamic_trips)
    if name == "shard_map":  # inside, arrays are one device's
        axes = params.get("newly_manual_axes") or params["manual_axes"]  # the name in older JAX
        return once.times(math.prod(params["mesh"].shape[axis] for axis in axes))
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        causal = (1 + 1 / grid[-1]) / 2  # ours are causal attention, and skip the blocks beyond the diagonal
        return Flops(0.0, once.total * math.prod(grid) * causal)
    return once


def _dot(equation: jax.extend.core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)


def _jaxprs(params: dict[str, Any]) -> list[jax.extend.core.Jaxpr]:
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found
