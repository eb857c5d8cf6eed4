"""The server: OpenAI's HTTP API over a sampler of ours, with limits on size, number and time of what it is asked.

A client that goes away takes its request along: aiohttp cancels the task that answers it, and with it the sampler's.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import ipaddress
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

from aiohttp import web

from dr_jax.agent.template import ChatTemplate
from dr_jax.endpoint import wire
from dr_jax.endpoint.draws import Draws, stream
from dr_jax.endpoint.turn import opening
from dr_jax.endpoint.wire import Asked, Conversation, Refused
from dr_jax.errors import ConfigError
from dr_jax.interfaces import StreamingSampler

_LOG = logging.getLogger(__name__)
_RETRY_AFTER_S = 1


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a client may cost."""

    body_bytes: int = 4 * 2**20
    sequences: int = 256  # drawn or waiting at once, all clients together; more are told to come again
    read_s: float = 30.0  # a request's body
    write_s: float = 60.0  # one chunk of a stream, to a client that does not read
    drain_s: float = 30.0  # for answers under way when the server stops


@dataclasses.dataclass(frozen=True)
class Served:
    """A model and how it is spoken to."""

    name: str
    sampler: StreamingSampler
    template: ChatTemplate
    context: int  # tokens of a prompt and what is drawn


@contextlib.asynccontextmanager
async def serve(
    served: Served, *, host: str = "127.0.0.1", port: int = 0, api_key: str = "", limits: Limits | None = None
) -> AsyncIterator[str]:
    """The URL of the running endpoint (ends in /v1); port 0 takes any free one.

    Leaving stops listening, and gives answers under way `drain_s`. Raises `ConfigError` for an address that others can
    reach without an `api_key`, and for one that cannot be listened on.
    """
    check_host(host, api_key)
    limits = limits or Limits()
    guard = _guard(api_key, loopback_names=not api_key)
    app = web.Application(client_max_size=limits.body_bytes, middlewares=[_errors_as_json, guard])
    _Endpoint(served, limits).add_to(app)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=limits.drain_s)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise ConfigError(f"--host, --port: cannot listen on {host}:{port}: {error.strerror}") from error
        name, number = runner.addresses[0][:2]
        yield f"http://{f'[{name}]' if ':' in name else name}:{number}/v1"
    finally:
        await runner.cleanup()


def check_host(host: str, api_key: str) -> None:
    """Raises `ConfigError` for an address that others can reach, without a key."""
    if not api_key and host != "localhost" and not _is_loopback(host):
        raise ConfigError(f"--host: {host} can be reached by others; that needs an API key (see --help), or 127.0.0.1")


