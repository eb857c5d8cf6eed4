from __future__ import annotations

import math
import re

import pytest

from dr_jax.errors import ConfigError, RolloutHalted
from dr_jax.records import FailureKind
from dr_jax.web.budget import (
    PAGE,
    PRICES,
    READER,
    READER_INPUT,
    READER_OUTPUT,
    Allowance,
    Budget,
    Spent,
    estimate_usd,
    reader_usd,
    share,
)
from dr_jax.web.search_wire import PROVIDERS


def test_every_provider_has_a_price_with_source_and_date():
    assert set(PRICES) == {*PROVIDERS, PAGE, READER}
    for price in PRICES.values():
        assert price.source
        assert re.fullmatch(r"20\d\d-\d\d", price.read)


def test_a_run_is_priced_before_it_starts():
    price_usd = Budget().price_usd("serper")
    assert estimate_usd(price_usd, questions=256, rollouts=16, calls=3, steps=50) == pytest.approx(614.4)
    assert estimate_usd(0.0, questions=256, rollouts=16, calls=3) == 0.0


def test_a_reader_is_priced_by_the_million_tokens_and_by_the_call():
    budget = Budget(prices={READER: 0.01, READER_INPUT: 0.4, READER_OUTPUT: 1.2})
    assert reader_usd(budget.price_usd, 5000, 500) == pytest.approx(0.01 + 0.002 + 0.0006)
    with pytest.raises(ConfigError, match="no price for 'reader_output'; give US dollars per million tokens"):
        Budget(prices={READER_INPUT: 0.4}).price_usd(READER_OUTPUT)


def test_what_a_call_can_cost_is_held_until_it_is_settled():
    budget = Budget(Allowance(usd=0.01))
    assert budget.take(READER, usd=0.008) is None
    assert budget.take(READER, usd=0.008).kind is FailureKind.QUOTA_EXHAUSTED
    budget.give_back(READER, usd=0.006)
    assert budget.take(READER, usd=0.008) is None
    assert budget.run == Spent(2, 0, 0.01)


def test_spending_to_the_last_cent_and_not_one_call_more():
    budget = Budget(Allowance(usd=0.7), prices={"serper": 0.007})  # 0.007 * 100 is not 0.7 in floats
    assert [budget.take("serper") for _ in range(100)] == [None] * 100
    refused = budget.take("serper")
    assert (refused.kind, refused.infrastructure) == (FailureKind.QUOTA_EXHAUSTED, True)
    assert "budget.max_usd = 0.7" in refused.detail
    assert budget.run == Spent(100, 0, 0.7)


def test_a_refused_call_counts_for_nothing_and_a_cheaper_one_may_go():
    budget = Budget(Allowance(usd=0.01))
    assert budget.take("tavily") is None
    assert budget.take("tavily") is not None
    assert budget.take("serper") is None
    assert budget.run == Spent(2, 0, 0.009)


@pytest.mark.parametrize(("limits", "name"), [({"calls": 2}, "max_calls"), ({"bytes": 20}, "max_bytes")])
def test_calls_and_bytes_have_limits_too(limits, name):
    budget = Budget(Allowance(**limits))
    for _ in range(2):
        assert budget.take("searxng") is None
        budget.add_bytes(10)
    assert name in budget.take("searxng").detail


def test_what_was_not_charged_is_given_back():
    budget = Budget(Allowance(usd=0.001))
    for _ in range(3):
        assert budget.take("serper") is None
        budget.give_back("serper")
    assert budget.run == Spent(3, 0, 0.0)


def test_a_step_is_counted_apart_and_the_run_goes_on():
    budget = Budget(spent=Spent(10, 1000, 0.05))
    budget.begin_step()
    budget.take("serper")
    budget.add_bytes(7)
    assert (budget.run, budget.step) == (Spent(11, 1007, 0.051), Spent(1, 7, 0.001))
    budget.begin_step()
    assert budget.step == Spent()
    assert budget.metrics() == {
        "budget/run_calls": 11.0, "budget/run_bytes": 1007.0, "budget/run_usd": 0.051,
        "budget/step_calls": 0.0, "budget/step_bytes": 0.0, "budget/step_usd": 0.0,
    }  # fmt: skip


