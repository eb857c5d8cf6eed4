"""Real servers on loopback, good and bad."""

from __future__ import annotations

import asyncio
import contextlib

import pytest


class ScriptedServer:
    """Connection i gets answer i, the last one for ever: bytes to send, or a coroutine function (reader, writer).

    One request per connection; `requests` holds each as it came (head and body)."""

    def __init__(self, answers):
        self.answers = answers
        self.requests: list[bytes] = []
        self.connections = 0

    async def handle(self, reader, writer):
        answer = self.answers[min(self.connections, len(self.answers) - 1)]
        self.connections += 1
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            for line in request.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    request += await reader.readexactly(int(line.split(b":")[1]))
            self.requests.append(request)
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def serve():
    """`await serve(answer, ...)` starts a server and returns it, with its `port`."""
    async with contextlib.AsyncExitStack() as stack:
        tasks: set[asyncio.Task] = set()

        async def start(*answers, host="127.0.0.1"):
            scripted = ScriptedServer(answers)

            async def handle(reader, writer):
                tasks.add(asyncio.current_task())
                await scripted.handle(reader, writer)

            server = await stack.enter_async_context(await asyncio.start_server(handle, host, 0))
            scripted.port = server.sockets[0].getsockname()[1]
            return scripted

        yield start
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
