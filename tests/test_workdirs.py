"""A workdir remembers what its run has spent; who may have it is tested through `train`."""

from __future__ import annotations

from dr_jax import metrics, workdirs
from dr_jax.web.budget import NOTHING_SPENT, Spent


def test_what_a_run_has_spent_is_what_its_log_says(tmp_path):
    assert workdirs.spent(tmp_path) == NOTHING_SPENT
    log = metrics.MetricsLog(tmp_path, last_step=-1)
    log.write(0, {"budget/run_calls": 3, "budget/run_bytes": 500, "budget/run_usd": 0.25})
    log.write(1, {"budget/run_calls": 4, "budget/run_bytes": 700, "budget/run_usd": 0.5})
    log.write(2, {"loss": 1.0})
    log.close()
    assert workdirs.spent(tmp_path) == Spent(4, 700, 0.5)
