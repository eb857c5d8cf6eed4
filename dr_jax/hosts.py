"""Several hosts as one run: how they find each other, agree, and fall together.

Each host of a slice runs this same program. It rolls out its share of a step's questions with an engine of its own, and
all of them run the learner's programs together. Such a program waits for every host, so nothing may stand around one
that only some hosts do, and every host must launch them in the same order, from one thread at a time: what
one host alone knows goes through `gather` or `agreed` first. With one host every function here is trivial.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import pathlib
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from dr_jax import chips, errors
from dr_jax.errors import ConfigError, DrJaxError, RolloutHalted
from dr_jax.run_config import RunConfig

JOIN_TIMEOUT_S = 300  # for the slowest host to install and to start
HEARTBEAT_TIMEOUT_S = 30  # a host that is silent for so long is dead: the others end with a stack
SHUTDOWN_TIMEOUT_S = 20  # what a host waits for the others at its end before it takes them down
MIN_SILENCE_S = 600.0  # a compilation, or the longest update, takes less

Item = TypeVar("Item")
_SAID_BY_ALL = "every host raised this"


def join(run: RunConfig, *, coordinator: str, processes: int | None, process: int | None) -> None:
    """Makes this process one host of the run. Must come before any other use of JAX.

    `coordinator`: 'ip:port' on which process 0 listens, with `processes` and `process`; 'auto' where the cluster tells
    (TPU slices, Slurm, Kubernetes, Open MPI); '' = alone, unless `config.topology` spans hosts: then as 'auto'.

    Raises:
      ConfigError: the flags contradict each other, or the other hosts are not there.
    """
    given = (processes is not None, process is not None)
    if coordinator in ("", "auto"):
        if any(given):
            raise ConfigError(
                f"--processes and --process: need --coordinator=ip:port of process 0, got {coordinator!r}"
            )
        if not coordinator and not _spans_hosts(run):
            return
        how: dict[str, Any] = {}
    else:
        if not all(given) or not 0 <= process < processes:
            raise ConfigError(
                f"--coordinator: {coordinator!r} needs --processes=N and --process=0..N-1; got {processes}, {process}"
            )
        how = dict(coordinator_address=coordinator, num_processes=processes, process_id=process)
    try:
        jax.distributed.initialize(
            **how,
            initialization_timeout=JOIN_TIMEOUT_S,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--coordinator: this host cannot join the others ({reason}). Start the same command on every host of "
            f"{run.topology or 'the cluster'} (launch_tpu.sh does), or give --coordinator, --processes and --process."
        ) from error
    faulthandler.enable(sys.__stderr__ or sys.stderr)  # JAX aborts where a peer is lost: with a stack, please
    threading.excepthook = _end_with_thread


def count() -> int:
    return jax.process_count()


def index() -> int:
    return jax.process_index()


def first() -> bool:
    """True on the one host that writes what belongs to the run as a whole."""
    return index() == 0


def check(run: RunConfig) -> None:
    """Raises `ConfigError` where the run's sizes do not fit the hosts that take part."""
    hosts, devices = count(), jax.device_count()
    if hosts == 1:
        return
    for field, value in (
        ("rollout.questions", run.rollout.questions),
        ("batch.rows", run.batch.rows),
    ):
        if value % hosts:
            raise ConfigError(f"config.{field}: {value} do not divide over {hosts} hosts; make it a multiple")
    if run.batch.parts > 1 and (run.rollout.questions // hosts % run.batch.parts or run.batch.micro_rows % hosts):
        raise ConfigError(
            f"config.batch.parts: got {run.batch.parts}; it must divide a host's {run.rollout.questions // hosts} "
            f"questions, and {hosts} hosts must divide config.batch.micro_rows = {run.batch.micro_rows}; or set it to 1"
        )
    if (used := int(np.prod(list(run.mesh.values())))) != devices:
        raise ConfigError(f"config.mesh: covers {used} devices, the {hosts} hosts have {devices}; it must cover all")
    if jax.local_device_count() % run.engine.tensor:
        raise ConfigError(
            f"config.engine.tensor: {run.engine.tensor} does not divide the {jax.local_device_count()} devices of a "
            "host, on which an engine lives"
        )


def share(items: Sequence[Item]) -> Sequence[Item]:
    """This host's part of `items`; the parts of all hosts, in their order, are `items`."""
    hosts, host = count(), index()
    return items[len(items) * host // hosts : len(items) * (host + 1) // hosts]


def own(workdir: pathlib.Path) -> pathlib.Path:
    """Where this host keeps what is its own: journals and the web cache. The workdir itself where there is one host."""
    return workdir if count() == 1 else workdir / "hosts" / f"{index():03d}"


def gather(value: Any) -> list[Any]:
    """The `value` of every host, in their order, on every host. It travels as JSON. All hosts must call together."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    if count() == 1:
        return [json.loads(text.tobytes())]
    sizes = multihost_utils.process_allgather(np.array(len(text), np.int32))
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)  # few sizes: each is compiled once
    padded[: len(text)] = text
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]


def total(values: Mapping[str, float]) -> dict[str, float]:
    """The sums over all hosts. All hosts must call together, with the same names."""
    everywhere = gather(dict(values))
    return {name: sum(one[name] for one in everywhere) for name in values}


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """A `DrJaxError` that any host raises inside is raised on all of them; other errors are nobody's decision."""
    if count() == 1:
        yield
        return
    problem: DrJaxError | None = None
    try:
        yield
    except DrJaxError as error:
        problem = error
    said = gather(None if problem is None else [type(problem).__name__, str(problem)])
    for host, one in enumerate(said):
        if one is not None:
            name, text = one
            agreement = getattr(errors, name)(f"host {host}: {text}")
            agreement.add_note(_SAID_BY_ALL)
            raise agreement from problem


def agree(check: Callable[[], None]) -> None:
    """Calls `check` inside `agreed`. It waits for the other hosts: off the event loop, please."""
    with agreed():
        check()


def check_shared(workdir: pathlib.Path) -> None:
    """Raises `ConfigError` on every host unless all of them see the same `workdir`. All hosts must call together."""
    if count() == 1:
        return
    mark = workdir / f".shared-{gather(secrets.token_hex(8))[0]}"
    with agreed():
        if first():
            try:
                workdir.mkdir(parents=True, exist_ok=True)
                mark.touch()
            except OSError as error:
                raise ConfigError(f"--workdir: cannot write to {workdir}: {error.strerror}") from error
    blind = [host for host, seen in enumerate(gather(mark.exists())) if not seen]
    if first():
        mark.unlink()
    with agreed():
        if blind:
            raise ConfigError(
                f"--workdir: {len(blind)} of {count()} hosts (first: host {blind[0]}) do not see {workdir} of host 0. "
                "Give a directory that all of them mount, such as an NFS share."
            )


@contextlib.contextmanager
def one_for_all() -> Iterator[None]:
    """Ends the whole run where this host alone fails inside: the others would wait in a collective, heartbeats flowing.

    The way out is the shortest: no handler, no barrier, no thread that is waited for. An error that all hosts agreed on
    passes, as they all leave by the ordinary way."""
    try:
        yield
    except BaseException as error:
        if count() == 1 or _SAID_BY_ALL in getattr(error, "__notes__", ()):
            raise
        fail(error)


def fail(error: BaseException) -> None:
    """Ends this host, and with it the run on all of them, from any thread. With one host it does nothing."""
    if count() > 1:
        _end(3 if isinstance(error, RolloutHalted) else 2 if isinstance(error, DrJaxError) else 1, error)


class Alarm:
    """Ends the process with the stacks of all threads unless it is put off at least every `silence_s`. Close it."""

    def __init__(self, silence_s: float):
        self._silence_s = silence_s
        self.put_off()

    def put_off(self) -> None:
        """Says that the run goes on."""
        # A thread in C: it needs neither the event loop nor the interpreter's lock.
        faulthandler.dump_traceback_later(self._silence_s, exit=True, file=sys.__stderr__ or sys.stderr)

    def close(self) -> None:
        faulthandler.cancel_dump_traceback_later()


def longest_silence_s(run: RunConfig) -> float:
    """How long no part of a step can take: episodes end by their deadline, and so many of them wait for others."""
    episodes = max(run.rollout.questions * run.rollout.rollouts, run.eval.questions)
    return MIN_SILENCE_S + 2 * run.agent.deadline_s * math.ceil(episodes / run.rollout.max_in_flight)


def _spans_hosts(run: RunConfig) -> bool:
    if not run.topology:
        return False
    piece = chips.find(run.topology)
    return piece.chips > piece.chip.host_chips


def _end_with_thread(args: threading.ExceptHookArgs) -> None:
    _end(1, args.exc_value)


def _end(code: int, error: BaseException | None) -> None:
    with contextlib.suppress(OSError, ValueError):  # a full disk may take no log any more
        traceback.print_exception(error)
        print(f"host {index()} of {count()} failed; the run ends on all of them", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
