"""Parsing in processes of their own: what a page does to its parser, it does to that page alone.

No limit on bytes protects the parser (see `scan`), and a thread cannot be killed. Each worker is a fresh interpreter
(`fork` and `exec` at once: safe beside JAX's threads, and nothing but `dr_jax.web` is imported there), without the keys
of the environment. It limits itself, so that it needs no watcher: the kernel ends it when a page takes too much memory
or CPU time, and when its parent dies it finds its input closed. Answers are JSON, never pickle: a worker that hostile
bytes took over can lie about its page, but runs no code here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import resource
import signal
import sys
from typing import BinaryIO, Self

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind, Page
from dr_jax.web import pdf
from dr_jax.web.page import Response, extract, from_plain, to_plain

_MAX_WORKERS = 16
_RECYCLE_PAGES = 1000  # memory gets fragmented, and the limit is on addresses
_MAX_ANSWER_BYTES = 32 << 20


@dataclasses.dataclass(frozen=True)
class ParseLimits:
    """What one page may cost: CPU seconds rather than wall time, so that a busy host changes no result."""

    cpu_s: float = 2.0
    memory_bytes: int = 1 << 30  # address space of a worker, its interpreter included

    def __post_init__(self) -> None:
        if not 0 < self.cpu_s <= 60:
            raise ConfigError(f"cpu_s: {self.cpu_s} is not within (0, 60]; 2 is usual")
        if self.memory_bytes < 256 << 20:
            raise ConfigError(f"memory_bytes: {self.memory_bytes} is less than 256 MiB; a worker needs them to start")


class _NotStartedError(Exception):
    """A worker ended before it had seen a page."""


@dataclasses.dataclass(eq=False)
class _Worker:
    process: asyncio.subprocess.Process
    ready: bool = False  # it has said so: its imports went well
    pages: int = 0

    @property
    def usable(self) -> bool:
        return self.process.returncode is None and self.pages < _RECYCLE_PAGES

    async def parse(self, request: bytes) -> Page | Failure:
        """The worker's answer. Raises where there is none, or not one of ours; `_NotStartedError` before any page."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        if not self.ready and not await stdout.readline():
            raise _NotStartedError
        self.ready = True
        stdin.write(request)
        await stdin.drain()
        answer = from_plain(json.loads(await stdout.readline()))
        self.pages += 1
        return answer

    def kill(self) -> None:
        self.pages = _RECYCLE_PAGES
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()


class ParserPool:
    """`size` parser processes (default: one a core, at most 16), inside `async with` of one event loop.

    A call waits for a free worker. A page that is too much for one is `Failure(PARSE_LIMIT)`; another worker takes its
    place when the next page needs it. Where this machine cannot start one, the page is `Failure(OVERLOADED)`."""

    def __init__(self, size: int | None = None, limits: ParseLimits | None = None):
        if size is not None and size < 1:
            raise ConfigError(f"size: {size} parser processes are less than 1; leave it out for one a core")
        self._size = size or min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
        self._limits = limits or ParseLimits()
        self._free: asyncio.LifoQueue[_Worker | None] = asyncio.LifoQueue()  # None: one that is not started yet
        self._living: set[_Worker] = set()

    async def __aenter__(self) -> Self:
        try:
            for _ in range(self._size):
                self._free.put_nowait(await self._start())
        except BaseException:  # nobody will leave a pool that could not be entered
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for worker in self._living:
            worker.kill()
        await asyncio.gather(*(worker.process.wait() for worker in self._living))

    async def extract(self, response: Response, *, max_segment_chars: int = 4000) -> Page | Failure:
        """`page.extract` in a worker, PDF included. Never blocks the event loop, never raises."""
        header = {
            "url": response.url,
            "content_type": response.content_type,
            "bytes": len(response.body),
            "max_segment_chars": max_segment_chars,
        }
        request = json.dumps(header).encode() + b"\n" + response.body
        worker, answer = await self._free.get(), None
        try:
            ready = await self._renewed(worker)
            if isinstance(ready, Failure):
                worker, answer = None, ready
            else:
                worker = ready
                answer = await worker.parse(request)
        except _NotStartedError:
            answer = Failure(FailureKind.OVERLOADED, "a parser process ended before it had started")
            await self._end(worker)
            worker = None
        except (OSError, ValueError, KeyError, TypeError):
            answer = Failure(FailureKind.PARSE_LIMIT, "the parser ended, out of time or memory")
            await self._end(worker)
            worker = None
        finally:
            if answer is None and worker is not None:  # cancelled: nobody will read what the worker answers
                worker.kill()
            self._free.put_nowait(worker)
        return answer

    async def _renewed(self, worker: _Worker | None) -> _Worker | Failure:
        """`worker` where it can take another page, else one in its place."""
        if worker is not None and worker.usable:
            return worker
        await self._end(worker)
        try:
            return await self._start()
        except OSError as error:  # no process, memory or file left: the page is not to blame
            return Failure(FailureKind.OVERLOADED, f"no parser process: {os.strerror(error.errno or 0)}")

    async def _start(self) -> _Worker:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-s", "-m", __name__, str(self._limits.cpu_s), str(self._limits.memory_bytes)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=_MAX_ANSWER_BYTES,
            cwd="/",
            # numpy's BLAS reserves addresses for each core when it is imported: gigabytes on a large host.
            env={"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "OPENBLAS_NUM_THREADS": "1"},
        )
        worker = _Worker(process)
        self._living.add(worker)
        return worker

    async def _end(self, worker: _Worker | None) -> None:
        if worker is not None:
            worker.kill()
            await worker.process.wait()
            self._living.discard(worker)


# Inside a worker ----------------------------------------------------------------------------------------------------


def _serve(requests: BinaryIO, answers: BinaryIO, cpu_s: float) -> None:
    answers.write(b"\n")  # ready
    answers.flush()
    while line := requests.readline():
        header = json.loads(line)
        response = Response(header["url"], header["content_type"], requests.read(header["bytes"]))
        read = pdf.extract if pdf.is_pdf(response) else extract
        signal.setitimer(signal.ITIMER_PROF, cpu_s)  # unhandled, SIGPROF ends the process even inside C code
        plain = to_plain(read(response, max_segment_chars=header["max_segment_chars"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(plain).encode() + b"\n")
        answers.flush()


def _main(cpu_s: str, memory_bytes: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then closes the pipe
    _serve(sys.stdin.buffer, sys.stdout.buffer, float(cpu_s))


if __name__ == "__main__":
    _main(*sys.argv[1:])
