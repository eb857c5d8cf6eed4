"""Pages fetched and parsed on machines of their own: the same visitor, as actors of a Ray cluster (extra `[ray]`).

Every unit of the cluster's resource `web` is one worker; a machine that is to fetch joins with

    ray start --address=HEAD:6379 --resources='{"web": 1}'

and the hosts that train with `--num-cpus=0` and no such resource. All need the same dr_jax; the address and byte limits
of a page are enforced where it is fetched. The workers have names, so that all hosts of a run share them; each host
counts them when it starts, so the machines come first.

**Limits per site** (turns, delay, `Retry-After`, robots.txt, circuit breaker) live in the worker that a site belongs
to: the first by rendezvous hashing over the last two labels of its name, so that every host picks the same one. A
redirect to another domain is handed back and asked of that domain's worker (that of a robots.txt is not). While a
worker is dead its sites belong to their second one, which starts with no memory of them: at that one moment a site can
see its next request early.

A page whose worker ended is asked once more, of the second; when that fails too it is our failure (OVERLOADED), not the
page's. Ray restarts workers wherever the resource is free. Its nodes trust each other: whoever holds one, holds all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
from typing import Any, Self

from yarl import URL

from dr_jax import __version__
from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.fetch import Fetcher, Moved
from dr_jax.web.guard import admit, domain
from dr_jax.web.page import EXTRACTOR
from dr_jax.web.visit import Settings, Visit, Visitor, Visits, make_fetcher, open_visitor
from dr_jax.web.workers import ParserPool

RESOURCE = "web"
_CONNECT_S = 5.0
_START_S = 60.0  # until every worker has said that it is ready
_AT_ONCE = 4096  # visits of one worker, most of them waiting for their turn at a site
_LOST = Failure(FailureKind.OVERLOADED, "the workers for this site have ended")


def check(address: str) -> None:
    """Raises `ConfigError` for an address that cannot be right, or without the package; opens nothing."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"web.workers: got {address!r}; give the head of a Ray cluster as 'host:6379', or '' for none"
        )
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"web.workers: {address!r} needs a package: pip install 'dr_jax[ray]'")


def open_visits(address: str, settings: Settings) -> contextlib.AbstractAsyncContextManager[Visits]:
    """What visits pages, to be entered: the workers of the cluster at `address`, or this host's own processes ('')."""
    return RayVisitor(address, settings) if address else open_visitor(settings)


def ranked(site: str, count: int) -> list[int]:
    """The workers 0 .. count - 1 in the order in which `site` belongs to them: the same everywhere, and little changes
    where one is added (rendezvous hashing)."""
    return sorted(range(count), key=lambda worker: hashlib.sha256(f"{worker} {site}".encode()).digest())


