"""Looks at what a run needs before it starts: one line a check, `ok` or `mend` and what to do.

    python tools/doctor.py                                    # for the quickstart: needs neither key nor network
    python tools/doctor.py --config=configs/deepresearcher_7b.py --workdir=/data/runs/7b --page=https://en.wikipedia.org/

Exit code: 0 nothing to mend, 1 something to mend, 2 a mistake in the flags or in the config. The search provider is
asked for any answer at all, without the key: no search is paid for.
"""

from __future__ import annotations

import ast
import asyncio
import concurrent.futures
import contextlib
import datetime
import email.utils
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
from typing import TYPE_CHECKING, Any, NamedTuple

# Nothing else is imported before it is needed, so that a missing package is a line of the report too.
if TYPE_CHECKING:
    from absl.flags import FlagValues

    from dr_jax.records import Failure
    from dr_jax.run_config import RunConfig
    from dr_jax.web.fetch import Fetcher
    from dr_jax.web.guard import Hosts

ROOT = pathlib.Path(__file__).resolve().parents[1]
INSTALL = "run `pip install -e .` in the Python that trains"

_NETWORK_S = 5.0  # to an answer; of these, 3 to resolve and 3 to connect
_CLOCK_S = 60.0  # more than that, and a date in `Retry-After` or a certificate means something else
_STATE_BYTES = 12  # of one parameter in a checkpoint: itself and both moments, f32
_MEMORY_BYTES = 2 << 30  # besides the parameters; the quickstart takes 1.6 GB (docs/benchmarks.md)
_OTHER_FILES = 256  # a margin for logs, checkpoints, parser pipes and the resolver's threads


class Finding(NamedTuple):
    """One line. `verdict`: 'ok', 'mend', or '-' where there was nothing to look at."""

    name: str
    verdict: str
    text: str


def judged(name: str, holds: bool, told: str, remedy: str) -> Finding:
    return Finding(name, "ok", told) if holds else Finding(name, "mend", f"{told}: {remedy}")


