from __future__ import annotations

import datetime
import email.utils

import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.http import Timeouts, retry, retry_after_s


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("5", 5),
        ("86400", 86400),
        (" 0 ", 0),
        ("9" * 400, 999999999),
        ("abc", None),
        ("-1", None),
        ("", None),
        ("٥", None),
    ],
)
def test_retry_after_in_seconds(value, seconds):
    assert retry_after_s({"Retry-After": value}) == seconds


def test_retry_after_as_a_date():
    now = datetime.datetime.now(datetime.UTC)
    soon = retry_after_s(
        {"Retry-After": email.utils.format_datetime(now + datetime.timedelta(seconds=90), usegmt=True)}
    )
    assert 85 < soon <= 90
    assert retry_after_s({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


async def attempts(answers, **options):
    asked = []

    async def attempt():
        asked.append(answers[len(asked)])
        return asked[-1]

    options = {"retryable": lambda f: f.kind is FailureKind.CONNECTION, "retries": 2, "backoff_s": 1e-4} | options
    return await retry(attempt, **options), len(asked)


REFUSED = Failure(FailureKind.CONNECTION)


async def test_retry_ends_with_the_first_answer():
    assert await attempts([REFUSED, "page", "never"]) == ("page", 2)


async def test_retry_gives_up_with_the_last_failure():
    last = Failure(FailureKind.CONNECTION, "last")
    assert await attempts([REFUSED, REFUSED, last, "never"]) == (last, 3)


async def test_what_is_not_retryable_is_asked_once():
    missing = Failure(FailureKind.STATUS, status=404)
    assert await attempts([missing, "never"]) == (missing, 1)


async def test_a_server_that_asks_for_more_patience_than_we_have_is_not_asked_again():
    busy = Failure(FailureKind.CONNECTION, retry_after_s=61)
    assert await attempts([busy, "never"]) == (busy, 1)


async def test_retry_after_is_waited_for(monkeypatch):
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr("asyncio.sleep", sleep)
    busy = Failure(FailureKind.CONNECTION, retry_after_s=7.0)
    assert await attempts([busy, REFUSED, "page"], backoff_s=2.0) == ("page", 3)
    assert waits[0] == 7.0
    assert 2.0 <= waits[1] <= 6.0  # 2 s doubled, with jitter of a half


def test_a_time_limit_that_is_not_positive_is_a_config_error():
    with pytest.raises(ConfigError, match="timeouts.connect_s: 0 is not"):
        Timeouts(connect_s=0)
