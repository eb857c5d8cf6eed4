"""The command itself, in processes of its own, against servers on loopback."""

from __future__ import annotations

import datetime
import email.utils
import http.server
import importlib.util
import json
import os
import pathlib
import re
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from dr_jax.assemble import CHECKPOINT
from dr_jax.web.fetch import Fetcher

ROOT = pathlib.Path(__file__).parents[2]
DOCTOR = ROOT / "tools" / "doctor.py"
ALONE = ("unshare", "--user", "--map-root-user", "--net")  # a network with nothing in it
KEY = "canary-4711"


def call(*argv: str, prefix=(), **more) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    environment |= {"PYTHONPATH": str(ROOT)} | more.pop("environment", {})
    command = [*prefix, sys.executable, str(DOCTOR), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, **more)


def lines(done: subprocess.CompletedProcess) -> dict[str, tuple[str, str]]:
    """{name: (verdict, text)}"""
    found = re.findall(r"^(\w+) +(ok|mend|-) +(.+)$", done.stdout, re.MULTILINE)
    return {name: (verdict, text) for name, verdict, text in found}


@pytest.fixture
def serve():
    """`serve(ahead_s)` starts an HTTP server with such a clock; its `seen` are the headers of each request."""
    servers = []

    def start(ahead_s: float = 0.0):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.seen.append(str(self.headers))
                self.send_response(403)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def date_time_string(self, timestamp=None):
                there = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=ahead_s)
                return email.utils.format_datetime(there, usegmt=True)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def engine(port: int, *, provider: str = "searxng", scheme: str = "http") -> tuple[str, ...]:
    """Settings of a search engine at a port of this machine. JAX is not waited for: it is not what is tested."""
    return (
        f"--config.web.provider={provider}",
        f"--config.web.endpoint={scheme}://engine.test/search?token={KEY}",
        f"--config.web.endpoint_address=127.0.0.1:{port}",
        "--limit_s=0",
    )


def alone() -> tuple[str, ...]:
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives nobody a network namespace of their own")
    return ALONE


def test_the_quickstart_needs_neither_key_nor_network(tmp_path):
    done = call(f"--workdir={tmp_path}/new/run", prefix=alone())
    assert done.returncode == 0, done.stdout
    assert {verdict for verdict, _ in lines(done).values()} == {"ok", "-"}
    assert lines(done)["provider"] == ("ok", "the embedded world needs no key")
    assert lines(done)["egress"] == ("ok", "the embedded world needs no network")
    assert list(lines(done)) == (
        ["python", "packages", "devices", "model", "provider", "egress", "dns", "clock", "workdir", "memory", "files"]
    )
    assert len({line.index(verdict) for line, verdict in re.findall(r"^(\w+ +(ok|-) .*)$", done.stdout, re.M)}) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_is_down_is_named_and_the_way_without_one():
    settings = ("--config.web.provider=serper", "--page=https://page.example.com/", "--limit_s=0")
    done = call(*settings, prefix=alone(), environment={"SERPER_API_KEY": KEY})
    assert done.returncode == 1
    assert lines(done)["provider"][0] == "ok"
    for name, host in {"egress": "google.serper.dev", "page": "https://page.example.com/"}.items():
        assert lines(done)[name][0] == "mend"
        assert lines(done)[name][1].startswith((f"{host}: dns: the resolver", f"{host}: connection: nobody accepts"))
    asked = "ok" if ": connection:" in lines(done)["egress"][1] else "mend"
    assert lines(done)["dns"][0] == asked
    assert "neither key nor network: --config=configs/quickstart.py" in done.stdout
    assert KEY not in done.stdout + done.stderr


def test_a_provider_that_answers(serve):
    server = serve()
    done = call(*engine(server.server_port, provider="serper"), environment={"SERPER_API_KEY": KEY})
    found = lines(done)
    assert found["provider"] == ("ok", "serper: SERPER_API_KEY is set; it was not tried, as a search costs")
    assert found["egress"] == ("ok", "engine.test answers (HTTP 403)")
    assert found["dns"] == ("-", "the config says where engine.test is")
    assert found["clock"][0] == "ok"
    (headers,) = server.seen
    assert KEY not in done.stdout + done.stderr + headers


@pytest.mark.parametrize(("ahead_s", "says"), [(3600, "s behind the provider's"), (-3600, "s ahead of the provider's")])
def test_a_wrong_clock(serve, ahead_s, says):
    verdict, text = lines(call(*engine(serve(ahead_s).server_port)))["clock"]
    assert verdict == "mend"
    assert 3590 < int(text.split()[0].replace(",", "")) < 3610
    assert says in text


def test_a_server_that_never_answers_and_a_port_where_nobody_is_and_one_without_tls(serve):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started_s = time.monotonic()
        found = lines(call(*engine(silent.getsockname()[1])))
        assert time.monotonic() - started_s < 60.0  # of which 5 wait for the server
        closed_port = silent.getsockname()[1]
    assert found["egress"][1].startswith("engine.test: timeout: nothing came in 5 s")
    assert found["clock"] == ("-", "nobody answered")
    for kind, settings in {
        "connection": engine(closed_port),
        "tls": engine(serve().server_port, scheme="https"),
    }.items():
        verdict, text = lines(call(*settings))["egress"]
        assert (verdict, text.split(": ")[:2]) == ("mend", ["engine.test", kind])