class RayVisitor:
    """The workers of the cluster at `address` (host:port of its head) as one visitor. Use inside `async with`, once per
    process; a visit that has no answer in `patience_s` (waiting for its turns included) is OVERLOADED.

    Raises:
      ConfigError: nobody answers at `address`, no node offers the resource, or a worker does not start.
    """

    def __init__(self, address: str, settings: Settings | None = None, *, patience_s: float = 300.0):
        check(address)
        self._address, self._settings, self._patience_s = address, settings or Settings(), patience_s
        self._workers: dict[int, Any] = {}  # handles of actors
        self._count = 0

    async def __aenter__(self) -> Self:
        try:
            await self._connect()
        except BaseException:  # nobody will leave what could not be entered
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        import ray

        await asyncio.to_thread(ray.shutdown)

    async def _connect(self) -> None:
        import ray

        host, _, port = self._address.rpartition(":")
        try:  # Ray itself would try for minutes
            async with asyncio.timeout(_CONNECT_S):
                _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            writer.close()
            # In a thread: it blocks, and in the main thread it would take SIGTERM from JAX.
            await asyncio.to_thread(
                ray.init, self._address, namespace=_namespace(self._settings), log_to_driver=False,
                configure_logging=False,
            )  # fmt: skip
        except (OSError, TimeoutError, RuntimeError) as error:  # Ray's ConnectionError is an OSError
            raise ConfigError(f"web.workers: no Ray cluster for this host at {self._address}: {error}") from error
        self._count = int((await asyncio.to_thread(ray.cluster_resources)).get(RESOURCE, 0))
        if not self._count:
            raise ConfigError(
                f"web.workers: no node of {self._address} offers the resource {RESOURCE!r}; start one with "
                f"ray start --address={self._address} --resources='{{\"{RESOURCE}\": 1}}'"
            )
        try:
            async with asyncio.timeout(_START_S):
                here = await asyncio.gather(*[(await self._worker(i)).version.remote() for i in range(self._count)])
        except (ray.exceptions.RayError, TimeoutError) as error:
            raise ConfigError(
                f"web.workers: not every worker has started in {_START_S:g} s ({type(error).__name__}); install "
                f"dr_jax {__version__} on every node, and see whether another run holds the resource {RESOURCE!r}"
            ) from error
        if wrong := [version for version in here if version != _version()]:
            raise ConfigError(f"web.workers: a node runs {wrong[0]}, this host {_version()}: install the same on both")

    async def visit(self, url: str, *, max_segment_chars: int) -> Visit:
        """As `Visitor.visit`, by the worker that the site of `url` belongs to."""
        here = Moved(url, 0)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                while True:
                    target = admit(here.url, self._settings.policy, self._settings.hosts)
                    if isinstance(target, Failure):  # refused there too; this saves the way
                        return Visit(target)
                    answer = await self._leg(target, here, max_segment_chars)
                    if isinstance(answer, Visit):
                        return answer
                    here = answer
        return Visit(Failure(FailureKind.OVERLOADED, f"no answer from a worker in {self._patience_s:g} s"))

    async def _leg(self, target: URL, here: Moved, max_segment_chars: int) -> Visit | Moved:
        """What the site's worker says, or the second one where the first does not live."""
        import ray

        candidates = iter(ranked(domain(target.raw_host), self._count))
        worker = next(candidates)
        for _ in range(2):
            call = (await self._worker(worker)).visit.remote(here, max_segment_chars)
            try:
                return await call
            except asyncio.CancelledError:  # the patience of `visit` included
                ray.cancel(call)
                raise
            except ray.exceptions.ActorDiedError:  # for good: the host that started it has left; we start it again
                self._workers.pop(worker, None)
            except ray.exceptions.RayTaskError:
                raise  # a defect of ours, as it would be in this process
            except ray.exceptions.RayError:  # the actor, its node or the way to it; Ray starts it again, somewhere
                worker = next(candidates, worker)
        return Visit(_LOST)

    async def _worker(self, index: int) -> Any:
        """The handle of worker `index`, which is started where no host has done so yet."""
        import ray

        if index not in self._workers:
            actor = ray.remote(_Worker).options(
                name=f"worker-{index}", get_if_exists=True, num_cpus=0, resources={RESOURCE: 1}, max_restarts=-1,
                max_concurrency=_AT_ONCE,
            )  # fmt: skip
            self._workers[index] = await asyncio.to_thread(actor.remote, self._settings)
        return self._workers[index]


def _namespace(settings: Settings) -> str:
    """Runs with equal settings share workers, and so their limits; others have their own."""
    plain = json.dumps(
        dataclasses.asdict(settings),
        sort_keys=True,
        default=lambda v: sorted(v) if isinstance(v, frozenset) else str(v),
    )
    return f"dr_jax-{hashlib.sha256(plain.encode()).hexdigest()[:16]}"


def _version() -> str:
    return f"dr_jax {__version__} ({EXTRACTOR})"


# On a node ----------------------------------------------------------------------------------------------------------


class _Worker:
    """The actor: one fetcher and its parser processes, opened by the first visit and closed with the process."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._opening = asyncio.Lock()
        self._open: tuple[Fetcher, Visitor] | None = None
        self._stack = contextlib.AsyncExitStack()

    async def version(self) -> str:
        return _version()

    async def visit(self, here: Moved, max_segment_chars: int) -> Visit | Moved:
        async with self._opening:
            if self._open is None:
                try:
                    parsers = await self._stack.enter_async_context(ParserPool())
                    fetcher = await self._stack.enter_async_context(make_fetcher(self._settings))
                    self._open = fetcher, Visitor(fetcher, extract=parsers.extract)
                except OSError as error:  # no process left on this node: the next visit tries again
                    return Visit(Failure(FailureKind.OVERLOADED, f"a worker cannot open: {type(error).__name__}"))
        fetcher, visitor = self._open
        response = await fetcher.leg(here)
        if isinstance(response, Moved):
            return response
        return await visitor.read(response, max_segment_chars=max_segment_chars)
