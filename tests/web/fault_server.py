"""What servers do wrong, as answers for the `serve` fixture: bytes to send, or coroutine functions (reader, writer)
that speak to the raw socket."""

from __future__ import annotations

import asyncio
import gzip
import os
import socket
import struct

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"


def http(body: bytes = b"", *headers: str, status: str = "200 OK", type: str | None = "text/html") -> bytes:
    """A whole answer; a Content-Length is added where the headers say nothing about length."""
    lines = [f"HTTP/1.1 {status}", *headers]
    if type is not None:
        lines.append(f"Content-Type: {type}")
    if not any(header.lower().startswith(("content-length", "transfer-encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def redirect(location: str) -> bytes:
    return http(b"", f"Location: {location}", status="302 Found")


def forever(piece: bytes, head: bytes = HEAD + b"\r\n", *, pause_s: float = 0.0):
    """`head`, then `piece` until the client goes away."""

    async def answer(reader, writer):
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)

    return answer


def then_reset(start: bytes):
    """`start`, then a connection reset instead of an end."""

    async def answer(reader, writer):
        writer.write(start)
        await writer.drain()
        linger = struct.pack("ii", 1, 0)  # closing is a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    return answer


async def silent(reader, writer):
    await reader.read()


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
GIBIBYTE = gzip.compress(bytes(16 << 20), 9) * 64  # 1 MB that is 1 GiB
BROTLI = http(b"\xff" * 1617, "Content-Encoding: br")  # refused unread: what it would become does not matter
CUT_GZIP = gzip.compress(os.urandom(999))[:500]
