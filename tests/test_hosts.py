"""Several hosts are one run: the same losses and weights as one process with all devices, and they fall together."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import runpy
import signal
import sys
import time

import numpy as np
import pytest

from dr_jax import hosts, metrics, run_config, train
from dr_jax.errors import ConfigError
from dr_jax.model import hf
from dr_jax.model.config import ModelConfig
from dr_jax.update import Update
from tests.hosts_world import two_hosts, wait
from tests.test_update import group

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"
SETTINGS = [
    f"--config={QUICKSTART}",
    "--config.steps=2",
    "--config.rollout.questions=4",
    "--config.rollout.rollouts=4",
    "--config.eval.questions=5",  # one host has one more than the other
    "--config.eval.every_steps=0",
    "--config.engine.slots=16",
    "--config.batch.rows=16",
    "--config.batch.micro_rows=8",
    "--config.checkpoint.every_steps=1",
    "--config.mesh.data=2",
    "--config.mesh.fsdp=4",
]
TRAIN = ["-m", "dr_jax.train", *SETTINGS, "--coordinator=127.0.0.1:{port}", "--processes=2", "--process={host}"]
LIMIT_S = 60  # from a host's failure to the end of the other
START_S = 300  # what a busy machine may take to get there


def learner_steps(process: int | None = None, coordinator: str = "") -> dict:
    """What two train steps, a third in parts and a hand-over give on eight devices, in one process or as one of two."""
    import jax

    from dr_jax.assemble import Device
    from dr_jax.batch import PackedBatch
    from dr_jax.learner import handover
    from dr_jax.learner.grpo import GrpoConfig
    from dr_jax.learner.optim import OptimConfig
    from dr_jax.learner.state import init_state
    from dr_jax.learner.step import make_train_step, put_batch
    from dr_jax.model import letters, weights

    if coordinator:
        jax.distributed.initialize(coordinator, 2, process)
    config = ModelConfig(
        vocab_size=200, num_layers=2, d_model=16, d_ff=32, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e4,
        rope_scaling=None, rms_eps=1e-6, tie_embeddings=True, max_positions=64,
    )  # fmt: skip
    rng = np.random.default_rng(1)
    whole = weights.tree(config, lambda row: 0.2 * rng.normal(size=weights.shape(row, config)).astype(np.float32))
    # Devices in an order in which neighbours are of different hosts, as a torus may have it: rows and weights cross.
    devices = np.array(jax.devices()).reshape(2, 4).T.reshape(4, 2)
    mesh = jax.sharding.Mesh(devices[None], ("data", "fsdp", "tensor"))
    rules, optim = letters.DEFAULT_RULES, OptimConfig(learning_rate=1e-3)
    shardings = weights.shardings(config, mesh, rules)
    params = jax.tree.map(lambda x, to: jax.make_array_from_callback(x.shape, to, lambda at: x[at]), whole, shardings)
    state = init_state(params, config, optim, mesh, rules)
    grpo = GrpoConfig(kl_coef=0.0)
    step = make_train_step(config, grpo, mesh, rules, optim=optim, micro_rows=4, chunk=8)
    batch = PackedBatch.empty(8, 32)
    for row in range(7):  # the second host is short of a row
        n = 6 + 3 * row
        batch.token_bt[row, :n] = rng.integers(0, 96, n)
        batch.segment_bt[row, :n], batch.position_bt[row, :n] = 1, np.arange(n)
        batch.weight_bt[row, 2:n], batch.logp_bt[row, 2:n] = 1.0, -3.0
        batch.advantage_bt[row, :n] = rng.normal()
    mine = PackedBatch(*(hosts.share(x_bt) for x_bt in batch))
    said = []
    for _ in range(2):
        state, values = step(state, None, put_batch(mine, mesh, rules))
        said.append({name: float(value) for name, value in jax.device_get(values).items()})
    engines = handover.engines(2)
    to_engine = handover.across_hosts(config, engines, "float32")
    device = Device(config, mesh, rules, params, handover.here(engines), to_engine, grpo, optim)
    state, values, waiting = step_in_parts(device, state)
    said.append(values)
    here = to_engine(state.params)
    assert all(leaf.is_fully_addressable and len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(here))
    return {
        "metrics": said,
        "waiting": waiting,
        "params": jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), here),
        "gathered": hosts.gather({"host": jax.process_index(), "text": "x" * 100 * jax.process_index()}),
        "total": hosts.total({"calls": 1.0 + jax.process_index()}),
    }


def step_in_parts(device, state) -> tuple:
    """A step of this host's groups in three parts: the state, its metrics, and after each `add` how many rollouts wait.
    A micro-batch takes two rows of each of two hosts, and the second's rollouts are short."""
    run = run_config.resolve(runpy.run_path(str(QUICKSTART))["get_config"]().to_dict())
    batch = dataclasses.replace(run.batch, rows=16, row_tokens=32, micro_rows=4, parts=3)
    update, waiting = Update(dataclasses.replace(run, batch=batch), device), []
    long, short = [group(row, 30, 20, 14) for row in range(3)], [group(row, 12, 9, 7) for row in range(3, 6)]
    mine = hosts.share([*long, *short])
    *first, last = np.array_split(np.arange(len(mine)), batch.parts)
    for part in first:
        update.add(state, [mine[i] for i in part])
        waiting.append(len(update._waiting))
    return *update.finish(state, [mine[i] for i in last]), waiting