def versions() -> list[Finding]:
    """Python and the installed packages against setup.py."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return [Finding("packages", "mend", f"`packaging` is missing, and so, likely, are others: {INSTALL}")]
    wants, python, wrong = _setup(), platform.python_version(), []
    for requirement in map(Requirement, wants["install_requires"]):
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement} is needed, {version} is there")
    python_wanted, count = wants["python_requires"], len(wants["install_requires"])
    fits = SpecifierSet(python_wanted).contains(python, prereleases=True)
    found = [judged("python", fits, python, f"{python_wanted} is needed")]
    if wrong:
        return [*found, Finding("packages", "mend", f"{'; '.join(wrong)}: {INSTALL}")]
    return [*found, Finding("packages", "ok", f"{count} as in setup.py")]


def _setup() -> dict[str, Any]:
    """The literal arguments of `setup()`."""
    tree = ast.parse((ROOT / "setup.py").read_text())
    call = next(n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "setup")
    return {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg in ("python_requires", "install_requires")}


def examine(run: RunConfig, values: FlagValues) -> int:
    """The exit code, after a line for each check. All run at once; one that hangs is left behind."""
    from dr_jax.errors import DrJaxError

    patience_s = values.limit_s + 2 * _NETWORK_S  # JAX and the network have limits of their own, and imports take time
    until_s, found = time.monotonic() + patience_s, versions()
    checks = {
        "devices": devices, "model": model, "provider": provider, "egress": egress, "reader": reader, "page": page,
        "workdir": workdir, "memory": memory, "files": files,
    }  # fmt: skip
    with contextlib.suppress(ImportError):  # first by one thread: of modules that import each other, two get halves
        importlib.import_module("dr_jax.assemble")
    threads = concurrent.futures.ThreadPoolExecutor(len(checks))
    running = {name: threads.submit(check, run, values) for name, check in checks.items()}
    for name, answer in running.items():
        try:
            found += answer.result(timeout=max(until_s - time.monotonic(), 0.0))
        except concurrent.futures.TimeoutError:
            found.append(Finding(name, "mend", f"no result in {patience_s:g} s; does a disk or a mount hang?"))
        except (DrJaxError, ImportError) as mistake:
            found.append(Finding(name, "mend", " ".join(str(mistake).split())))
    return report(found)


def report(found: list[Finding]) -> int:
    for name, verdict, text in found:
        print(f"{name:<9} {verdict:<4}  {text}")
    ill = [finding.name for finding in found if finding.verdict == "mend"]
    print(f"mend: {', '.join(ill)}" if ill else "nothing to mend")
    if {"provider", "egress", "reader", "page"} & set(ill):
        print("The embedded world needs neither key nor network: --config=configs/quickstart.py")
    return 1 if ill else 0


# The machine --------------------------------------------------------------------------------------------------------

_LIST = "import jax, json; d = jax.devices(); print(json.dumps([len(d), d[0].device_kind, d[0].platform]))"


def devices(run: RunConfig, values: FlagValues) -> list[Finding]:
    """What JAX sees, asked in a process that can be killed: an accelerator that another process holds can hang it."""
    wanted = max(math.prod(run.mesh.values()), run.engine.tensor)
    # Beside a run that uses the same GPUs this must not take their memory.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _LIST], capture_output=True, text=True, timeout=values.limit_s, env=environment
        )
    except subprocess.TimeoutExpired:
        why = "another process holds them, or a slice's other hosts have not started; see --limit_s"
        return [Finding("devices", "mend", f"JAX listed none in {values.limit_s:g} s: {why}")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was killed"])[-1]
        return [Finding("devices", "mend", f"JAX lists none: {last[:300]}")]
    count, kind, where = json.loads(done.stdout.splitlines()[-1])
    seen = f"{count} x {kind} ({where})"
    if count >= wanted:
        return [Finding("devices", "ok", seen)]
    return [Finding("devices", "mend", f"{seen}; config.mesh or config.engine.tensor asks for {wanted}. {_libtpu()}")]


def _libtpu() -> str:
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return "libtpu is not installed: on a TPU host, `pip install -e '.[tpu]'`; elsewhere make config.mesh smaller"
    return f"libtpu {version} is installed: this host has fewer chips, or another process holds them"


def workdir(run: RunConfig, values: FlagValues) -> list[Finding]:
    """Can be written, and has room for the checkpoints that are kept, the one being written, and the export."""
    place = pathlib.Path(values.workdir).absolute()
    held = sum(file.stat().st_size for file in place.glob("checkpoints/**/*") if file.is_file())
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            free = shutil.disk_usage(place).free + held
    except OSError as error:
        return [Finding("workdir", "mend", f"{place} cannot be written ({error.strerror}): choose another --workdir")]
    parameters = _parameters(run)
    if parameters is None:
        return [Finding("workdir", "-", f"{_size(free)} free in {place}; what is needed depends on the model")]
    export_bytes = {"float32": 4, "bfloat16": 2}[run.export.dtype]
    wanted = parameters * (_STATE_BYTES * (run.checkpoint.keep + 1) + export_bytes)
    told = f"{_size(free)} free in {place}; {run.checkpoint.keep + 1} checkpoints and the export take {_size(wanted)}"
    return [judged("workdir", free >= wanted, told, "choose a larger disk or lower config.checkpoint.keep")]


def memory(run: RunConfig, values: FlagValues) -> list[Finding]:
    """Room for this process and for the state on its way into a checkpoint."""
    free, parameters = _free_memory_bytes(), _parameters(run)
    if free is None or parameters is None:
        why = "this system has no /proc/meminfo" if free is None else f"{_size(free)} free; how large is the model?"
        return [Finding("memory", "-", why)]
    wanted = _MEMORY_BYTES + _STATE_BYTES * parameters
    told = f"{_size(free)} free; a run that writes a checkpoint takes {_size(wanted)} or more"
    return [judged("memory", free >= wanted, told, "use a larger host")]


def _free_memory_bytes() -> int | None:
    from dr_jax.rollout.admission import memory_bytes

    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    return min(free, memory_bytes())


def files(run: RunConfig, values: FlagValues) -> list[Finding]:
    """Descriptors for every page and search that may be under way at once."""
    from dr_jax import assemble
    from dr_jax.web.fetch import Limits

    preset, limit = assemble.preset(run), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    in_flight = run.rollout.max_in_flight
    pages = min(Limits().max_concurrent, in_flight * preset.max_urls)
    searches = min(run.web.max_concurrent_searches, in_flight * preset.max_queries)
    ends = 2 if run.web.provider == assemble.WORLD else 1  # the embedded site answers in the same process
    wanted = ends * (pages + searches) + _OTHER_FILES
    allowed = math.inf if limit == resource.RLIM_INFINITY else limit
    told = f"{allowed:,} may be open; {pages} pages and {searches} searches at once need {wanted:,}"
    return [
        judged("files", allowed >= wanted, told, f"run `ulimit -n {wanted}`, or lower config.rollout.max_in_flight")
    ]


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def model(run: RunConfig, values: FlagValues) -> list[Finding]:
    """config.json is one of ours, and every tensor that it speaks of is in a file."""
    from dr_jax import assemble
    from dr_jax.model import hf
    from dr_jax.model.config import ModelConfig

    path = assemble.model_path(run)
    hf.check(path, ModelConfig.from_hf(path))
    return [Finding("model", "ok", f"{path}: whole, {_parameters(run):,} parameters")]


def _parameters(run: RunConfig) -> int | None:
    """How many the network has; None where its config.json cannot be read."""
    from dr_jax import assemble
    from dr_jax.errors import ConfigError
    from dr_jax.model import weights
    from dr_jax.model.config import ModelConfig

    try:
        return weights.count(ModelConfig.from_hf(assemble.model_path(run)))
    except ConfigError:
        return None


# The network --------------------------------------------------------------------------------------------------------

REMEDIES = {
    "dns": "the resolver does not answer; see /etc/resolv.conf and the network",
    "no_such_host": "the resolver knows no such name; see its spelling, and whether this network may look outside",
    "connection": "nobody accepts the connection; see the firewall, and whether the service runs",
    "timeout": f"nothing came in {_NETWORK_S:g} s; see the firewall, and whether the service hangs",
    "tls": "its certificate is not accepted; see the clock, and proxies that read what passes",
    "blocked": "this address or port is never dialled; an endpoint of one's own goes into `endpoint_address`",
}


def provider(run: RunConfig, values: FlagValues) -> list[Finding]:
    """The client can be opened with the key of the environment, which is not shown and not sent."""
    from dr_jax import assemble, searching

    if not _asks_somebody(run):
        return [Finding("provider", "ok", f"{_alone(run)} needs no key")]

    async def open_client() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await searching.open_client(run.web, {}, assemble.budget(run), stack, index=0, count=1)

    asyncio.run(open_client())
    key = f"{run.web.key_variable} is set; it was not tried, as a search costs"
    told = key if searching.api_key(run.web) else "asks for no key"
    return [Finding("provider", "ok", f"{run.web.provider}: {told}")]


def egress(run: RunConfig, values: FlagValues) -> list[Finding]:
    """Whether the provider's name is known, its server answers at all, and how far its clock is from ours."""
    from dr_jax import searching

    endpoint = run.web.endpoint or searching.provider(run.web).endpoint
    if not _asks_somebody(run) or not endpoint:
        told = ("-", "no endpoint to ask") if _asks_somebody(run) else ("ok", f"{_alone(run)} needs no network")
        return [Finding("egress", *told), *(Finding(name, "-", "nobody was asked") for name in ("dns", "clock"))]
    return reach("egress", endpoint, searching.own_endpoint(run.web), run.web.contact)


