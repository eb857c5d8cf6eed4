"""What clients of paid APIs share; their own tests show the rest on the wire."""

from __future__ import annotations

import pytest

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind
from dr_jax.web.api import Reply, by_status, check_endpoint, check_key, dig, retryable


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, FailureKind.AUTH), (403, FailureKind.AUTH), (402, FailureKind.QUOTA_EXHAUSTED),
        (429, FailureKind.RATE_LIMITED), (400, FailureKind.BAD_REQUEST), (404, FailureKind.BAD_REQUEST),
        (301, FailureKind.PROVIDER_DOWN), (500, FailureKind.PROVIDER_DOWN), (204, FailureKind.PROVIDER_DOWN),
    ],
)  # fmt: skip
def test_what_a_status_means(status, kind):
    failure = by_status(Reply(status, {"Retry-After": "7"}, b""))
    assert (failure.kind, failure.status) == (kind, status)
    waits = kind in (FailureKind.RATE_LIMITED, FailureKind.PROVIDER_DOWN)
    assert failure.retry_after_s == (7.0 if waits else None)


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (Failure(FailureKind.TIMEOUT), True),
        (Failure(FailureKind.RATE_LIMITED, status=429), True),
        (Failure(FailureKind.PROVIDER_DOWN, status=502), True),
        (Failure(FailureKind.PROVIDER_DOWN, status=408), True),
        (Failure(FailureKind.PROVIDER_DOWN, status=400), False),
        (Failure(FailureKind.QUOTA_EXHAUSTED, status=429), False),
        (Failure(FailureKind.AUTH, status=401), False),
        (Failure(FailureKind.BAD_REQUEST, status=400), False),
    ],
)
def test_only_what_can_pass_is_tried_again(failure, again):
    assert retryable(failure) is again


@pytest.mark.parametrize(
    "body", [b"", b"null", b"[1]", b"{}", b'{"a": [1]}', b'{"a": {"c": 1}}', b"\xff", b"[" * 99_999]
)
def test_what_is_not_there_is_none(body):
    assert Reply(200, {}, body).json("a.b") is None


def test_what_is_there_is_found():
    assert dig({"a": {"b": [1]}}, "a.b") == [1]


@pytest.mark.parametrize("key", ["", "two\r\nlines", "schlüssel", "tab\t"])
def test_a_key_that_no_header_can_hold_is_not_shown(key):
    with pytest.raises(ConfigError, match="^set it$"):
        check_key(key, "set it")


@pytest.mark.parametrize("endpoint", ["", "http://", "ftp://a.test/", "https://[", "https://me@a.example/"])
def test_an_endpoint_that_is_none_is_named_with_its_field(endpoint):
    with pytest.raises(ConfigError, match="^here: it needs an"):
        check_endpoint("here", endpoint, "it", keyed=False)