def test_two_hosts_learn_what_one_process_learns_and_each_gets_all_weights(tmp_path):
    script = "import json; from tests import test_hosts\n" + (
        "print(json.dumps(test_hosts.learner_steps({host}, '127.0.0.1:{port}')))"
    )
    with two_hosts(["-c", script], tmp_path) as processes:
        want = learner_steps()
        assert wait(processes, START_S) == [0, 0]
    for host in range(2):
        got = json.loads((tmp_path / f"{host}.log").read_text().splitlines()[-1])
        for ours, theirs in zip(got["metrics"], want["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
        for path, leaf in flat(got["params"]):
            np.testing.assert_allclose(leaf, dict(flat(want["params"]))[path], rtol=0, atol=2e-6, err_msg=path)
        assert [one["host"] for one in got["gathered"]] == [0, 1]
        assert [len(one["text"]) for one in got["gathered"]] == [0, 100]
        assert got["total"] == {"calls": 3.0}
        # A micro-batch is learned once both hosts can fill it: in the second part two rows of the first host (two
        # rollouts of 30 tokens), and all six rollouts of the second.
        assert got["waiting"] == [[3, 4], [3, 0]][host]


def flat(tree, path=""):
    if not isinstance(tree, dict):
        yield path, np.array(tree)
        return
    for name, below in tree.items():
        yield from flat(below, f"{path}/{name}")


AGREE = """
import os, pathlib, sys
import jax
from dr_jax import hosts
from dr_jax.errors import ConfigError, DrJaxError, RolloutHalted
jax.distributed.initialize("127.0.0.1:{port}", 2, {host})
with hosts.agreed():
    pass
for check in (
    lambda: hosts.check_shared(pathlib.Path(sys.argv[1]) / "both"),
    lambda: hosts.check_shared(pathlib.Path(sys.argv[1]) / "own{host}"),
    lambda: halt_on_one(),
):
    try:
        check()
        print("well")
    except DrJaxError as error:
        print(type(error).__name__, error)
"""
HALT = """
def halt_on_one():
    with hosts.agreed():
        if {host} == 1:
            raise RolloutHalted("no provider")
"""


def test_what_one_host_knows_all_of_them_say(tmp_path):
    with two_hosts(["-c", HALT + AGREE, str(tmp_path)], tmp_path / "logs") as processes:
        assert wait(processes, START_S) == [0, 0]
    for host in range(2):
        said = (tmp_path / "logs" / f"{host}.log").read_text().splitlines()
        well, unshared, halted = (line for line in said if line.startswith(("well", "ConfigError", "RolloutHalted")))
        assert well == "well"
        assert unshared.startswith("ConfigError host 0: --workdir: 1 of 2 hosts (first: host 1) do not see ")
        assert unshared.endswith("Give a directory that all of them mount, such as an NFS share.")
        assert halted == "RolloutHalted host 1: no provider"
    assert list((tmp_path / "both").iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes=2"], "--processes and --process: need --coordinator=ip:port"),
        (["--coordinator=127.0.0.1:1"], "--coordinator: '127.0.0.1:1' needs --processes=N and --process=0..N-1"),
        (["--coordinator=127.0.0.1:1", "--processes=2", "--process=2"], "needs --processes=N and --process=0..N-1"),
        (["--coordinator=auto"], "this host cannot join the others"),
        (["--config.topology=v5p:2x2x2", "--config.mesh.fsdp=4"], "Start the same command on every host of v5p:2x2x2"),
    ],
)
def test_hosts_that_cannot_join_are_one_line(flags, message, tmp_path, capsys):
    assert train.main(["train", *SETTINGS, f"--workdir={tmp_path / 'run'}", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_shares_are_whole_and_in_order(monkeypatch):
    import jax

    items = tuple(range(11))
    for count in (1, 2, 4, 16):
        monkeypatch.setattr(jax, "process_count", lambda count=count: count)
        parts = []
        for host in range(count):
            monkeypatch.setattr(jax, "process_index", lambda host=host: host)
            parts += hosts.share(items)
        assert tuple(parts) == items


def test_one_host_is_alone(tmp_path):
    assert hosts.count() == 1
    assert hosts.first()
    assert hosts.own(tmp_path) == tmp_path
    assert hosts.gather({"a": (1, 2)}) == [{"a": [1, 2]}]
    with pytest.raises(ConfigError, match="^mine$"), hosts.one_for_all(), hosts.agreed():
        raise ConfigError("mine")


WATCHED = """
import threading, time
from dr_jax import hosts
alarm = hosts.Alarm(1.0)
alarm.put_off()
def stuck(): time.sleep(600)
thread = threading.Thread(target=stuck, daemon=True)
thread.start()
thread.join()
"""


def test_silence_ends_the_process_with_the_stacks_of_all_threads():
    import subprocess

    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "in stuck" in done.stderr
    assert "in <module>" in done.stderr


# The whole loop -----------------------------------------------------------------------------------------------------


def exported(workdir: pathlib.Path):
    export = workdir / "export"
    return hf.load(export, ModelConfig.from_hf(export), dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_two_hosts_train_what_one_process_trains_and_stop_and_go_on(parts, tmp_path):
    import jax

    in_parts = f"--config.batch.parts={parts}"
    assert train.main(["train", *SETTINGS, in_parts, f"--workdir={tmp_path / 'one'}"]) == 0
    two = tmp_path / "two"
    for attempt, more in enumerate((["--stop_after=1"], [])):
        with two_hosts([*TRAIN, in_parts, f"--workdir={two}", *more], tmp_path / f"logs{attempt}") as processes:
            assert wait(processes, START_S) == [0, 0], (tmp_path / f"logs{attempt}" / "0.log").read_text()
    rows, wanted = (metrics.read(path / "metrics.jsonl") for path in (two, tmp_path / "one"))
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row, want in zip(rows, wanted, strict=True):
        assert row.keys() == want.keys()
        for name in row.keys() - {
            name for name in row if name.startswith(("timing_s/", "perf/", "sampler/", "budget/", "loop/", "memory/"))
        }:
            assert row[name] == pytest.approx(want[name], rel=1e-5, abs=1e-6), name
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=0, atol=1e-6),
        exported(two), exported(tmp_path / "one"),
    )  # fmt: skip
    for host in ("000", "001"):
        assert len(list((two / "hosts" / host / "rollouts").iterdir())) == 2
    summaries = [(tmp_path / "logs1" / f"{host}.log").read_text().splitlines()[-1] for host in range(2)]
    assert json.loads(summaries[0]) == json.loads(summaries[1]) == json.loads((two / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--workdir={folder}/run{host}"], 2, "error: host 0: --workdir: 1 of 2 hosts (first: host 1) do not see"),
        (["--workdir={folder}/run", "--config.rollout.questions=3"], 2, "3 do not divide over 2 hosts"),
        (["--workdir={folder}/run", "--config.mesh.data=1"], 2, "config.mesh: covers 4 devices, the 2 hosts have 8"),
        (["--workdir={folder}/run", "--config.budget.max_calls=1"], 3, "halted: host "),
    ],
)
def test_what_must_not_go_on_ends_on_both_with_one_line_and_one_code(more, code, message, tmp_path):
    with two_hosts([*TRAIN, *(word.replace("{folder}", str(tmp_path)) for word in more)], tmp_path) as processes:
        assert wait(processes, START_S) == [code, code]
    for host in range(2):
        said = (tmp_path / f"{host}.log").read_text()
        assert message in said
        assert "Traceback" not in said


def wait_for(path: pathlib.Path, what: str) -> None:
    deadline_s = time.monotonic() + START_S
    while not (path.exists() and what in path.read_text()):
        assert time.monotonic() < deadline_s, path.read_text()
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["exception", "SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("host", [0, 1])
def test_a_host_that_fails_takes_the_other_down_with_a_stack(how, host, tmp_path):
    endless = [*TRAIN, f"--workdir={tmp_path / 'run'}", "--config.steps=1000", "--config.checkpoint.every_steps=500"]
    with two_hosts(endless, tmp_path / "logs") as processes:
        wait_for(tmp_path / "logs" / "0.log", "step    1/1000")
        failing, other = processes[host], processes[1 - host]
        if how == "exception":  # its journal cannot be written
            rollouts = tmp_path / "run" / "hosts" / f"{host:03d}" / "rollouts"
            rollouts.rename(rollouts.with_name("away"))
            rollouts.touch()
            assert failing.wait(LIMIT_S) == 1
            assert "FileExistsError" in (tmp_path / "logs" / f"{host}.log").read_text()
        else:
            os.kill(failing.pid, getattr(signal, how))
        assert other.wait(LIMIT_S) != 0
    said = (tmp_path / "logs" / f"{1 - host}.log").read_text()
    assert "most recent call first" in said or "most recent call last" in said, said


@pytest.mark.slow
def test_a_host_whose_disk_is_full_ends_both_and_the_run_goes_on_once_there_is_room(tmp_path):
    run = [*TRAIN, f"--workdir={tmp_path / 'run'}", "--config.steps=1000"]
    with two_hosts(run, tmp_path / "full") as processes:
        wait_for(tmp_path / "full" / "0.log", "step    2/1000")
        # Larger files fail, as on a full disk: its part of a checkpoint, but not its log.
        resource.prlimit(processes[1].pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        assert processes[1].wait(LIMIT_S) != 0
        assert processes[0].wait(LIMIT_S) != 0
    assert "File too large" in (tmp_path / "full" / "1.log").read_text()
    with two_hosts([*run, "--stop_after=1"], tmp_path / "again") as processes:
        assert wait(processes, START_S) == [0, 0], (tmp_path / "again" / "0.log").read_text()
    (said,) = (line for line in (tmp_path / "again" / "0.log").read_text().splitlines() if line.startswith("stopped"))
    assert int(said.split()[3]) >= 2


@pytest.mark.slow
def test_a_host_that_is_preempted_stops_both_at_the_same_saved_step(tmp_path):
    endless = [*TRAIN, f"--workdir={tmp_path / 'run'}", "--config.steps=1000", "--config.checkpoint.every_steps=500"]
    with two_hosts(endless, tmp_path / "logs") as processes:
        wait_for(tmp_path / "logs" / "0.log", "step    1/1000")
        os.kill(processes[1].pid, signal.SIGTERM)
        assert wait(processes, LIMIT_S) == [0, 0]
    logs = [(tmp_path / "logs" / f"{host}.log").read_text().splitlines() for host in range(2)]
    (first,), (second,) = ([line for line in log if line.startswith("stopped after step ")] for log in logs)
    assert first == second
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [first.split()[3]]
