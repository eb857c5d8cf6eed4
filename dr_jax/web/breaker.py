"""A circuit breaker per key: what failed too often in a row is left alone for a while, then tried with one call."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Hashable

from dr_jax.errors import ConfigError
from dr_jax.records import Failure, FailureKind

_MAX_KEYS = 4096  # an agent visits sites without end; who failed longest ago is forgiven first


@dataclasses.dataclass
class _Circuit:
    failures: int = 0  # in a row
    next_probe_s: float = -math.inf


class Breaker:
    """Counts failures in a row per key (a provider, a host). `threshold` of them open its circuit: `admit` refuses for
    `cool_s` seconds, then lets one call through as a probe, and one more every `cool_s` until a call succeeds.

    A call that was admitted and never recorded (cancelled) changes nothing, so a lost probe delays the next by `cool_s`
    and no more. `clock`: monotonic seconds. At most 4096 keys that failed are remembered.

    *Source*: M. Nygard, *Release It!*, circuit breaker."""

    def __init__(self, threshold: int, cool_s: float, clock: Callable[[], float] = time.monotonic):
        if threshold < 1 or not cool_s > 0:
            raise ConfigError(
                f"breaker: threshold {threshold}, cool_s {cool_s}: give at least 1 and more than 0 seconds"
            )
        self._threshold, self._cool_s, self._clock = threshold, cool_s, clock
        self._circuits: collections.OrderedDict[Hashable, _Circuit] = collections.OrderedDict()

    def admit(self, key: Hashable) -> Failure | None:
        """None where a call to `key` may start; PROVIDER_DOWN, with the seconds to the next probe, where it may not."""
        circuit = self._circuits.get(key)
        if circuit is None or circuit.failures < self._threshold:
            return None
        wait_s = circuit.next_probe_s - self._clock()
        if wait_s > 0:
            detail = f"not asked: {circuit.failures} calls in a row failed"
            return Failure(FailureKind.PROVIDER_DOWN, detail, retry_after_s=wait_s)
        circuit.next_probe_s = self._clock() + self._cool_s  # this call is the probe
        return None

    def record(self, key: Hashable, failed: bool) -> None:
        """What became of a call that `admit` let through. One success closes the circuit, whenever it was asked."""
        if not failed:
            self._circuits.pop(key, None)
            return
        circuit = self._circuits.setdefault(key, _Circuit())
        self._circuits.move_to_end(key)
        circuit.failures += 1
        circuit.next_probe_s = self._clock() + self._cool_s
        if len(self._circuits) > _MAX_KEYS:
            self._circuits.popitem(last=False)
