"""A Cloud TPU on loopback for the real gcloud, as far as it asks; and an ssh that only writes down what it was told."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pathlib
import subprocess
import threading
from collections.abc import Iterator

WRITES_DOWN = """#!/usr/bin/env python3
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([{name!r}, *sys.argv[1:]]) + "\\n")
"""


class Cloud:
    """Answers gcloud; `requests` are what it was asked, `state` what it says of the queued resource (None: absent)."""

    def __init__(self, folder: pathlib.Path, workers: int):
        self.folder, self.workers, self.state = folder, workers, None
        self.next_states: list[str] = []  # what it says after that, one at a time
        self.after_create = ["ACTIVE"]
        self.requests: list[tuple[str, str, dict]] = []

    def answer(self, method: str, path: str, body: dict) -> tuple[int, dict]:
        path = path.split("?")[0]
        self.requests.append((method, path, body))
        operation = {"name": "projects/p/locations/z/operations/o", "done": True, "response": {"name": "run"}}
        if path.endswith("/queuedResources") and method == "POST":
            self.state, self.next_states = "WAITING_FOR_RESOURCES", [*self.after_create]
        elif "/queuedResources/" in path and method == "DELETE":
            self.state = None
        elif "/queuedResources/" in path:
            if self.state is None:
                return 404, {"error": {"code": 404, "message": "not found", "status": "NOT_FOUND"}}
            said = self.state
            if self.next_states:
                self.state = self.next_states.pop(0)
            return 200, {"name": "projects/p/locations/z/queuedResources/run", "state": {"state": said}}
        elif "/nodes/" in path and method == "GET":
            ends = [
                {"ipAddress": f"10.0.0.{i}", "accessConfig": {"externalIp": "127.0.0.1"}} for i in range(self.workers)
            ]
            return 200, {
                "name": "projects/p/locations/z/nodes/run",
                "state": "READY",
                "id": "7",
                "networkEndpoints": ends,
            }
        elif path.endswith("/projects/p"):
            return 200, {"name": "p", "commonInstanceMetadata": {"items": []}, "defaultServiceAccount": "a@b"}
        elif path.endswith(":getGuestAttributes"):
            asked = body["workerIds"] if body["workerIds"] != [""] else range(self.workers)
            return 200, {"guestAttributes": [{"queryValue": {"items": []}} for _ in asked]}
        return 200, operation

    def connections(self) -> list[list[str]]:
        """The ssh and scp commands that gcloud ran."""
        log = self.folder / "connections.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@contextlib.contextmanager
def cloud(folder: pathlib.Path, workers: int) -> Iterator[tuple[Cloud, dict[str, str]]]:
    """The cloud, and the environment in which gcloud talks to it alone."""
    there = Cloud(folder, workers)

    class Answers(http.server.BaseHTTPRequestHandler):
        def _answer(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer = there.answer(self.command, self.path, json.loads(text or "{}"))
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_DELETE = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield there, _environment(folder, server.server_address[1])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _environment(folder: pathlib.Path, port: int) -> dict[str, str]:
    programs, keys = folder / "bin", folder / "home" / ".ssh"
    programs.mkdir()
    keys.mkdir(parents=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "google_compute_engine"], check=True)
    for name in ("ssh", "scp"):
        (programs / name).write_text(WRITES_DOWN.format(name=name, log=str(folder / "connections.jsonl")))
        (programs / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(folder / "home"),
        "CLOUDSDK_CONFIG": str(folder / "gcloud"),
        "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"http://127.0.0.1:{port}/",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"http://127.0.0.1:{port}/compute/v1/",
        "POLL_S": "0",
    }