def test_what_was_spent_before_a_resume_counts():
    assert Budget(Allowance(usd=1.0), spent=Spent(1000, 0, 1.0)).take("serper") is not None


def test_a_run_that_was_refused_a_call_ends_at_its_next_step():
    budget = Budget(Allowance(calls=1))
    budget.take("serper")
    budget.begin_step()  # spent to the limit, but nothing was refused yet
    budget.take("serper")
    with pytest.raises(RolloutHalted, match=r"0.00 USD in 1 calls: budget.max_calls = 1 is reached. Raise it"):
        budget.begin_step()


@pytest.mark.parametrize("name", ["usd", "calls", "bytes"])
@pytest.mark.parametrize("value", [-1, math.nan])
def test_a_limit_that_is_none(name, value):
    with pytest.raises(ConfigError, match=f"budget.max_{name}: {value} is not a limit"):
        Budget(Allowance(**{name: value}))
    with pytest.raises(ConfigError, match=f"budget.max_step_{name}: {value} is not a limit"):
        Budget(step=Allowance(**{name: value}))


def test_a_step_has_limits_of_its_own():
    budget = Budget(step=Allowance(calls=2, usd=0.01), spent=Spent(500, 0, 4.0))
    budget.begin_step()
    assert [budget.take("serper") for _ in range(2)] == [None] * 2
    budget.begin_step()  # nothing was refused: a new step, a new allowance
    assert budget.take("tavily") is None
    assert "budget.max_step_usd = 0.01 is spent" in budget.take("exa").detail
    assert budget.take("searxng") is None
    assert "budget.max_step_calls = 2" in budget.take("searxng").detail
    with pytest.raises(RolloutHalted, match="budget.max_step_calls = 2 is reached"):
        budget.begin_step()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 16, 64])
def test_the_shares_of_hosts_add_up(count):
    for total in (0, 1, 5, 63, 64, 65, 1_000_003):
        shares = [share(total, index, count) for index in range(count)]
        assert sum(shares) == total
        assert max(shares) - min(shares) <= 1
        assert all(share(total + 1, index, count) >= shares[index] for index in range(count))
    allowances = [Allowance(usd=10.000001, calls=100).of_host(index, count) for index in range(count)]
    assert sum(round(one.usd * 1e6) for one in allowances) == 10_000_001
    assert sum(one.calls for one in allowances) == 100
    assert {one.bytes for one in allowances} == {math.inf}
    parts = [Spent(7, 1001, 0.5).of_host(index, count) for index in range(count)]
    assert (sum(one.calls for one in parts), sum(one.bytes for one in parts)) == (7, 1001)
    assert sum(round(one.usd * 1e6) for one in parts) == 500_000


@pytest.mark.parametrize(("index", "count"), [(-1, 2), (2, 2), (0, 0)])
def test_a_host_that_is_none(index, count):
    with pytest.raises(ConfigError, match=f"host {index} of {count}"):
        share(10, index, count)


def test_hosts_together_spend_to_the_last_call_and_not_one_more():
    hosts = [Budget(Allowance(calls=10).of_host(index, 4), spent=Spent(3).of_host(index, 4)) for index in range(4)]
    assert sum(budget.take("serper") is None for budget in hosts for _ in range(10)) == 7


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_price_that_is_none(value):
    with pytest.raises(ConfigError, match=f"budget.prices: serper costs {value}"):
        Budget(prices={"serper": value})


def test_a_service_without_price():
    with pytest.raises(ConfigError, match="budget.prices: no price for 'altavista'"):
        Budget().take("altavista")
