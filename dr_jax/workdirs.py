"""The directory that owns a run: who holds it, by which config it was made, and what the run in it has spent."""

from __future__ import annotations

import fcntl
import json
import pathlib
from typing import Any

from dr_jax import metrics, run_config
from dr_jax.errors import ConfigError
from dr_jax.run_config import RunConfig
from dr_jax.web.budget import NOTHING_SPENT, Spent


def claim(workdir: pathlib.Path, run: RunConfig) -> Any:
    """Locks the workdir for this process and records its config there. Close the result to let go.

    Raises:
      ConfigError: another process trains there, or the workdir belongs to a run with another config.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    lock = open(workdir / ".lock", "w")  # noqa: SIM115  (held until the run closes it)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"--workdir: another process is training in {workdir}; wait for it, or choose another"
        ) from error
    path, ours = workdir / "config.json", run_config.as_dict(run)
    if path.exists():
        # A budget may be raised under way: it decides how far a run gets, not what it learns.
        lines = run_config.difference(json.loads(path.read_text()) | {"budget": ours["budget"]}, ours)
        if lines:
            raise ConfigError(
                f"--workdir: {workdir} was made by another config; nothing was changed. Choose another workdir, or "
                "undo the difference:\n  " + "\n  ".join(lines)
            )
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(ours, indent=1) + "\n")
    partial.replace(path)
    return lock


def spent(workdir: pathlib.Path) -> Spent:
    """What the run in `workdir` has spent, as far as its log knows; what is repeated after a crash is paid twice."""
    rows = [row for row in metrics.read(workdir / "metrics.jsonl") if "budget/run_usd" in row]
    if not rows:
        return NOTHING_SPENT
    last = rows[-1]
    return Spent(int(last["budget/run_calls"]), int(last["budget/run_bytes"]), last["budget/run_usd"])
