"""A `Sampler` over a server that speaks OpenAI's API and gives token ids: ours, vLLM's, or SGLang's.

Tokens in, tokens out: prompts are sent as ids, and ids come back with the log-probability of each. What differs from
server to server is a row of `WIRES`; what a server's log-probabilities mean is found out when it is opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import aiohttp
import numpy as np
from yarl import URL

from dr_jax.endpoint.answers import version_of
from dr_jax.errors import ConfigError, DrJaxError
from dr_jax.records import Failure, FailureKind, Finish, Sampled, Sampling
from dr_jax.web.api import Reply, by_status, check_endpoint
from dr_jax.web.http import failure_of, read_body, retry

_MAX_ANSWER_BYTES = 64 * 2**20  # prompt log-probabilities take about 100 bytes a token
_RETRYABLE = frozenset({FailureKind.RATE_LIMITED, FailureKind.PROVIDER_DOWN, FailureKind.CONNECTION})
_FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH}


class Logps(enum.Enum):
    """Under which distribution a server gives the log-probability of the token that it drew."""

    OURS = "softmax(logits / temperature)"  # what `records.Sampled` promises
    RAW = "softmax(logits), whatever the temperature"  # vLLM, unless it is told otherwise
    CUT = "what top_k and top_p leave of softmax(logits / temperature)"  # vLLM's --logprobs-mode=processed_logprobs

    def fits(self, sampling: Sampling) -> bool:
        """True where it comes to the same as ours."""
        if self is Logps.RAW:
            return sampling.temperature in (0, 1)
        return self is Logps.OURS or (sampling.top_p == 1 and sampling.top_k == 0)


@dataclasses.dataclass(frozen=True)
class Wire:
    """How one kind of server is asked. Readers raise KeyError, TypeError, ValueError or IndexError for an answer of
    another form."""

    path: str
    draw: Callable[[str, Sequence[int], Sampling], dict[str, Any]]
    drawn: Callable[[Any], Sampled]
    score: Callable[[str, Sequence[int]], dict[str, Any]]
    scored: Callable[[Any], Sequence[Any]]  # of every token of the prompt


# vLLM: docs.vllm.ai, "OpenAI-Compatible Server", and vllm/entrypoints/openai/completion/protocol.py (`return_token_ids`
# since 0.10.2). Everything that a model's generation_config.json could set is said, for vLLM takes it from there
# otherwise. `logprobs=0` asks for the drawn token's own. Ours is the same.
def _completions_draw(model: str, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    return {
        "model": model, "prompt": list(prompt), "max_tokens": sampling.max_new_tokens, "logprobs": 0,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1, "min_p": 0.0,
        "repetition_penalty": 1.0, "seed": sampling.seed, "stop": list(sampling.stop_strings),
        "stop_token_ids": list(sampling.stop_ids), "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip


def _completions_drawn(body: Any) -> Sampled:
    (choice,) = body["choices"]
    return _sampled(
        choice["token_ids"],
        choice["logprobs"]["token_logprobs"],
        choice["finish_reason"],
        version_of(body.get("system_fingerprint")),
    )


def _completions_score(model: str, tokens: Sequence[int]) -> dict[str, Any]:
    return {"model": model, "prompt": list(tokens), "max_tokens": 1, "prompt_logprobs": 0}


def _completions_scored(body: Any) -> Sequence[Any]:
    (choice,) = body["choices"]
    # Each token's own comes first, should a server give more.
    return [entry and next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"]]


# SGLang: its OpenAI endpoint gives no ids, its own does. docs.sglang.io, "Sampling Parameters" and "SGLang Native
# APIs"; python/sglang/srt/managers/io_struct.py (`GenerateReqInput`). Seeds count where it was started with
# --enable-deterministic-inference.
def _sglang_draw(model: str, prompt: Sequence[int], sampling: Sampling) -> dict[str, Any]:
    how = {
        "max_new_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0, "sampling_seed": sampling.seed,
        "stop": list(sampling.stop_strings), "stop_token_ids": list(sampling.stop_ids), "ignore_eos": True,
        "no_stop_trim": True,
    }  # fmt: skip
    return {"input_ids": list(prompt), "sampling_params": how, "return_logprob": True}


def _sglang_drawn(body: Any) -> Sampled:
    about = body["meta_info"]
    logps, ids = zip(*((entry[0], entry[1]) for entry in about["output_token_logprobs"]), strict=True)
    return _sampled(ids, logps, about["finish_reason"]["type"], 0)


def _sglang_score(model: str, tokens: Sequence[int]) -> dict[str, Any]:
    how = {"max_new_tokens": 1, "temperature": 0.0}
    return {"input_ids": list(tokens), "sampling_params": how, "return_logprob": True, "logprob_start_len": 0}


def _sglang_scored(body: Any) -> Sequence[Any]:
    return [entry[0] for entry in body["meta_info"]["input_token_logprobs"]]


WIRES: Mapping[str, Wire] = {
    "completions": Wire(
        "v1/completions", _completions_draw, _completions_drawn, _completions_score, _completions_scored
    ),
    "sglang": Wire("generate", _sglang_draw, _sglang_drawn, _sglang_score, _sglang_scored),
}


class RemoteSampler:
    """A `Sampler`. `open_sampler` makes it; `logps` says what it found out about the server."""

    def __init__(self, session: aiohttp.ClientSession, root: URL, wire: Wire, model: str, *, timeout_s: float):
        self._session, self._root, self._wire, self.model = session, root, wire, model
        self._timeout_s = timeout_s
        self.logps = Logps.RAW  # what suits the fewest requests, until more is known
        self.scores = False

    async def generate(self, prompt: Sequence[int] | np.ndarray, sampling: Sampling) -> Sampled:
        """A continuation of `prompt`. Whatever goes wrong is `Finish.ERROR` with a detail, a server whose
        log-probabilities are not those of `sampling` included."""
        if not self.logps.fits(sampling):
            return _error(
                f"server: its log-probabilities are those of {self.logps.value}, which temperature="
                f"{sampling.temperature}, top_p={sampling.top_p}, top_k={sampling.top_k} does not draw from"
            )
        answer = await self._ask(self._wire.path, self._wire.draw(self.model, np.asarray(prompt).tolist(), sampling))
        if isinstance(answer, Failure):
            return _error(f"server: {answer.kind}: {answer.detail}")
        try:
            return self._wire.drawn(answer)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            return _error(f"server: its answer has no token ids with log-probabilities ({error!r})")

    async def score(self, prompt: Sequence[int] | np.ndarray, continuation: Sequence[int] | np.ndarray) -> np.ndarray:
        """As `interfaces.Sampler`. The two together must leave room for one token in the server's context.

        Raises `ConfigError` where the server does not give log-probabilities of prompts, `DrJaxError` where it fails.
        """
        if not self.scores:
            raise ConfigError("server: it does not give log-probabilities of prompts; ask vLLM, SGLang or dr_jax.serve")
        if len(prompt) == 0:
            raise ConfigError("prompt: empty; the first token of all has no log-probability")
        logps = await self._prompt_logps(np.concatenate([prompt, continuation]))
        if isinstance(logps, Failure):
            raise DrJaxError(f"server: {logps.kind}: {logps.detail}")
        return logps[len(prompt) - 1 :]

    async def _prompt_logps(self, tokens: np.ndarray) -> np.ndarray | Failure:
        """Of all tokens but the first."""
        answer = await self._ask(self._wire.path, self._wire.score(self.model, tokens.tolist()))
        if isinstance(answer, Failure):
            return answer
        try:
            logps = np.asarray(self._wire.scored(answer)[1:], np.float32)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            return Failure(FailureKind.PROTOCOL_ERROR, f"no log-probabilities of the prompt ({error!r})")
        if logps.shape != (len(tokens) - 1,):
            return Failure(FailureKind.PROTOCOL_ERROR, f"{len(logps)} log-probabilities for {len(tokens)} tokens")
        return logps

    async def look(self, *, score: bool) -> None:
        """Finds out what the server can do. Raises `ConfigError` where it cannot serve a `Sampler`."""
        probe = Sampling(max_new_tokens=8, temperature=0.0)
        drawn = await self.generate([1, 2, 3], probe)
        if drawn.finish is Finish.ERROR:
            raise ConfigError(f"{self._root}: {drawn.detail}. It must give token ids: vLLM 0.10.2 or later, SGLang")
        logps = await self._prompt_logps(np.concatenate([[1, 2, 3], drawn.tokens]))
        self.scores = not isinstance(logps, Failure)
        if score and isinstance(logps, Failure):
            raise ConfigError(f"{self._root}: cannot score: {logps.kind}: {logps.detail}")
        if self.scores:
            await self._look_at_logps(probe)

    async def _look_at_logps(self, probe: Sampling) -> None:
        """The likeliest token at temperature 2, cut to it alone: 0 after the cut, raw at temperature 1, or ours."""
        self.logps = Logps.OURS
        drawn = await self.generate([1, 2, 3], dataclasses.replace(probe, temperature=2.0, top_k=1))
        raw = await self._prompt_logps(np.concatenate([[1, 2, 3], drawn.tokens]))
        if drawn.finish is Finish.ERROR or isinstance(raw, Failure) or np.abs(drawn.logps - raw[2:]).max() < 1e-3:
            self.logps = Logps.RAW
        elif np.abs(drawn.logps).max() < 1e-6:
            self.logps = Logps.CUT

    async def first_model(self) -> str:
        """The name of the model that the server has. Raises `ConfigError` where it has none, or several."""
        answer = await self._ask("v1/models", None)
        if isinstance(answer, Failure):
            raise ConfigError(f"{self._root}: {answer.kind}: {answer.detail}")
        try:
            names = [model["id"] for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{self._root}: /v1/models does not answer in OpenAI's form ({error!r})") from error
        if len(names) != 1:
            raise ConfigError(f"{self._root}: it has the models {', '.join(names) or '(none)'}; name one")
        return names[0]

    async def _ask(self, path: str, body: dict[str, Any] | None) -> Any | Failure:
        return await retry(
            lambda: self._attempt(path, body),
            retryable=_retryable,
            retries=4,
            backoff_s=0.5,
        )

    async def _attempt(self, path: str, body: dict[str, Any] | None) -> Any | Failure:
        method = "GET" if body is None else "POST"
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                self._session.request(method, self._root / path, json=body, allow_redirects=False) as response,
            ):
                data = await read_body(response, _MAX_ANSWER_BYTES)
                if isinstance(data, Failure):
                    return data
                if response.status != 200:
                    return _refusal(Reply(response.status, response.headers, data))
                return json.loads(data)
        except (ValueError, RecursionError):
            return Failure(FailureKind.PROTOCOL_ERROR, "the answer is not JSON")
        except (aiohttp.ClientError, OSError) as error:  # a time-out is an OSError
            return failure_of(error)


@contextlib.asynccontextmanager
async def open_sampler(
    url: str,
    *,
    model: str = "",
    api_key: str = "",
    wire: str = "completions",
    score: bool = False,
    timeout_s: float = 600.0,
    max_connections: int = 1024,
) -> AsyncIterator[RemoteSampler]:
    """A sampler over the server at `url` (with or without /v1), which has been asked for a few tokens.

    `model` may be left out where it has one only. With `score`, a server that cannot score is refused now. `timeout_s`
    is one request's, waiting in the server's queue included. Raises `ConfigError` for a server that does not answer,
    does not give token ids, or would be sent the key in the clear.
    """
    if wire not in WIRES:
        raise ConfigError(f"wire: got {wire!r}; allowed: {', '.join(WIRES)}")
    root = _root(url, api_key)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_connections),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        headers={"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10.0),
    ) as session:
        sampler = RemoteSampler(session, root, WIRES[wire], model, timeout_s=timeout_s)
        sampler.model = model or await sampler.first_model()
        await sampler.look(score=score)
        yield sampler


def _root(url: str, api_key: str) -> URL:
    return check_endpoint(
        "server", url.rstrip("/").removesuffix("/v1"), "a server such as http://127.0.0.1:8000/v1", keyed=bool(api_key)
    )


def _sampled(ids: Sequence[int], logps: Sequence[float], reason: str, version: int) -> Sampled:
    tokens, nats = np.asarray(ids, np.int32), np.asarray(logps, np.float32)
    if tokens.shape != nats.shape or tokens.ndim != 1 or not np.isfinite(nats).all():
        raise ValueError(f"{tokens.shape} token ids with {nats.shape} log-probabilities, or not finite")
    return Sampled(tokens, nats, _FINISH[reason], version)


def _error(detail: str) -> Sampled:
    return Sampled(np.zeros(0, np.int32), np.zeros(0, np.float32), Finish.ERROR, 0, detail)


def _retryable(failure: Failure) -> bool:
    """True where nobody drew anything. After a time-out the server may still be at work on it; 500 says that it broke
    over this very request."""
    return failure.kind in _RETRYABLE and failure.status != 500


def _refusal(reply: Reply) -> Failure:
    """What the status means, with what the server says of it."""
    said = reply.json("error.message") or reply.json("error") or reply.json("message") or ""
    return dataclasses.replace(by_status(reply), detail=" ".join(f"HTTP {reply.status} {said}".split())[:300])
