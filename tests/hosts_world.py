"""Two processes on loopback that are two hosts of one run: four CPU devices each, JAX's own coordinator and gloo."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = 4  # of each host


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def two_hosts(command: Sequence[str], logs: pathlib.Path) -> Iterator[list[subprocess.Popen]]:
    """Both processes of `command` (in it, {port} and {host} are filled in); `logs/0.log` and `1.log` get what they say.

    Whatever is left of them at the end is killed."""
    port, processes = str(free_port()), []
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(DEVICES), "PYTHONPATH": str(ROOT)}
    logs.mkdir(parents=True, exist_ok=True)
    try:
        for host in range(2):
            filled = [word.replace("{port}", port).replace("{host}", str(host)) for word in command]
            with open(logs / f"{host}.log", "w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *filled],
                        stdout=log,
                        stderr=log,
                        env=environment,
                        cwd=ROOT,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(processes: Sequence[subprocess.Popen], timeout_s: float) -> list[int]:
    """The exit codes."""
    return [process.wait(timeout_s) for process in processes]
