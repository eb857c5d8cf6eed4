from __future__ import annotations

import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import FailureKind
from dr_jax.web import breaker as breaker_module
from dr_jax.web.breaker import Breaker


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def fail(breaker, key="a.test", times=1):
    for _ in range(times):
        breaker.record(key, failed=True)


def test_it_opens_after_threshold_failures_in_a_row(clock):
    breaker = Breaker(3, 10.0, clock)
    fail(breaker, times=2)
    assert breaker.admit("a.test") is None
    fail(breaker)
    refused = breaker.admit("a.test")
    assert (refused.kind, refused.retry_after_s, refused.infrastructure) == (FailureKind.PROVIDER_DOWN, 10.0, True)
    assert "3 calls in a row failed" in refused.detail


def test_a_success_in_between_starts_the_count_anew(clock):
    breaker = Breaker(2, 10.0, clock)
    for _ in range(5):
        fail(breaker)
        breaker.record("a.test", failed=False)
    assert breaker.admit("a.test") is None


def test_keys_do_not_touch_each_other(clock):
    breaker = Breaker(1, 10.0, clock)
    fail(breaker, "a.test")
    assert breaker.admit("a.test") is not None
    assert breaker.admit("b.test") is None


def test_one_probe_after_the_rest_and_success_closes(clock):
    breaker = Breaker(1, 10.0, clock)
    fail(breaker)
    clock.now_s += 9.0
    assert breaker.admit("a.test").retry_after_s == 1.0
    clock.now_s += 1.0
    assert [breaker.admit("a.test") is None for _ in range(3)] == [True, False, False]
    breaker.record("a.test", failed=False)
    assert [breaker.admit("a.test") is None for _ in range(3)] == [True, True, True]
    fail(breaker)
    assert breaker.admit("a.test") is not None


def test_a_failed_probe_opens_again_at_once(clock):
    breaker = Breaker(3, 10.0, clock)
    fail(breaker, times=3)
    clock.now_s += 10.0
    assert breaker.admit("a.test") is None
    clock.now_s += 4.0
    fail(breaker)
    assert breaker.admit("a.test").retry_after_s == 10.0


def test_a_probe_that_never_ends_does_not_close_the_door_for_ever(clock):
    breaker = Breaker(1, 10.0, clock)
    fail(breaker)
    clock.now_s += 10.0
    assert breaker.admit("a.test") is None  # cancelled: never recorded
    assert breaker.admit("a.test") is not None
    clock.now_s += 10.0
    assert breaker.admit("a.test") is None


def test_memory_is_bounded_and_the_oldest_failure_is_forgiven(clock, monkeypatch):
    monkeypatch.setattr(breaker_module, "_MAX_KEYS", 3)
    breaker = Breaker(1, 10.0, clock)
    for key in "abca":
        fail(breaker, key)
    fail(breaker, "d")
    assert [breaker.admit(key) is None for key in "abcd"] == [False, True, False, False]
    for key in range(100):
        breaker.record(key, failed=False)
        fail(breaker, key)
    assert len(breaker._circuits) == 3


@pytest.mark.parametrize(("threshold", "cool_s"), [(0, 1.0), (-1, 1.0), (1, 0.0), (1, float("nan"))])
def test_settings_that_make_no_sense(threshold, cool_s):
    with pytest.raises(ConfigError, match=f"breaker: threshold {threshold}, cool_s {cool_s}: give"):
        Breaker(threshold, cool_s)
