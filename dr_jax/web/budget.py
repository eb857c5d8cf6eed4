"""What a run may spend outside: calls, bytes and money, refused before they are overspent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Self

from dr_jax.errors import ConfigError, RolloutHalted
from dr_jax.records import Failure, FailureKind

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

    def of_host(self, index: int, count: int) -> Spent:
        """The share of one host."""
        micro = share(round(self.usd * _MICRO), index, count)
        return Spent(share(self.calls, index, count), share(self.bytes, index, count), micro / _MICRO)


NOTHING_SPENT = Spent()


def estimate_usd(price_usd: float, *, questions: int, rollouts: int, calls: float, steps: int = 1) -> float:
    """What `steps` steps cost at most: every one of `questions` x `rollouts` episodes makes `calls` calls, each for
    `price_usd`, and none is answered by the cache. A search of three queries is three calls."""
    return price_usd * questions * rollouts * calls * steps


def reader_usd(price_usd: Callable[[str], float], tokens_in: int, tokens_out: int) -> float:
    """What one call of a reader costs by a table of prices."""
    per_token = tokens_in * price_usd(READER_INPUT) + tokens_out * price_usd(READER_OUTPUT)
    return price_usd(READER) + per_token / _PER_TOKENS


def share(total: int, index: int, count: int) -> int:
    """What host `index` of `count` gets of `total`: the shares add up to it, and none shrinks when it grows."""
    if not 0 <= index < count:
        raise ConfigError(f"host {index} of {count}: give an index from 0 to {count - 1}")
    return total // count + (index < total % count)


@dataclasses.dataclass(frozen=True)
class Allowance:
    """The most that may be spent; US dollars at list price."""

    usd: float = math.inf
    calls: float = math.inf
    bytes: float = math.inf

    @classmethod
    def or_none(cls, *limits: float) -> Self:
        """`limits` of usd, calls and bytes as a config states them: 0 is no limit."""
        return cls(*(limit or math.inf for limit in limits))

    def of_host(self, index: int, count: int) -> Allowance:
        """The share of one host; that of no limit is none."""
        micro, calls, bytes = (
            limit if limit == math.inf else share(round(limit), index, count)
            for limit in (self.usd * _MICRO, self.calls, self.bytes)
        )
        return Allowance(micro / _MICRO, calls, bytes)


NO_LIMIT = Allowance()


class Budget:
    """Counts what is spent in a run and in its current step, and refuses calls. For one event loop.

    A refused call is a `Failure` (QUOTA_EXHAUSTED), so the episode it meets is not trained on; `check` and `begin_step`
    raise `RolloutHalted` once anything was refused, so a run that is out of money ends.

    `run`, `step`: what may be spent, in all and from one `begin_step` to the next. `prices`: US dollars per call (per
    million tokens for `READER_INPUT`, `READER_OUTPUT`), over those of `PRICES`. `spent`: by the run before it was
    resumed."""

    def __init__(
        self,
        run: Allowance = NO_LIMIT,
        step: Allowance = NO_LIMIT,
        *,
        prices: Mapping[str, float] | None = None,
        spent: Spent = NOTHING_SPENT,
    ):
        self._limits = {"max": run, "max_step": step}
        for scope, allowance in self._limits.items():
            for name, value in vars(allowance).items():
                if not value >= 0:
                    raise ConfigError(f"budget.{scope}_{name}: {value} is not a limit; give 0 or more, or inf for none")
        self._prices = {name: price.usd for name, price in PRICES.items()} | dict(prices or {})
        for name, usd in self._prices.items():
            if not 0 <= usd < math.inf:
                raise ConfigError(f"budget.prices: {name} costs {usd}; give US dollars, 0 or more")
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
        would = Spent(self._calls + 1, self._bytes + max(reserve_bytes, 1), (self._micro + micro) / _MICRO)
        if over := self._over(would):
            self._refused = over
            return Failure(FailureKind.QUOTA_EXHAUSTED, f"{over} is spent")
        self._calls, self._micro, self._bytes = self._calls + 1, self._micro + micro, self._bytes + reserve_bytes
        return None

    def _over(self, would: Spent) -> str:
        """The limit that `would` passes; "" where it passes none."""
        scopes = {"max": would, "max_step": _minus(would, self._step_start)}
        return next(
            (
                f"budget.{scope}_{name} = {most:g}"
                for scope, spent in scopes.items()
                for name, most in vars(self._limits[scope]).items()
                if getattr(spent, name) > most
            ),
            "",
        )

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
        return _minus(self.run, self._step_start)

    def metrics(self) -> dict[str, float]:
        """Live figures, by the names under which they are logged."""
        spent = (("run", self.run), ("step", self.step))
        return {f"budget/{scope}_{name}": float(value) for scope, one in spent for name, value in vars(one).items()}


def _minus(later: Spent, earlier: Spent) -> Spent:
    return Spent(later.calls - earlier.calls, later.bytes - earlier.bytes, round(later.usd - earlier.usd, 6))
