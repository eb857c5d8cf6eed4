"""What a run may spend outside: calls, bytes and money, refused before they are overspent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Protocol

from dr_jax.errors import ConfigError, RolloutHalted
from dr_jax.records import Failure, FailureKind
from dr_jax.web.page import Response

PAGE = "page"  # the service of fetching pages ourselves
# A language model that reads pages: its price of a call, and those of a million tokens it is given and writes.
READER, READER_INPUT, READER_OUTPUT = "reader", "reader_input", "reader_output"
_MICRO = 1_000_000  # money is counted in whole micro-dollars: sums of floats drift past a limit
_PER_TOKENS = 1_000_000


@dataclasses.dataclass(frozen=True)
class Price:
    """List price of one call (of a million tokens, for rows in tokens), in US dollars, without taxes and allowances."""

    usd: float
    source: str
    read: str  # when the source was read


PRICES: dict[str, Price] = {
    "serper": Price(0.001, "serper.dev, smallest package (50,000 for $50; the largest is $0.30 per 1,000)", "2026-08"),
    "brave": Price(0.005, "brave.com/search/api: $5 per 1,000", "2026-09"),
    "tavily": Price(0.008, "docs.tavily.com/documentation/api-credits, pay as you go; basic = 1 credit", "2026-11"),
    "exa": Price(0.007, "exa.ai/docs/admin/pricing: $7 per 1,000 with 10 results and highlights", "2026-11"),
    "searxng": Price(0.0, "an instance of one's own", "2026-11"),
    PAGE: Price(0.0, "our own fetcher; traffic is counted in bytes", "2026-11"),
    # Its tokens have no default: a price that nobody looked up is a budget that nobody keeps.
    READER: Price(0.0, "chat completions are charged by the token", "2026-11"),
}


@dataclasses.dataclass(frozen=True)
class Spent:
    """What was spent: calls by all services, bytes of answers (decoded), US dollars at list price."""

    calls: int = 0
    bytes: int = 0
    usd: float = 0.0


NOTHING_SPENT = Spent()


def estimate_usd(price_usd: float, *, questions: int, rollouts: int, calls: float, steps: int = 1) -> float:
    """What `steps` steps cost at most: every one of `questions` x `rollouts` episodes makes `calls` calls, each for
    `price_usd`, and none is answered by the cache. A search of three queries is three calls."""
    return price_usd * questions * rollouts * calls * steps


def reader_usd(price_usd: Callable[[str], float], tokens_in: int, tokens_out: int) -> float:
    """What one call of a reader costs by a table of prices."""
    per_token = tokens_in * price_usd(READER_INPUT) + tokens_out * price_usd(READER_OUTPUT)
    return price_usd(READER) + per_token / _PER_TOKENS


class Budget:
    """Counts what is spent in a run and in its current step, and refuses calls. For one event loop.

    A refused call is a `Failure` (QUOTA_EXHAUSTED), so the episode it meets is not trained on; `check` and `begin_step`
    raise `RolloutHalted` once anything was refused, so a run that is out of money ends.

    `prices`: US dollars per call (per million tokens for `READER_INPUT`, `READER_OUTPUT`), over those of `PRICES`.
    `spent`: by the run before it was resumed."""

    def __init__(
        self,
        *,
        max_usd: float = math.inf,
        max_calls: float = math.inf,
        max_bytes: float = math.inf,
        prices: Mapping[str, float] | None = None,
        spent: Spent = NOTHING_SPENT,
    ):
        for name, value in {"max_usd": max_usd, "max_calls": max_calls, "max_bytes": max_bytes}.items():
            if not value >= 0:
                raise ConfigError(f"budget.{name}: {value} is not a limit; give 0 or more, or inf for none")
        self._prices = {name: price.usd for name, price in PRICES.items()} | dict(prices or {})
        for name, usd in self._prices.items():
            if not 0 <= usd < math.inf:
                raise ConfigError(f"budget.prices: {name} costs {usd}; give US dollars, 0 or more")
        self._max_micro = max_usd * _MICRO
        self._max_calls, self._max_bytes = max_calls, max_bytes
        self._calls, self._bytes, self._micro = spent.calls, spent.bytes, round(spent.usd * _MICRO)
        self._step_start = self.run
        self._refused = ""

    def price_usd(self, service: str) -> float:
        """The price of one call; `ConfigError` where nobody gave one."""
        if service not in self._prices:
            unit = "million tokens" if service in (READER_INPUT, READER_OUTPUT) else "call"
            raise ConfigError(f"budget.prices: no price for {service!r}; give US dollars per {unit} (0 = free)")
        return self._prices[service]

    def take(self, service: str, reserve_bytes: int = 0, usd: float | None = None) -> Failure | None:
        """Counts one call to `service` and its price, or refuses it. Ask before calling.

        `reserve_bytes`: what the answer can weigh at most; they are counted, and `add_bytes` settles them. `usd`: what
        this call can cost at most, where that is not the price of every call; `give_back` settles it."""
        micro = round((self.price_usd(service) if usd is None else usd) * _MICRO)
        limits = (
            ("usd", (self._micro + micro) / _MICRO, self._max_micro / _MICRO),
            ("calls", self._calls + 1, self._max_calls),
            ("bytes", self._bytes + max(reserve_bytes, 1), self._max_bytes),
        )
        over = next((f"budget.max_{name} = {most:g}" for name, would, most in limits if would > most), None)
        if over:
            self._refused = over
            return Failure(FailureKind.QUOTA_EXHAUSTED, f"{over} is spent")
        self._calls, self._micro, self._bytes = self._calls + 1, self._micro + micro, self._bytes + reserve_bytes
        return None

    def give_back(self, service: str, usd: float | None = None) -> None:
        """The price, or `usd` of it, of a call that was taken and not charged; it stays counted as a call."""
        self._micro -= round((self.price_usd(service) if usd is None else usd) * _MICRO)

    def add_bytes(self, count: int) -> None:
        """Counts bytes of an answer; negative to settle a reservation."""
        self._bytes += count

    def begin_step(self) -> None:
        """Starts the figures of a step."""
        self.check()
        self._step_start = self.run

    def check(self) -> None:
        """Raises `RolloutHalted` once a call was refused: what came after it is not worth training on."""
        if self._refused:
            raise RolloutHalted(
                f"the run has spent {self.run.usd:.2f} USD in {self.run.calls} calls: {self._refused} is reached. "
                "Raise it and start the same command again: it resumes from the last checkpoint."
            )

    @property
    def run(self) -> Spent:
        """Spent so far, by the run before it was resumed included."""
        return Spent(self._calls, self._bytes, self._micro / _MICRO)

    @property
    def step(self) -> Spent:
        """Spent since `begin_step`."""
        run, start = self.run, self._step_start
        return Spent(run.calls - start.calls, run.bytes - start.bytes, round(run.usd - start.usd, 6))

    def metrics(self) -> dict[str, float]:
        """Live figures, by the names under which they are logged."""
        spent = (("run", self.run), ("step", self.step))
        return {f"budget/{scope}_{name}": float(value) for scope, one in spent for name, value in vars(one).items()}


class Fetches(Protocol):
    """What the meter stands in front of: `fetch.Fetcher`."""

    async def fetch(self, url: str) -> Response | Failure: ...


class MeteredFetcher:
    """A fetcher that asks the budget first. It stands behind the cache, so a page that is remembered is free.

    `max_bytes`: what one page can weigh (`fetch.Limits.max_bytes`), reserved until the page is here."""

    def __init__(self, fetcher: Fetches, budget: Budget, *, max_bytes: int):
        self._fetcher, self._budget, self._max_bytes = fetcher, budget, max_bytes

    async def fetch(self, url: str) -> Response | Failure:
        refused = self._budget.take(PAGE, self._max_bytes)
        if refused:
            return refused
        used = 0
        try:
            answer = await self._fetcher.fetch(url)
            used = 0 if isinstance(answer, Failure) else len(answer.body)
        finally:  # cancelled too
            self._budget.add_bytes(used - self._max_bytes)
        return answer