def test_a_key_that_is_not_there(serve):
    done = call(*engine(serve().server_port, provider="serper"))
    assert lines(done)["provider"][0] == "mend"
    assert "export SERPER_API_KEY=..." in lines(done)["provider"][1]


def reading(port: int) -> tuple[str, ...]:
    """Settings of an endpoint that reads, at a port of this machine."""
    return (
        "--config.web.reader=endpoint",
        f"--config.reading.endpoint=http://llm.test/v1?token={KEY}",
        f"--config.reading.endpoint_address=127.0.0.1:{port}",
        "--config.reading.model=small",
        "--config.reading.key_variable=LLM_API_KEY",
        "--limit_s=0",
    )


def test_an_endpoint_that_reads(serve):
    server = serve()
    done = call(*reading(server.server_port), environment={"LLM_API_KEY": KEY})
    assert lines(done)["reader"] == ("ok", "llm.test answers (HTTP 403)")
    (headers,) = server.seen
    assert KEY not in done.stdout + done.stderr + headers
    without = lines(call(*reading(server.server_port)))["reader"]
    assert (without[0], "export LLM_API_KEY=..." in without[1]) == ("mend", True)


def test_a_machine_that_is_too_small(tmp_path):
    huge = json.loads((CHECKPOINT / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (tmp_path / "config.json").write_text(json.dumps(huge))

    settings = (f"--config.model.path={tmp_path}", "--config.mesh.fsdp=64", f"--workdir={tmp_path}")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))  # inherited
    try:
        done = call(*settings)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert done.returncode == 1
    found = lines(done)
    for name, says in {
        "devices": "(cpu); config.mesh or config.engine.tensor asks for 64. libtpu ",
        "model": "neither model.safetensors nor model.safetensors.index.json",
        "workdir": "choose a larger disk or lower config.checkpoint.keep",
        "memory": "use a larger host",
        "files": "300 may be open; 512 pages and 64 searches at once need 1,408: run `ulimit -n 1408`",
    }.items():
        assert found[name][0] == "mend"
        assert says in found[name][1]
    assert done.stdout.splitlines()[-1] == "mend: devices, model, workdir, memory, files"


def test_what_cannot_be_read_or_written_and_a_backend_that_is_not_there(tmp_path):
    settings = (f"--config.model.path={tmp_path}", "--workdir=/proc/run")
    found = lines(call(*settings, environment={"JAX_PLATFORMS": "abacus"}))
    assert found["devices"][0] == "mend"
    assert "abacus" in found["devices"][1]
    assert found["model"][1].startswith(f"config.model.path: no Hugging Face checkpoint at {tmp_path}")
    assert found["workdir"][0] == "mend"
    assert found["workdir"][1].startswith("/proc cannot be written")
    assert found["memory"][0] == "-"


def test_a_file_that_hangs_holds_nobody_for_long(tmp_path):
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    os.mkfifo(tmp_path / "model.safetensors.index.json")  # opening it waits for a writer
    found = lines(call(f"--config.model.path={tmp_path}", "--limit_s=0"))
    assert found["devices"][1].startswith("JAX listed none in 0 s: another process holds them")
    assert found["model"] == ("mend", "no result in 10 s; does a disk or a mount hang?")
    assert found["files"][0] == "ok"


def test_packages(tmp_path):
    info = tmp_path / "aiohttp-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: aiohttp\nVersion: 1.0\n")
    done = call("--limit_s=0", environment={"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])})
    assert lines(done)["packages"][1].startswith("aiohttp>=3.12 is needed, 1.0 is there: run `pip install -e .`")


def test_without_any_package_it_says_what_to_install():
    done = subprocess.run([sys.executable, "-I", "-S", str(DOCTOR)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == ""
    assert set(lines(done)) == {"packages", "dr_jax"}
    assert all("pip install -e ." in text for _, text in lines(done).values())


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--config=nowhere.py"], "error: --config: no such file 'nowhere.py'"),
        (["--config.optim.lr=fast"], "error: "),
        (["--limit_s=-1"], "error: flag --limit_s=-1"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv, says):
    done = call(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(says)
    assert done.stderr.count("\n") == 1


def test_a_page_of_the_own_network_is_refused_as_in_a_run(serve):
    server = serve()
    found = lines(call(f"--page=http://127.0.0.1:{server.server_port}/", "--limit_s=0"))
    assert found["page"][0] == "mend"
    assert ": blocked: " in found["page"][1]
    assert server.seen == []


async def test_a_page_is_read_or_its_failure_named(serve):
    spec = importlib.util.spec_from_file_location("doctor", DOCTOR)
    doctor = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(doctor)
    hosts = {"page.test": ("127.0.0.1", serve().server_port)}
    finding = await doctor.read(Fetcher(hosts=hosts), "http://page.test/")
    assert finding == ("page", "mend", "http://page.test/: status: HTTP 403")
