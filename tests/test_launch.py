"""`launch_tpu.sh`: its commands as printed, as the real gcloud carries them out on loopback, and as workers run it."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from tests.gcloud_world import cloud

ROOT = pathlib.Path(__file__).parents[1]
V5P = "--config=configs/deepresearcher_7b_v5p128.py"
SMALL = ["--config.topology=v5p:2x2x2", "--config.mesh.fsdp=8"]  # two workers
RUN = ["--name=run", "--project=p", "--zone=z", V5P, "--workdir=/mnt/dr_jax/7b"]
WHERE = "--project=p --zone=z"

LIMIT_S = 300  # of one command, on a busy machine

needs_gcloud = pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")


def launch(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    environment = (env or dict(os.environ)) | {"PYTHON": sys.executable, "ATTEMPT": "1"}
    command = ["bash", "launch_tpu.sh", *words]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )


def printed(*words: str) -> list[str]:
    done = launch(words[0], "--dry_run", *words[1:])
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_script_is_clean():
    beside = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    subprocess.run([beside or "shellcheck", ROOT / "launch_tpu.sh"], check=True)


def test_help_names_every_verb_and_option():
    done = launch("--help")
    assert done.returncode == 0
    source = (ROOT / "launch_tpu.sh").read_text()
    for word in ("create", "setup", "train", "logs", "status", "resume", "delete", "local", "queued", "xpk", "tpu7x"):
        assert word in done.stdout
    for option in ("--spot", "--reserved", "--internal_ips", "--nfs", "--keys", "--worker", "--cluster", "--dry_run"):
        assert option in done.stdout
        assert option in source.split("set -euo pipefail")[1]


def test_create_orders_the_slice_that_the_config_is_for():
    assert printed("create", *RUN, "--spot", "--internal_ips") == [
        "gcloud compute tpus queued-resources create run --node-id=run --accelerator-type=v5p-128 "
        f"--runtime-version=v2-alpha-tpuv5 --spot --internal-ips --quiet {WHERE}"
    ]
    (line,) = printed("create", *RUN, "--reserved", "--config.topology=v6e:8x8", "--accelerator_type=v6e-64")
    assert "--accelerator-type=v6e-64 --runtime-version=v2-alpha-tpuv6e --reserved" in line


def test_setup_meets_every_worker_once_before_it_meets_them_all():
    lines = printed("setup", *RUN, *SMALL, "--nfs=10.0.0.2:/share")
    ssh = (
        "gcloud compute tpus tpu-vm ssh run --worker={} --command=true --ssh-flag=-oServerAliveInterval=30 --quiet "
        + WHERE
    )
    assert lines[:2] == [ssh.format(0), ssh.format(1)]
    assert [" scp " in line for line in lines] == [False, False, True, True, False]
    assert "--worker=all" in lines[4]
    assert "mount -t nfs -o nconnect=4 10.0.0.2:/share /mnt/dr_jax" in lines[4]


def test_resume_is_create_setup_and_train():
    lines = printed("resume", *RUN, *SMALL)
    assert lines == [*printed("create", *RUN, *SMALL), *printed("setup", *RUN, *SMALL)[:2], *lines[3:]]
    assert lines[-1] == printed("train", *RUN, *SMALL)[0]


def test_logs_status_and_delete():
    (logs,) = printed("logs", *RUN, "--worker=3", "--internal_ips")
    assert "--worker=3" in logs
    assert "/mnt/dr_jax/7b/logs/latest/" in logs
    assert logs.endswith("--internal-ip " + WHERE)
    state, row = printed("status", *RUN)
    assert state == f"gcloud compute tpus queued-resources describe run --format=value\\(state.state\\) {WHERE}"
    assert "/mnt/dr_jax/7b/metrics.jsonl" in row
    assert printed("delete", *RUN) == [
        f"gcloud compute tpus queued-resources delete run --force --async --quiet {WHERE}"
    ]


def test_xpk_is_given_the_same_slice_and_command():
    (line,) = printed("train", "--backend=xpk", "--cluster=c", *RUN, "--", "--config.optim.lr=2e-6")
    assert line.startswith(
        "xpk workload create --cluster=c --project=p --zone=z --workload=run --tpu-type=v5p-128 --num-slices=1"
    )
    assert "--max-restarts=50" in line
    assert "python\\ -m\\ dr_jax.train" in line
    assert "--config.optim.lr=2e-6" in line
    assert line.endswith("\\&\\&\\ test\\ -e\\ /mnt/dr_jax/7b/summary.json")


def test_tpu7x_is_explained():
    done = launch("create", "--backend=tpu7x", "--workdir=/mnt/w")
    assert done.returncode == 0
    assert "--coordinator=auto" in done.stdout
    assert "--workdir=/mnt/w" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fly"], "unknown verb 'fly'; allowed: create, setup"),
        (["create", "--backend=slurm"], "unknown --backend=slurm; allowed: queued, xpk, local, tpu7x"),
        (["create", "--sport"], "unknown option '--sport'"),
        (["create", *RUN, "--spot", "--reserved"], "exclude each other"),
        (["create", "--project=p", V5P], "--zone is required for create"),
        (["train", "--project=p", "--zone=z", V5P], "--workdir is required for train"),
        (["create", "--project=p", "--zone=z"], "--config is required for create"),
        (["create", *RUN, "--config=configs/nowhere.py"], "no such file 'configs/nowhere.py'"),
        (["create", *RUN, "--config=configs/quickstart.py"], "config.topology: '' names no slice"),
        (["create", *RUN, "--accelerator_type=v5p-64"], "v5p-64 is not the v5p-128 of config.topology = 'v5p:4x4x4'"),
        (["create", *RUN, "--config.topology=v7:4x4"], "config.topology: got 'v7:4x4'"),
        (["create", *RUN, "--config.topology=v5p:2x4x8"], "64 chips of v5p come as v5p:4x4x4"),
        (["create", *RUN, "--config.mesh.fsdp=32"], "config.mesh: data=1 x fsdp=32 x tensor=1 is 32 devices"),
        (["create", *RUN, "--config.mesh.fsdp=8", "--config.mesh.tensor=8"],
         "mesh.tensor: 28 query heads do not divide over tensor=8. Qwen2.5-7B allows tensor = 1, 2 or 4."),
        (["create", *RUN, "--config.batch.shorter_rows=(5000,)"],
         "config.batch.shorter_rows: 5000 does not divide config.batch.row_tokens = 32768"),
        (["create", *RUN, "--config.rollout.questions=100"], "100 do not divide over the 16 hosts of v5p-128"),
        (["setup", *RUN, "--keys=NO_SUCH_KEY"], "--keys: NO_SUCH_KEY is not set in this shell"),
        (["create", *RUN, "--backend=xpk"], "--cluster is required"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_reserves_nothing(words, message):
    done = launch(*words, "--dry_run")
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "gcloud compute tpus queued-resources create" not in done.stdout


def test_a_worker_starts_the_run_detached_with_a_log_of_its_own(tmp_path):
    """The text that a worker is sent, run here by a shell; only its Python is another."""
    (line,) = printed(
        "train", *[word for word in RUN if "workdir" not in word], f"--workdir={tmp_path}/w", "--", "--x=a b"
    )
    script = subprocess.run(["bash", "-c", f"printf %s {line.split('--worker=all ')[1].split(' --ssh-flag')[0]}"],
                            capture_output=True, text=True, check=True).stdout.removeprefix("--command=")  # fmt: skip
    home, python = tmp_path / "home", tmp_path / "home" / "dr_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    (home / ".dr_jax.env").write_text("export SERPER_API_KEY=s3cret\n")
    os.mkfifo(tmp_path / "end")
    python.write_text(
        '#!/bin/sh\necho "$SERPER_API_KEY $LIBTPU_INIT_ARGS $JAX_PLATFORMS"\nprintf "[%s]" "$@"\necho\n'
        f"cat {tmp_path}/end\n"
    )
    python.chmod(0o755)
    environment = os.environ | {"HOME": str(home), "LIBTPU_INIT_ARGS": "--mine=1"}

    def work() -> str:
        how = dict(env=environment, capture_output=True, text=True, check=True, timeout=LIMIT_S)
        return subprocess.run(["bash", "-c", script], **how).stdout

    assert work().endswith(": started\n")
    (log,) = (tmp_path / "w" / "logs" / "latest").glob("*.log")
    deadline_s = time.monotonic() + LIMIT_S
    while log.read_text().count("\n") < 2:
        assert time.monotonic() < deadline_s, log.read_text()
        time.sleep(0.05)
    assert work().endswith(": a run is already going\n")
    (tmp_path / "end").write_text("")  # the run ends
    assert log.read_text() == (f"s3cret --mine=1 tpu,cpu\n[-m][dr_jax.train][{V5P}][--workdir={tmp_path}/w][--x=a b]\n")


@needs_gcloud
def test_gcloud_reserves_the_slice_and_waits_for_it(tmp_path):
    with cloud(tmp_path, workers=2) as (there, environment):
        there.after_create = ["PROVISIONING", "ACTIVE"]
        done = launch("create", *RUN, *SMALL, "--spot", env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("v5p-16 is there: 2 workers\n")
        (created,) = (body for method, _, body in there.requests if method == "POST")
        assert created["spot"] == {}
        (spec,) = created["tpu"]["nodeSpec"]
        assert spec["nodeId"] == "run"
        assert spec["node"]["acceleratorType"] == "v5p-16"
        assert spec["node"]["runtimeVersion"] == "v2-alpha-tpuv5"


@needs_gcloud
@pytest.mark.slow
def test_gcloud_brings_a_preempted_run_back_with_one_command(tmp_path):
    with cloud(tmp_path, workers=2) as (there, environment):
        there.state = "SUSPENDED"
        environment["SERPER_API_KEY"] = "s3cret"
        done = launch("resume", *RUN, *SMALL, "--spot", "--keys=SERPER_API_KEY", env=environment)
        assert done.returncode == 0, done.stderr
        changes = [(method, path.rsplit("/", 1)[1]) for method, path, _ in there.requests if "queuedResources" in path]
        assert [change for change in changes if change[0] != "GET"] == [("DELETE", "run"), ("POST", "queuedResources")]
        made = there.connections()
        assert [words[0] for words in made] == ["ssh", "ssh", *["scp"] * 4, *["ssh"] * 4]
        assert all("-oServerAliveInterval=30" in words for words in made if words[0] == "ssh")
        scripts = [" ".join(words[words.index("--") + 1 :]) for words in made if words[0] == "ssh"]
        assert scripts[:2] == ["true", "true"]
        assert all("uv pip install" in script for script in scripts[2:4])
        assert all(
            "nohup setsid flock --nonblock ~/.dr_jax.lock .venv/bin/python -m dr_jax.train" in script
            for script in scripts[4:]
        )
        assert "s3cret" not in json.dumps(made)
        there.requests.clear()
        done = launch("resume", *RUN, *SMALL, env=environment)  # it is there: the run is only started
        assert done.returncode == 0, done.stderr
        assert all(method in ("GET", "PATCH") or ":getGuest" in path for method, path, _ in there.requests)


@needs_gcloud
def test_a_slice_that_is_refused_is_one_line(tmp_path):
    with cloud(tmp_path, workers=2) as (there, environment):
        there.after_create = ["FAILED"]
        done = launch("create", *RUN, *SMALL, env=environment)
        assert done.returncode == 2
        assert "error: the request for v5p-16 in z is FAILED" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_the_local_backend_trains_and_resumes(tmp_path):
    small = [
        "--config.steps=2", "--config.rollout.questions=2", "--config.rollout.rollouts=4", "--config.eval.questions=4",
        "--config.engine.slots=8", "--config.batch.rows=8", "--config.batch.micro_rows=4",
        "--config.checkpoint.every_steps=1",
    ]  # fmt: skip
    words = ["--backend=local", "--config=configs/quickstart.py", f"--workdir={tmp_path}", *small]
    done = launch("train", *words, "--", "--stop_after=1")
    assert done.returncode == 0, done.stderr
    assert "stopped after step 1 of 2" in (tmp_path / "logs" / "latest" / "worker-0.log").read_text()
    done = launch("resume", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 2
    assert '"step": 2' in launch("status", *words).stdout
    failed = launch("train", *words, "--config.optim.lr=0.5")
    assert failed.returncode == 2
