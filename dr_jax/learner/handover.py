"""Weights from the learner's layout to the engines': on the devices alone, every host at once, each its own copy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from dr_jax.errors import ConfigError
from dr_jax.model import weights
from dr_jax.model.config import ModelConfig
from dr_jax.model.letters import DEFAULT_RULES, make_mesh
from dr_jax.model.weights import Params


def engines(tensor: int) -> Mesh:
    """All devices of all hosts as engines of `tensor` devices side by side (axis 'data'), none across hosts."""
    by_host: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_host.setdefault(device.process_index, []).append(device)
    rows = []
    for host, devices in sorted(by_host.items()):
        if len(devices) % tensor:
            raise ConfigError(
                f"config.engine.tensor: {tensor} does not divide the {len(devices)} devices of host {host}"
            )
        for start in range(0, len(devices), tensor):
            group = devices[start : start + tensor]
            rows.append(mesh_utils.create_device_mesh((tensor,), group, allow_split_physical_axes=True))
    return _mesh(np.stack(rows)[:, None], ("data", "fsdp", "tensor"))


def here(side_by_side: Mesh) -> Mesh:
    """This host's first engine of `engines`."""
    own = [row for row in side_by_side.devices if row.flat[0].process_index == jax.process_index()]
    return _mesh(own[0][None], side_by_side.axis_names)


def program(config: ModelConfig, side_by_side: Any, dtype: str) -> Callable[[Params], Params]:
    """The jitted hand-over: the same weights in the engines' dtype and layout, a copy for each engine."""
    to = weights.shardings(config, side_by_side, DEFAULT_RULES)
    return jax.jit(lambda params: jax.tree.map(lambda x: x.astype(dtype), params), out_shardings=to)


def to_engine(config: ModelConfig, tensor: int, dtype: str) -> tuple[Mesh, Callable[[Params], Params]]:
    """The mesh of this host's engine, and a function from the learner's params to such as this host can address.

    With one host those are the learner's own, which the engine copies; else they lie on the engine's mesh already, and
    all hosts call together."""
    if jax.process_count() == 1:
        return make_mesh({"data": 1, "fsdp": 1, "tensor": tensor}), lambda params: params
    side_by_side = engines(tensor)
    return here(side_by_side), across_hosts(config, side_by_side, dtype)


def across_hosts(config: ModelConfig, side_by_side: Mesh, dtype: str) -> Callable[[Params], Params]:
    """A function from the learner's params to this host's copy of them, on the mesh `here`."""
    hand_over, engine = program(config, side_by_side, dtype), here(side_by_side)
    order = side_by_side.devices.ravel()

    def turned(x: jax.Array) -> jax.Array:
        """`x` with its pieces on the devices in the order of the engines: one program has one order."""
        mesh = x.sharding.mesh
        return jax.device_put(
            x, NamedSharding(_mesh(order.reshape(mesh.devices.shape), mesh.axis_names), x.sharding.spec)
        )

    def part(x: jax.Array) -> jax.Array:
        by_device = {shard.device: shard.data for shard in x.addressable_shards}
        own = [by_device[device] for device in engine.devices.flat]
        return jax.make_array_from_single_device_arrays(x.shape, NamedSharding(engine, x.sharding.spec), own)

    return lambda params: jax.tree.map(part, hand_over(jax.tree.map(turned, params)))


def _mesh(devices: np.ndarray, axes: tuple[str, ...]) -> Mesh:
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))
