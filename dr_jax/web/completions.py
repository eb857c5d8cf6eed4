"""A client of any OpenAI-compatible chat completions endpoint: one question, one text back. Errors are values."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.api import Api, Reply, by_status, check_endpoint, check_key, dig
from dr_jax.web.breaker import Breaker
from dr_jax.web.budget import READER, Budget, reader_usd

_FRAME_TOKENS = 64  # of the chat template, which we do not see


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Which model is asked, and how. `ConfigError` where that cannot be right.

    `parameters` are sent as they are, over temperature 0 and `max_tokens`; one that is None is left out, for models
    that do not take it."""

    base_url: str  # what OpenAI's own clients call so, such as 'https://api.openai.com/v1'
    model: str
    api_key: str | None = dataclasses.field(default=None, repr=False)  # None = it asks for none
    max_tokens: int = 512  # of one answer
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.headers()
        check_endpoint("reading.endpoint", self.base_url, "reader 'endpoint'", keyed=self.api_key is not None)
        if not self.model:
            raise ConfigError("reading.model: is empty; give the name by which the endpoint knows its model")
        if taken := sorted(set(self.parameters) & {"model", "messages", "stream", "n"}):
            raise ConfigError(f"reading.parameters: {', '.join(taken)} cannot be set here")
        if self.most_tokens < 1:
            raise ConfigError("reading.parameters: one of max_tokens, max_completion_tokens must limit an answer")

    def headers(self) -> dict[str, str]:
        if self.api_key is None:
            return {}
        complaint = "reading.key_variable: the endpoint needs a key that a header can hold; export it"
        return {"Authorization": f"Bearer {check_key(self.api_key, complaint)}"}

    def request(self) -> dict[str, Any]:
        """What is sent beside the messages."""
        request = {"model": self.model, "temperature": 0.0, "max_tokens": self.max_tokens, **self.parameters}
        return {name: value for name, value in request.items() if value is not None}

    @property
    def most_tokens(self) -> int:
        """What an answer can have at most; 0 = nothing limits it."""
        limits = [self.request().get(name) for name in ("max_tokens", "max_completion_tokens")]
        return max((limit for limit in limits if type(limit) is int), default=0)


class ChatClient:
    """Asks one endpoint. Never raises for what it is asked or answered; cancellation passes.

    `session` comes from `http.open_session` and serves this endpoint alone (`api.Api`). `budget` is asked before each
    attempt for the most that it can cost, and settled by the tokens that the answer says it took."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        endpoint: Endpoint,
        *,
        timeout_s: float = 60.0,
        max_concurrent: int = 32,
        retries: int = 2,
        backoff_s: float = 0.5,
        breaker: Breaker | None = None,
        budget: Budget | None = None,
    ):
        base = URL(endpoint.base_url)
        url = (base / "chat" / "completions").with_query(base.query)  # some want their version there
        self._api = Api(
            session, READER, url, headers=endpoint.headers(), timeout_s=timeout_s, max_concurrent=max_concurrent,
            retries=retries, backoff_s=backoff_s, breaker=breaker,
        )  # fmt: skip
        self._request, self._max_tokens, self._budget = endpoint.request(), endpoint.most_tokens, budget
        if budget:
            self._usd(0, 0)  # ConfigError now, not in the middle of a run

    @property
    def identity(self) -> dict[str, str]:
        """What, besides the messages, decides the answer: part of a cache key."""
        return {"endpoint": str(self._api.url), "request": json.dumps(self._request, sort_keys=True)}

    async def complete(self, system: str, user: str) -> str | Failure:
        """What the model writes. A cut answer is one too; an empty one is PROVIDER_DOWN, a filtered one BAD_REQUEST."""
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        # A token of a byte-level vocabulary, which all of them are, holds at least one byte.
        tokens_in = len(f"{system}{user}".encode("utf-8", "replace")) + _FRAME_TOKENS
        return await self._api.ask(lambda: self._attempt({**self._request, "messages": messages}, tokens_in))

    async def _attempt(self, request: dict[str, Any], tokens_in: int) -> str | Failure:
        """One request, paid for before it is made; an endpoint that answers with an error status charges nothing."""
        reserved = self._usd(tokens_in, self._max_tokens)
        refused = self._budget.take(READER, usd=reserved) if self._budget else None
        if refused:
            return refused
        reply = await self._api.send("POST", request)
        if isinstance(reply, Failure):
            return reply  # nobody knows whether it is charged, so it stays counted
        if self._budget:
            self._budget.add_bytes(len(reply.body))
            self._budget.give_back(READER, reserved - self._charged(reply, reserved))
        return _text(reply) if reply.status == 200 else _refused(reply)

    def _charged(self, reply: Reply, reserved: float) -> float:
        if reply.status != 200:
            return 0.0
        tokens_in, tokens_out = reply.json("usage.prompt_tokens"), reply.json("usage.completion_tokens")
        if all(type(count) is int and 0 <= count < 1 << 32 for count in (tokens_in, tokens_out)):
            return self._usd(tokens_in, tokens_out)
        return reserved  # it does not say: the most it can have been

    def _usd(self, tokens_in: int, tokens_out: int) -> float:
        return reader_usd(self._budget.price_usd, tokens_in, tokens_out) if self._budget else 0.0


def _text(reply: Reply) -> str | Failure:
    choices = reply.json("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(dig(choice, "message"), dict):
        return Failure(FailureKind.PROVIDER_DOWN, "the answer has no message in `choices`")
    if dig(choice, "finish_reason") == "content_filter":
        return Failure(FailureKind.BAD_REQUEST, "the endpoint withheld its answer")
    content = dig(choice, "message.content")
    if not isinstance(content, str) or not content.strip():
        # Not an answer: an overloaded server, or a model that spent all its tokens on thinking.
        return Failure(FailureKind.PROVIDER_DOWN, "the answer is empty; see reading.max_tokens where the model thinks")
    return content


def _refused(reply: Reply) -> Failure:
    """What an error status means. Only where the text itself is refused is the page at fault; a request that the
    endpoint does not take for another reason would be refused for every page: a mistake of ours, never the policy's."""
    code = reply.json("error.code") or reply.json("error.type")
    if code == "insufficient_quota":
        return reply.failure(FailureKind.QUOTA_EXHAUSTED, "no credits left")
    failure = by_status(reply)
    if failure.kind is not FailureKind.BAD_REQUEST or code in ("content_filter", "context_length_exceeded"):
        return failure
    if reply.status == 404:
        return reply.failure(
            FailureKind.AUTH, "HTTP 404: no such model or path; see reading.endpoint and reading.model"
        )
    return reply.failure(FailureKind.PROVIDER_DOWN, f"HTTP {reply.status}: the endpoint does not take the request")