def reader(run: RunConfig, values: FlagValues) -> list[Finding]:
    """Whether the endpoint that reads pages can be asked, and answers at all; its key is not sent."""
    from dr_jax import reading

    if run.web.reader != "endpoint" or run.web.cache_mode == "replay":
        return []
    return reach("reader", reading.endpoint(run).base_url, reading.own_endpoint(run), run.web.contact)[:1]


def reach(name: str, endpoint: str, hosts: Hosts, contact: str) -> list[Finding]:
    """The line called `name`, and those of the server's name and clock."""
    from dr_jax.records import Failure

    host = urllib.parse.urlsplit(endpoint).hostname  # what follows it may hold a token
    answer = asyncio.run(ask(endpoint, hosts, contact))
    named = (
        Finding("dns", "-", f"the config says where {host} is") if hosts else Finding("dns", "ok", f"{host} is known")
    )
    if not isinstance(answer, Failure):
        return [Finding(name, "ok", f"{host} answers (HTTP {answer[0]})"), named, clock(answer[1])]
    why = REMEDIES.get(answer.kind, f"no HTTP as it should be ({answer.detail})")
    if answer.kind in ("dns", "no_such_host"):
        named = Finding("dns", "mend", f"{host}: {answer.kind}")
    silent = Finding("clock", "-", "nobody answered")
    return [Finding(name, "mend", f"{host}: {answer.kind}: {why}"), named, silent]


