"""A network of its own with one DNS server, the one this machine's C library asks there: what it makes of each answer.

`unshare --user --map-root-user --mount --net python dns_world.py RESOLV_CONF` prints {name: [kind, infrastructure]}.
`unshare` gives a network with nothing in it, port 53 included, and lets /etc/resolv.conf be another file.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import pathlib
import socket
import struct
import subprocess
import sys
import threading

from dr_jax.web.fetch import Fetcher, Limits

_SIOCSIFFLAGS, _IFF_UP = 0x8914, 1
_A = 1
_RCODES = {"servfail": 2, "nxdomain": 3, "refused": 5}
NAMES = ("nxdomain", "empty", "servfail", "refused", "silent", "half-failed", "half-silent", "private")


def answer(query: bytes) -> bytes | None:
    """What the first label of the name asks for; `half-...` does it to the question for IPv4 alone."""
    end = query.index(b"\0", 12) + 5  # of the question: name, type, class
    label = query[13 : 13 + query[12]].decode()
    is_a = struct.unpack(">H", query[end - 4 : end - 2])[0] == _A
    if label == "silent" or (label == "half-silent" and is_a):
        return None
    code = 2 if label == "half-failed" and is_a else _RCODES.get(label, 0)
    record = b"\xc0\x0c" + struct.pack(">HHIH4B", _A, 1, 60, 4, 10, 0, 0, 1) if label == "private" and is_a else b""
    return query[:2] + struct.pack(">5H", 0x8180 | code, 1, bool(record), 0, 0) + query[12:end] + record


def serve() -> None:
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))

    def loop() -> None:
        while True:
            query, client = server.recvfrom(512)
            reply = answer(query)
            if reply is not None:
                server.sendto(reply, client)

    threading.Thread(target=loop, daemon=True).start()


def isolate(resolv_conf: pathlib.Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))
    resolv_conf.write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    subprocess.run(["mount", "--bind", str(resolv_conf), "/etc/resolv.conf"], check=True)


async def ask() -> dict[str, list]:
    async with Fetcher(limits=Limits(retries=0)) as fetcher:
        failures = await asyncio.gather(*(fetcher.fetch(f"http://{name}.example.com/") for name in NAMES))
    return {name: [f.kind, f.infrastructure] for name, f in zip(NAMES, failures, strict=True)}


if __name__ == "__main__":
    isolate(pathlib.Path(sys.argv[1]))
    serve()
    print(json.dumps(asyncio.run(ask())))
