"""The nouns of the library: frozen data that both columns share. Standard library and numpy only.

Token arrays are `int32`, log-probabilities `float32` in nats. An `Episode` is a graph of `Call`s; a linear rollout is
a chain in which each call's prompt starts with exactly the tokens (prompt + output) of the call before it.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


class Origin(enum.IntEnum):
    """Who wrote a token. Only POLICY tokens are ever trained."""

    TEMPLATE = 0  # chat markup, forced prefixes, system prompt, the question
    WORLD = 1  # text of an observation
    POLICY = 2  # drawn by the sampler


class Role(enum.StrEnum):
    """In whose name a call was made."""

    POLICY = "policy"
    READER = "reader"
    PLANNER = "planner"
    JUDGE = "judge"


class Finish(enum.StrEnum):
    """Why one generation ended."""

    STOP = "stop"  # a stop id (kept, with its log-probability) or a stop string
    LENGTH = "length"  # max_new_tokens, or the engine's context, was reached
    ERROR = "error"  # the engine could not serve this request (see `Sampled.detail`)


class StopReason(enum.StrEnum):
    """Why an episode ended. Counted per step; every episode has exactly one."""

    ANSWERED = "answered"  # the policy closed an <answer>
    MALFORMED = "malformed"  # neither a valid tool call nor an answer
    TURN_LIMIT = "turn_limit"  # the last turn was not an answer
    CONTEXT_LIMIT = "context_limit"  # the next prompt would not fit the context
    LENGTH = "length"  # a turn was cut at its token limit
    DEADLINE = "deadline"  # wall-clock limit of an episode; carries no loss weight
    INFRASTRUCTURE = "infrastructure"  # engine, provider or our own host failed; carries no loss weight
    STALE = "stale"  # drawn with older weights than `rollout.max_policy_lag` allows; carries no loss weight


class FailureKind(enum.StrEnum):
    """What went wrong outside, in words the policy can read."""

    # The provider or the network did not do its job: infrastructure.
    RATE_LIMITED = "rate_limited"
    QUOTA_EXHAUSTED = "quota_exhausted"
    AUTH = "auth"
    PROVIDER_DOWN = "provider_down"
    DNS = "dns"
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    NOT_RECORDED = "not_recorded"  # replay mode was asked for something the tape does not hold
    OVERLOADED = "overloaded"  # our own machines had no process, memory or file left for it, or failed
    # The request or the page is at fault: the world's honest answer.
    BAD_REQUEST = "bad_request"
    BAD_URL = "bad_url"
    BLOCKED = "blocked"
    BLOCKLISTED = "blocklisted"  # a domain that this run does without
    ROBOTS = "robots"  # the site's robots.txt says no
    NO_SUCH_HOST = "no_such_host"  # the resolver answered: there is no such name (one that failed is `DNS`)
    NOT_IN_RESULTS = "not_in_results"
    TLS = "tls"
    REDIRECTS = "redirects"
    STATUS = "status"
    TOO_LARGE = "too_large"
    UNSUPPORTED_TYPE = "unsupported_type"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    PROTOCOL_ERROR = "protocol_error"
    TRUNCATED = "truncated"
    PARSE_LIMIT = "parse_limit"
    EMPTY = "empty"


_INFRASTRUCTURE = frozenset({
    FailureKind.RATE_LIMITED, FailureKind.QUOTA_EXHAUSTED, FailureKind.AUTH, FailureKind.PROVIDER_DOWN,
    FailureKind.DNS, FailureKind.CONNECTION, FailureKind.TIMEOUT, FailureKind.NOT_RECORDED,
    FailureKind.OVERLOADED,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Failure:
    """A failure of the outside world, as a value. `search()` and `fetch()` return it instead of raising."""

    kind: FailureKind
    detail: str = ""  # one line for logs; never holds a key or a page's text
    status: int | None = None  # HTTP status where there was one
    retry_after_s: float | None = None

    @property
    def infrastructure(self) -> bool:
        """True where nobody answered: such an episode carries no loss weight. A 404 is an answer; a time-out is not."""
        provider_error = self.kind is FailureKind.STATUS and self.status is not None and self.status >= 500
        return self.kind in _INFRASTRUCTURE or provider_error


@dataclasses.dataclass(frozen=True)
class Question:
    """One thing to find out. `answers` are alternatives: any of them is right."""

    id: str
    text: str
    answers: tuple[str, ...]
    source: str = ""  # data set, or "world"
    hops: int = 0  # 0 = unknown
    evidence: tuple[str, ...] = ()  # URLs, in the order in which they must be read; for analysis only


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one generation is drawn. The draw of token i depends on (seed, i) alone, never on the batch."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0
    priority: int = 0  # of those that wait for the sampler, the lowest is served first; of equals, who came first


@dataclasses.dataclass(frozen=True)
class Sampled:
    """What the sampler drew. `logps[i]` is the log-probability of `tokens[i]` under softmax(logits / temperature),
    before top-k and top-p (temperature 0 counts as 1). A stop id is kept as the last token."""

    tokens: np.ndarray  # int32 [n]
    logps: np.ndarray  # float32 [n], nats
    finish: Finish
    version: int  # of the weights that drew the tokens
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Call:
    """One generation: the prompt as the sampler saw it, and what it drew."""

    id: int
    parent: int | None
    role: Role
    prompt: np.ndarray  # int32 [p]
    origin: np.ndarray  # uint8 [p], `Origin` of each prompt token
    output: np.ndarray  # int32 [n]; every one of them has Origin.POLICY
    logps: np.ndarray  # float32 [n]
    finish: Finish
    version: int
    started_s: float  # monotonic seconds
    ended_s: float


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """One tool call as it was carried out; for metrics and for the viewer, never for training."""

    tool: str
    arguments: Mapping[str, Any]
    failures: tuple[Failure, ...]
    seconds: float
    observation: str


@dataclasses.dataclass(frozen=True)
class Episode:
    """One rollout's record: question + calls + stop reason, then the answer and the reward."""

    question: Question
    rollout: int  # index inside the group
    calls: tuple[Call, ...]
    tool_uses: tuple[ToolUse, ...]
    stop: StopReason
    answer: str | None = None  # read from policy tokens only
    response: str = ""  # decoded policy tokens of all turns, for the format check and the viewer
    reward: float = math.nan
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # f1, em, ...
    detail: str = ""

    @property
    def infra_failures(self) -> int:
        """Outside failures that were nobody's decision."""
        failures = sum(f.infrastructure for use in self.tool_uses for f in use.failures)
        return failures + (self.stop in (StopReason.INFRASTRUCTURE, StopReason.DEADLINE))

    @property
    def trainable(self) -> bool:
        """False for an episode that an outage touched, or whose weights are too old: it takes no part in its group and
        carries no loss weight."""
        return self.infra_failures == 0 and self.stop is not StopReason.STALE and bool(self.calls)


@dataclasses.dataclass(frozen=True)
class Hit:
    """One search result."""

    title: str
    url: str
    snippet: str


@dataclasses.dataclass(frozen=True)
class Page:
    """A page as text: `segments` cut at the document's own structure, in reading order; `url` after redirects."""

    url: str
    title: str
    segments: tuple[str, ...]
    links: tuple[tuple[str, str], ...] = ()  # (text, absolute URL)
    headings: tuple[str, ...] = ()  # of each segment, those over it: "Ada > Films > Early"; empty where unknown
