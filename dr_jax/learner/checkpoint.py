"""Checkpoints on disk, through Orbax (nothing else imports it). One step directory holds all or nothing of a step.

A step holds three items: `params`, `rest` (optimizer, step counter, random key) and `meta` (JSON: what the run needs to
go on; shape, dtype and checksum of every leaf, as the array format itself does not notice a flipped bit).
"""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from dr_jax.errors import CheckpointError
from dr_jax.learner.state import TrainState
from dr_jax.model.weights import Params

_MAX_STEPS = 1024  # in one directory


class Checkpoints:
    """The checkpoints of one run. Open with `keep` to write, without to read only; close it, or use it in a `with`.

    Writing runs in the background: `save` returns once the state is copied, and the next `save` or `close` raises
    `CheckpointError` if it went wrong. Opening to write removes what an interrupted write left behind.

    `failed` is told at once, in a thread of Orbax, that this host cannot write its arrays: with several hosts the next
    `save` would not raise, but wait for the others for 20 minutes.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        keep: int | None = None,
        failed: Callable[[CheckpointError], None] = lambda error: None,
    ):
        self._path = pathlib.Path(path).absolute()
        if keep is None and not self._path.is_dir():
            raise CheckpointError(f"{self._path}: no checkpoint directory")
        self._writable = keep is not None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=self._writable,
            cleanup_tmp_directories=self._writable,
            read_only=not self._writable,
        )
        handlers = {name: _TellingHandler(self._path, failed) for name in ("params", "rest")}
        self._manager = ocp.CheckpointManager(
            self._path, options=options, item_handlers=handlers | {"meta": ocp.JsonCheckpointHandler()}
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
        """Starts writing `state` as `step`; it may be donated right after. `meta` must be JSON."""
        if not self._writable:
            raise CheckpointError(f"{self._path}: opened for reading; pass keep=... to write")
        latest = self.latest()
        if latest is not None and step <= latest:
            raise CheckpointError(f"{self._path}: step {step} cannot follow step {latest}")
        params, rest = _split(state)
        leaves = _leaves({"params": params, "rest": rest})
        try:
            items = dict(params=_Save(params), rest=_Save(rest))
            written = ocp.args.Composite(**items, meta=ocp.args.JsonSave({"leaves": leaves, "meta": meta}))
            self._manager.wait_until_finished()  # raises what the previous write hid
            self._manager.save(step, args=written)
        except Exception as error:  # noqa: BLE001 - a full disk, a lost bucket: Orbax raises whatever it met
            raise CheckpointError(
                f"{self._path}: step {step} or the one before was not saved: {_line(error)}"
            ) from error

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]]:
        """(state placed as `abstract` says, meta) of `step`; of the newest readable step where `step` is None.

        A newest step that cannot be read is moved to `<step>.unreadable` with a warning, and the one before is tried. A
        step that can be read, but is of another model, raises.
        """
        params, rest = _split(abstract)
        found, meta = self._restore({"params": params, "rest": rest}, step)
        rest = found["rest"]
        rng = jax.device_put(jax.random.wrap_key_data(rest["rng"]), abstract.rng.sharding)
        return TrainState(found["params"], rest["opt_state"], rest["step"], rng), meta

    def restore_params(self, abstract: Params, step: int | None = None) -> tuple[Params, dict[str, Any]]:
        """(parameters alone, meta), as `restore` does it; for export and evaluation, which need no optimizer."""
        found, meta = self._restore({"params": abstract}, step)
        return found["params"], meta

    def latest(self) -> int | None:
        """The newest step on disk, finished writes only; None where there is none."""
        return max(self._steps(), default=None)

    def close(self) -> None:
        """Waits for the write under way; raises `CheckpointError` if it went wrong."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # noqa: BLE001 - see `save`
            raise CheckpointError(f"{self._path}: the last step was not saved: {_line(error)}") from error
        finally:
            self._manager.close()

    def _restore(self, abstract: dict[str, Any], step: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
        steps = self._steps() if step is None else [step]
        if not steps:
            raise CheckpointError(f"{self._path}: holds no checkpoint")
        reasons = []
        for candidate in steps:
            found, reason = self._attempt(abstract, candidate)
            if reason is None:
                self._set_aside(steps[: steps.index(candidate)])
                return found
            reasons.append(f"step {candidate}: {reason}")
            if candidate != steps[-1]:
                warnings.warn(f"{self._path}: {reasons[-1]}; trying the step before", stacklevel=3)
        raise CheckpointError(f"{self._path}: nothing could be restored. {'; '.join(reasons)}")

    def _steps(self) -> list[int]:
        """The finished steps, newest first, as the first host sees them: a network file system may show others less."""
        seen = sorted(self._manager.all_steps(), reverse=True)[:_MAX_STEPS]
        steps = multihost_utils.broadcast_one_to_all(np.array(seen + [-1] * (_MAX_STEPS - len(seen)), np.int32))
        return [int(step) for step in steps if step >= 0]

    def _attempt(self, abstract: dict[str, Any], step: int) -> tuple[Any, str | None]:
        """((items, meta), None), or (None, why it cannot be read)."""
        header, reason = self._read(step, meta=ocp.args.JsonRestore())
        if reason is not None:
            return None, reason
        leaves, meta = header["meta"]["leaves"], header["meta"]["meta"]
        for name, want in _shapes(abstract).items():
            got = leaves.get(name, {"shape": None})
            if any(got.get(field) != value for field, value in want.items()):
                raise CheckpointError(
                    f"{self._path}: step {step} is of another model or optimizer: {name} is {got} there, {want} here"
                )
        items, reason = self._read(step, **{name: _Restore(tree) for name, tree in abstract.items()})
        if reason is not None:
            return None, reason
        wrong = [name for name, leaf in _leaves(items).items() if leaf != leaves[name]]
        if wrong:
            return None, f"checksum of {wrong[0]} differs ({len(wrong)} leaves): the file changed after it was written"
        return (items, meta), None

    def _read(self, step: int, **items: Any) -> tuple[Any, str | None]:
        """(the items, None), or (None, why not): every host agrees on which of the two."""
        loaded, reason = None, None
        try:
            loaded = self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # noqa: BLE001 - missing, truncated, garbled: each has its own type in Orbax
            reason = _line(error)
        if not _everywhere(reason is None):
            return None, reason or "another host could not read it"
        return {name: loaded[name] for name in items}, None

    def _set_aside(self, unreadable: list[int]) -> None:
        """Moves steps out of the way: their numbers will be written again. Nothing is deleted."""
        if not (self._writable and unreadable):
            return
        if jax.process_index() == 0:
            for step in unreadable:
                (self._path / str(step)).rename(self._path / f"{step}.unreadable")
        multihost_utils.sync_global_devices("unreadable checkpoints moved")
        self._manager.reload()


class _TellingHandler(ocp.StandardCheckpointHandler):
    """Writes arrays, and tells `failed` why it cannot."""

    def __init__(self, path: pathlib.Path, failed: Callable[[CheckpointError], None]):
        super().__init__()
        self._path, self._failed = path, failed

    async def async_save(self, *args: Any, **kwargs: Any) -> list[_TellingFuture]:
        futures = await super().async_save(*args, **kwargs)
        return [_TellingFuture(future, self._tell) for future in futures or ()]

    def _tell(self, error: Exception) -> None:
        self._failed(CheckpointError(f"{self._path}: this host cannot write its part: {_line(error)}"))


@ocp.args.register_with_handler(_TellingHandler, for_save=True)
class _Save(ocp.args.StandardSave):
    """Arrays to write."""


@ocp.args.register_with_handler(_TellingHandler, for_restore=True)
class _Restore(ocp.args.StandardRestore):
    """Arrays to read, as this says."""


@dataclasses.dataclass(frozen=True)
class _TellingFuture:
    """A future of Orbax, which waits for its `result` in the thread that writes."""

    future: Any
    tell: Callable[[Exception], None]

    def result(self, timeout: int | None = None) -> Any:
        try:
            return self.future.result(timeout)
        except Exception as error:
            self.tell(error)
            raise


def _split(state: TrainState) -> tuple[Params, dict[str, Any]]:
    """(params, everything else as arrays Orbax knows)."""
    if isinstance(state.rng, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, state.rng)
        rng = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=state.rng.sharding)
    else:
        rng = jax.random.key_data(state.rng)
    return state.params, {"opt_state": state.opt_state, "step": state.step, "rng": rng}


def _shapes(items: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape and dtype of every leaf, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): {"shape": list(leaf.shape), "dtype": leaf.dtype.name}
        for path, leaf in jax.tree_util.tree_leaves_with_path(items)
    }


def _leaves(items: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of every leaf.

    The checksum is the uint32 sum of (bits of an element) x (an odd number for its place): the same on every mesh, and
    any one flipped bit changes it.
    """
    sums = jax.device_get(_sum_all(jax.tree.leaves(items)))
    return {
        name: {**shape, "checksum": int(value)}
        for (name, shape), value in zip(_shapes(items).items(), sums, strict=True)
    }


@jax.jit
def _sum_all(leaves: list[jax.Array]) -> list[jax.Array]:
    def one(leaf: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
        place, stride = jnp.ones(leaf.shape, jnp.uint32), 2
        for axis in reversed(range(leaf.ndim)):
            place += jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        return (bits * place).sum(dtype=jnp.uint32)

    return [one(leaf) for leaf in leaves]


def _everywhere(ok: bool) -> bool:
    return bool(multihost_utils.process_allgather(jnp.asarray(ok)).all())


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