class _Endpoint:
    """The routes, and how many sequences are under way."""

    def __init__(self, served: Served, limits: Limits):
        self._served, self._limits = served, limits
        self._chat = served.template.chat
        self._under_way = 0

    def add_to(self, app: web.Application) -> None:
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{name:.+}", self.model)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.chat_completions)

    async def health(self, request: web.Request) -> web.Response:
        if broken := self._served.sampler.closed:
            return web.json_response({"status": "closed", "detail": broken}, status=503)
        return web.json_response({"status": "ok", "sequences": self._under_way})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._card()]})

    async def model(self, request: web.Request) -> web.Response:
        wire.completion({"prompt": "x", "model": request.match_info["name"]}, model=self._served.name)
        return web.json_response(self._card())

    def _card(self) -> dict[str, Any]:
        about = {"object": "model", "created": 0, "owned_by": "dr_jax", "max_model_len": self._served.context}
        return {"id": self._served.name, **about}

    async def completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, wire.completion(await self._body(request), model=self._served.name))

    async def chat_completions(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await self._answer(request, wire.chat(body, model=self._served.name, context=self._served.context))

    async def _body(self, request: web.Request) -> Any:
        # A web page may send JSON to this address only if it says so, which its browser asks us about first.
        if request.content_type != "application/json":
            raise Refused(415, f"Content-Type: got {request.content_type}; allowed: application/json")
        try:
            async with asyncio.timeout(self._limits.read_s):
                return json.loads(await request.read(), parse_constant=_no_constant)
        except TimeoutError:
            raise Refused(408, f"the body took longer than {self._limits.read_s} s") from None
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from None

    async def _answer(self, request: web.Request, asked: Asked) -> web.StreamResponse:
        with self._admitted(asked.sequences):
            prompts = await asyncio.to_thread(self._tokens, asked)
            draws = Draws(self._served.sampler, self._chat, asked, prompts, model=self._served.name)
            if asked.stream:
                return await stream(request, draws, self._limits.write_s)
            return web.json_response(await draws.whole())

    @contextlib.contextmanager
    def _admitted(self, sequences: int) -> Iterator[None]:
        limit = self._limits.sequences
        if sequences > limit:
            raise Refused(400, f"n: {sequences} sequences in one request; this server draws {limit} at most", param="n")
        if self._under_way + sequences > limit:
            raise Refused(
                429, f"{self._under_way} sequences are under way; this server has room for {limit}",
                code="rate_limit_exceeded", retry_after_s=_RETRY_AFTER_S,
            )  # fmt: skip
        self._under_way += sequences
        try:
            yield
        finally:
            self._under_way -= sequences

    def _tokens(self, asked: Asked) -> list[list[int]]:
        """Ids of each prompt. Text never becomes a control token. Takes its time: not for the event loop."""
        prompts = []
        for prompt in asked.prompts:
            if isinstance(prompt, Conversation):
                try:
                    ids = self._served.template.tokens(prompt.messages, prompt.tools, begun=prompt.begun)
                except ConfigError as mistake:
                    raise Refused(400, str(mistake), param="messages") from mistake
                if prompt.forced is not None:
                    ids += opening(self._chat, prompt.forced)
            else:
                ids = self._chat.plain(prompt) if isinstance(prompt, str) else list(prompt)
            if not 0 < len(ids) < self._served.context:
                name = "messages" if isinstance(prompt, Conversation) else "prompt"
                raise Refused(
                    400, f"{name}: {len(ids)} tokens; allowed: 1 to {self._served.context - 1}, for the context of "
                    f"{self._served.context} holds the answer too", param=name, code="context_length_exceeded",
                )  # fmt: skip
            prompts.append(ids)
        return prompts


def _guard(api_key: str, *, loopback_names: bool) -> Any:
    """Lets in whoever has the key. Without one, whoever calls this machine by a name of its own: a web page that made
    its host name point here (DNS rebinding) does not."""

    @web.middleware
    async def guard(request: web.Request, handler: Callable[..., Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        if api_key and request.path != "/health":
            given = request.headers.get("Authorization", "").encode("utf-8", "replace")
            if not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
                raise Refused(401, "Authorization: need 'Bearer' and this server's key", code="invalid_api_key")
        name = _host(request)
        if loopback_names and name != "localhost" and not _is_loopback(name):
            raise Refused(403, f"Host: got {name!r}; allowed: localhost and loopback addresses")
        return await handler(request)

    return guard


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[..., Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    headers = {}
    try:
        return await handler(request)
    except Refused as error:
        refused = error
    except web.HTTPException as error:  # no such route, method, or a body that is too large
        refused = Refused(error.status, f"{request.method} {request.path}: {error.reason}")
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
    # The border: a defect must not look like a broken connection.
    except Exception:  # noqa: BLE001
        _LOG.exception("a request could not be answered")
        refused = Refused(500, "this server has a defect; its log says which")
    if refused.retry_after_s:
        headers["Retry-After"] = str(refused.retry_after_s)
    return web.json_response(refused.body(), status=refused.status, headers=headers)


def _host(request: web.Request) -> str:
    """The name by which this server was called; '' where it is none."""
    try:
        return request.url.host or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
