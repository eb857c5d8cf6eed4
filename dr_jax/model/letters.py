"""One alphabet: the letter in a variable's suffix (`q_btnh`) is the letter in the einsum, in the weight table and here.

    b rows                     n query heads               f mlp width
    t positions (query side)   k key/value heads           v vocabulary
    s positions (key side)     g query heads per kv head   l layers
    d model width              h head width                p pages of the engine's cache

`Rules` is the sharding table of a config: which mesh axis each letter is spread over. Whatever is not in the table,
does not divide, or would use a mesh axis twice raises `ConfigError`; nothing is silently replicated.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from dr_jax.errors import ConfigError
from dr_jax.model.config import QWEN2_5, ModelConfig

ALPHABET = "btsdflvnkghp"

Axes = str | tuple[str, ...] | None  # mesh axis, several of them, or not sharded
Table = Mapping[str, Axes]


@dataclasses.dataclass(frozen=True)
class Rules:
    """Letter -> mesh axes. Weights and activations may differ: FSDP spreads `d` of weights and `b` of activations."""

    weights: Table
    activations: Table

    def __post_init__(self) -> None:
        for field in ("weights", "activations"):
            for letter in getattr(self, field):
                if letter not in ALPHABET or len(letter) != 1:
                    raise ConfigError(f"rules.{field}: unknown letter {letter!r}, allowed are {', '.join(ALPHABET)}")


DEFAULT_RULES = Rules(
    weights=dict(v="tensor", d="fsdp", f="tensor", n="tensor", k="tensor", h=None, l=None),
    activations=dict(
        b=("data", "fsdp"),
        t=None,
        s=None,
        d=None,
        f="tensor",
        v="tensor",
        n="tensor",
        k="tensor",
        g=None,
        h=None,
        l=None,
        p=None,
    ),
)


def sizes(config: ModelConfig) -> dict[str, int]:
    """Length of each letter that the network fixes."""
    return dict(
        v=config.vocab_size,
        d=config.d_model,
        f=config.d_ff,
        n=config.num_heads,
        k=config.num_kv_heads,
        h=config.head_dim,
        l=config.num_layers,
    )


def spec(letters: str, table: Table) -> PartitionSpec:
    """Placement of an array whose axes are `letters`."""
    entries, used = [], set()
    for letter in letters:
        if letter not in table:
            raise ConfigError(f"rules: letter {letter!r} of {letters!r} is not in the table ({', '.join(table)})")
        for axis in axes_of(table[letter]):
            if axis in used:
                raise ConfigError(f"rules: mesh axis {axis!r} would be used twice in an array {letters!r}")
            used.add(axis)
        entries.append(table[letter])
    return PartitionSpec(*entries)


def axes_of(axes: Axes) -> tuple[str, ...]:
    """The mesh axes of one table entry, as a tuple."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def constrain(x: jax.Array, letters: str, rules: Rules) -> jax.Array:
    """`x`, placed as `rules.activations` says. Needs a mesh in scope (`jax.set_mesh`): without one it raises."""
    if len(letters) != x.ndim:
        raise ConfigError(f"constrain: {letters!r} does not name the axes of an array of shape {x.shape}")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ConfigError("constrain: no mesh in scope; call inside `with jax.set_mesh(make_mesh({...}))`")
    placement = spec(letters, rules.activations)
    for letter, size, entry in zip(letters, x.shape, placement, strict=True):
        if size % math.prod(mesh.shape[axis] for axis in axes_of(entry)):  # XLA would pad or replicate, and say nothing
            raise ConfigError(
                f"constrain: {size} of {letter!r} in {letters!r} do not divide over {_show(entry, mesh.shape)}"
            )
    return jax.lax.with_sharding_constraint(x, placement)


def make_mesh(shape: Mapping[str, int]) -> Mesh:
    """A mesh over the first devices, e.g. `make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2})`."""
    need = math.prod(shape.values())
    if min(shape.values()) < 1 or need > jax.device_count():
        have = jax.device_count()
        raise ConfigError(
            f"mesh: {_show(tuple(shape), shape)} needs {need} devices, this run has {have}. Set config.mesh."
        )
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


_WORDS = dict(v="vocabulary entries", d="channels", f="mlp channels", n="query heads", k="kv heads", h="head channels",
              l="layers")  # fmt: skip


def check_mesh(config: ModelConfig, mesh_shape: Mapping[str, int], rules: Rules) -> None:
    """Raises `ConfigError` unless every axis of the network divides over the mesh axes that the rules give it."""
    for table in (rules.weights, rules.activations):
        for letter, entry in table.items():
            for axis in axes_of(entry):
                if axis not in mesh_shape:
                    raise ConfigError(
                        f"rules: {letter!r} uses mesh axis {axis!r}, the mesh has {', '.join(mesh_shape)}"
                    )
        for letter, size in sizes(config).items():
            axes = axes_of(table.get(letter))
            if size % math.prod(mesh_shape[axis] for axis in axes):
                axis = max(axes, key=mesh_shape.__getitem__)
                allowed = _join(_divisors(config, mesh_shape, rules, axis))
                raise ConfigError(
                    f"mesh.{axis}: {size} {_WORDS[letter]} do not divide over {_show(axes, mesh_shape)}. "
                    f"{_name(config)} allows {axis} = {allowed}. Set config.mesh.{axis}."
                )


def _divisors(config: ModelConfig, mesh_shape: Mapping[str, int], rules: Rules, axis: str) -> list[int]:
    common = 0
    for table in (rules.weights, rules.activations):
        for letter, size in sizes(config).items():
            axes = axes_of(table.get(letter))
            if axis in axes:
                common = math.gcd(common, size // math.prod(mesh_shape[a] for a in axes if a != axis))
    return [x for x in range(1, common + 1) if common % x == 0]


def _show(axes: Axes, mesh_shape: Mapping[str, int]) -> str:
    return " x ".join(f"{axis}={mesh_shape[axis]}" for axis in axes_of(axes))


def _join(numbers: list[int]) -> str:
    words = [str(number) for number in numbers]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _name(config: ModelConfig) -> str:
    for name, published in QWEN2_5.items():
        if sizes(published) == sizes(config):
            return f"Qwen2.5-{name}"
    return "this model"
