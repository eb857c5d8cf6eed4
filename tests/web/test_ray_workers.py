"""Workers on a real Ray cluster of two nodes, all of it on loopback."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import pathlib
import socket
import sys

import psutil
import pytest

from dr_jax import assemble, run_config
from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web import ray_workers
from dr_jax.web.fetch import Limits
from dr_jax.web.guard import AddressPolicy
from dr_jax.web.politeness import Manners
from dr_jax.web.ray_workers import RayVisitor, ranked
from dr_jax.web.visit import MeteredVisitor, Settings, open_visitor
from tests.web.fault_server import http, redirect, silent

ROOT = pathlib.Path(__file__).parents[2]
# Ray asks nobody outside, and calls this machine 127.0.0.1 instead of looking for the address of its network.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONPATH": str(ROOT),
}  # fmt: skip
FIRST, SECOND = "first.example", "second.example"  # domains of worker 0 and of worker 1


@pytest.fixture(scope="module", autouse=True)
def _loopback():
    with pytest.MonkeyPatch.context() as patch:  # before the first import of Ray, which reads them
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


def test_a_site_has_one_worker_and_keeps_it_when_another_joins():
    sites = [f"site{i}.example" for i in range(300)]
    before, after = ({site: ranked(site, count)[0] for site in sites} for count in (4, 5))
    assert all(60 < list(before.values()).count(worker) < 90 for worker in range(4))
    moved = [site for site in sites if before[site] != after[site]]
    assert {after[site] for site in moved} == {4}
    assert sorted(ranked("any.example", 7)) == list(range(7))
    assert (ranked(FIRST, 2)[0], ranked(SECOND, 2)[0]) == (0, 1)


@pytest.mark.parametrize("address", ["auto", "ray://", "head:", ":6379", "head:port"])
def test_an_address_that_is_none(address):
    with pytest.raises(ConfigError, match=r"web\.workers: got .*; give the head of a Ray cluster as 'host:6379'"):
        RayVisitor(address)


def test_equal_settings_share_workers_and_others_do_not():
    name = ray_workers._namespace
    one, same = (
        Settings(AddressPolicy(blocked_domains=frozenset(d))) for d in (("a.org", "b.org"), ("b.org", "a.org"))
    )
    assert name(one) == name(same)
    assert len({name(one), name(Settings()), name(Settings(manners=Manners(min_delay_s=2.0)))}) == 3


async def test_a_cluster_that_is_not_there():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'dr_jax[ray]'")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"no Ray cluster for this host at {address}"):
        async with RayVisitor(address):
            pass


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'dr_jax[ray]'")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20, "node_ip_address": "127.0.0.1", "resources": {"web": 1}}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()


def actors() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::_Worker")]


def settings(ports, **limits) -> Settings:
    hosts = {name: ("127.0.0.1", port) for name, port in ports.items()}
    return Settings(hosts=hosts, limits=Limits(retries=0, **limits), manners=Manners(min_delay_s=0.0))


def kind_of(visit) -> FailureKind | None:
    return visit.answer.kind if isinstance(visit.answer, Failure) else None


@pytest.mark.slow
async def test_pages_are_fetched_and_read_by_two_nodes_as_by_this_one(cluster, serve):
    good, large, canary = await serve(http(b"<h1>Ada</h1>")), await serve(http(b"x" * 9000)), await serve(silent)
    away = await serve(redirect("http://127.0.0.1/"))
    named = {FIRST: good, f"www.{SECOND}": good, "large.example": large, "away.example": away}
    where = settings({name: server.port for name, server in named.items()}, max_bytes=5000)
    urls = [*(f"http://{name}/" for name in named), f"http://127.0.0.1:{canary.port}/", "file:///etc/passwd"]
    async with open_visitor(where) as local, RayVisitor(cluster.address, where) as remote:
        here = [await local.visit(url, max_segment_chars=100) for url in urls]
        there = await asyncio.gather(*(remote.visit(url, max_segment_chars=100) for url in urls))
        assert len({actor.pid for actor in actors()}) == 2
        assert len({actor.ppid() for actor in actors()}) == 2  # one on each node
    assert there == here
    K = FailureKind
    assert [kind_of(visit) for visit in there] == [None, None, K.TOO_LARGE, K.BLOCKED, K.BLOCKED, K.BAD_URL]
    assert canary.connections == 0


OTHER_HOST = """
import asyncio, json, sys
from dr_jax.web.ray_workers import RayVisitor
from tests.web.test_ray_workers import settings

async def main(address, hosts, urls):
    async with RayVisitor(address, settings(hosts, max_per_site=1)) as visitor:
        print("open", flush=True)
        sys.stdin.readline()
        visits = await asyncio.gather(*(visitor.visit(url, max_segment_chars=100) for url in urls))
        print(json.dumps([visit.answer.segments for visit in visits]), flush=True)
        sys.stdin.readline()