async def ask(url: str, hosts: Hosts, contact: str) -> tuple[int, str] | Failure:
    """(status, `Date` header) or a Failure: one request as production makes it, but without a key."""
    from dr_jax.web.http import Timeouts, failure_of, open_session

    timeouts = Timeouts(dns_s=3.0, connect_s=3.0)
    try:
        async with open_session(hosts=hosts, timeouts=timeouts, contact=contact) as session:
            async with asyncio.timeout(_NETWORK_S), session.get(url, allow_redirects=False) as response:
                return response.status, response.headers.get("Date", "")
    except Exception as error:  # noqa: BLE001 - the border, as in dr_jax.web.search
        return failure_of(error)


def clock(date: str) -> Finding:
    """This machine's clock against the `Date` of an answer that came just now."""
    try:
        theirs = email.utils.parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return Finding("clock", "-", "the answer has no date")
    ahead_s = datetime.datetime.now(datetime.UTC).timestamp() - theirs
    told = f"{abs(ahead_s):,.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the provider's"
    return judged("clock", abs(ahead_s) <= _CLOCK_S, told, "set it, for example `timedatectl set-ntp true`")


def page(run: RunConfig, values: FlagValues) -> list[Finding]:
    """Whether the run's own fetcher gets the page of --page."""
    from dr_jax.web.fetch import Fetcher, Limits
    from dr_jax.web.guard import AddressPolicy
    from dr_jax.web.http import Timeouts
    from dr_jax.web.politeness import Manners

    if values.page is None:
        return []
    web = run.web
    policy = AddressPolicy(blocked_domains=frozenset(web.blocked_domains))
    timeouts = Timeouts(dns_s=3.0, connect_s=3.0, response_s=_NETWORK_S, total_s=_NETWORK_S)
    limits = Limits(max_wait_s=_NETWORK_S, retries=0, timeouts=timeouts)
    manners = Manners(robots=web.robots, min_delay_s=0.0)
    return [asyncio.run(read(Fetcher(policy, limits=limits, manners=manners, contact=web.contact), values.page))]


async def read(fetcher: Fetcher, url: str) -> Finding:
    from dr_jax.records import Failure

    async with fetcher:
        answer = await fetcher.fetch(url)
    if isinstance(answer, Failure):
        why = REMEDIES.get(answer.kind, answer.detail or "try a page that a browser shows")
        return Finding("page", "mend", f"{url}: {answer.kind}: {why}")
    return Finding("page", "ok", f"{url}: {len(answer.body):,} bytes")


def _asks_somebody(run: RunConfig) -> bool:
    return run.web.provider != "world" and run.web.cache_mode != "replay"


def _alone(run: RunConfig) -> str:
    return "the embedded world" if run.web.provider == "world" else "a replay"


def main(argv: list[str]) -> int:
    """The exit code."""
    try:
        from absl import flags

        from dr_jax import entry
    except ImportError as missing:
        return report([*versions(), Finding("dr_jax", "mend", f"{missing}: {INSTALL}")])
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "runs", "Directory that is to own the run.", flag_values=values)
    flags.DEFINE_string("page", None, "A web page to fetch as the run would.", flag_values=values)
    flags.DEFINE_float("limit_s", 20.0, "Seconds until what hangs is given up.", 0.0, flag_values=values)
    if not any(arg.startswith("--config=") for arg in argv):
        argv = [argv[0], f"--config={ROOT / 'configs' / 'quickstart.py'}", *argv[1:]]
    return entry.run(examine, values, about=__doc__, argv=argv)


if __name__ == "__main__":
    code = main(sys.argv)
    sys.stdout.flush()
    os._exit(code)  # a resolver or a disk that hangs holds a thread, which Python would wait for