asyncio.run(main(*json.loads(sys.argv[1])))
"""


@pytest.mark.slow
async def test_the_limits_of_a_site_live_in_one_place(cluster, serve):
    """Two hosts ask for pages of one site, directly and by redirects from a site of the other worker."""
    inside, most = 0, 0

    async def answer(reader, writer):
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0.02)
        inside -= 1
        writer.write(http(b"<p>here"))

    site, elsewhere = await serve(answer), await serve(redirect(f"http://www.{SECOND}/"))
    ports = {f"www.{SECOND}": site.port, FIRST: elsewhere.port}
    urls = [f"http://www.{SECOND}/", f"http://{FIRST}/"] * 5
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", OTHER_HOST, json.dumps([cluster.address, ports, urls])),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert await other.stdout.readline() == b"open\n"
    async with RayVisitor(cluster.address, settings(ports, max_per_site=1)) as visitor:
        other.stdin.write(b"\n")
        visits = await asyncio.gather(*(visitor.visit(url, max_segment_chars=100) for url in urls))
        assert json.loads(await other.stdout.readline()) == [["here"]] * 10
        assert len(actors()) == 2
        assert [visit.answer.segments for visit in visits] == [("here",)] * 10
        assert {visit.answer.url for visit in visits} == {f"http://www.{SECOND}/"}
        assert (site.connections, most) == (20, 1)

        await other.communicate(b"\n")  # the host that started the workers leaves, and they with it
        async with asyncio.timeout(60):
            while kind_of(visit := await visitor.visit(urls[1], max_segment_chars=100)) is FailureKind.OVERLOADED:
                pass
        assert visit.answer.segments == ("here",)


@pytest.mark.slow
async def test_a_visit_given_up_frees_its_turn_and_its_budget(cluster, serve):
    from dr_jax.web.budget import Budget

    asked, gone = asyncio.Event(), asyncio.Event()

    async def wait(reader, writer):
        asked.set()
        await reader.read()
        gone.set()

    server, budget = await serve(wait, http(b"<p>next")), Budget()
    where = settings({FIRST: server.port}, max_per_site=1)
    async with RayVisitor(cluster.address, where) as remote:
        visitor = MeteredVisitor(remote, budget, max_bytes=1000)
        task = asyncio.create_task(visitor.visit(f"http://{FIRST}/", max_segment_chars=100))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(30):
            await gone.wait()  # the worker let go of the connection
        assert budget.run.bytes == 0
        assert (await visitor.visit(f"http://{FIRST}/", max_segment_chars=100)).answer.segments == ("next",)


@pytest.mark.slow
async def test_a_page_whose_worker_ends_is_asked_once_more_and_then_it_is_our_failure(cluster, serve):
    asking = asyncio.Event()

    async def deadly(reader, writer):
        asking.set()
        await reader.read()

    server = await serve(deadly, http(b"<p>saved"), deadly)
    async with RayVisitor(cluster.address, settings({FIRST: server.port})) as visitor:
        call = asyncio.create_task(visitor.visit(f"http://{FIRST}/", max_segment_chars=100))
        await asking.wait()
        asking.clear()
        (its_worker,) = [actor for actor in actors() if server.port in remote_ports(actor)]
        its_worker.kill()
        assert (await call).answer.segments == ("saved",)
        assert server.connections == 2

        call = asyncio.create_task(visitor.visit(f"http://{FIRST}/", max_segment_chars=100))
        while not call.done():
            waiting = asyncio.create_task(asking.wait())
            await asyncio.wait({waiting, call}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            asking.clear()
            for actor in actors():
                if server.port in remote_ports(actor):
                    actor.kill()
        failure = call.result().answer
    assert (failure.kind, failure.infrastructure) == (FailureKind.OVERLOADED, True)
    assert 3 <= server.connections <= 4  # the worker that was killed first may still be starting


def remote_ports(process: psutil.Process) -> set[int]:
    return {one.raddr.port for one in process.net_connections() if one.raddr}


@pytest.mark.slow
async def test_sites_of_a_node_that_is_gone_belong_to_the_other(cluster, serve):
    server = await serve(http(b"<p>here"))
    sites = [f"site{number}.example" for number in range(12)]
    where = settings(dict.fromkeys(sites, server.port))
    lost = cluster.add_node(num_cpus=0, object_store_memory=80 << 20, node_ip_address="127.0.0.1", resources={"web": 1})
    async with RayVisitor(cluster.address, where) as visitor:
        assert len(actors()) == 3
        cluster.remove_node(lost)
        visits = [await visitor.visit(f"http://{site}/", max_segment_chars=100) for site in sites]
        assert len(actors()) == 2
    assert [visit.answer.segments for visit in visits] == [("here",)] * 12
    assert {ranked(site, 3)[0] for site in sites} == {0, 1, 2}


@pytest.mark.slow
async def test_a_cluster_without_workers_says_how_to_start_one(cluster, monkeypatch):
    monkeypatch.setattr(ray_workers, "RESOURCE", "nothing")
    with pytest.raises(ConfigError, match=r"offers the resource 'nothing'; start one with ray start --address="):
        async with RayVisitor(cluster.address):
            pass


@pytest.mark.slow
async def test_a_run_has_its_pages_visited_by_the_workers_that_its_config_names(cluster, tmp_path):
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.web.update(provider="searxng", endpoint="https://searx.example/search", workers=cluster.address)
    run = run_config.resolve(config.to_dict())
    assemble.check(run)
    async with assemble.host(run, tmp_path) as host:
        started = actors()
        assert len(started) == 2
        assert (await host.browser.browse("http://10.0.0.1/")).kind is FailureKind.BLOCKED
    assert psutil.wait_procs(started, timeout=30)[1] == []  # they end with the run
