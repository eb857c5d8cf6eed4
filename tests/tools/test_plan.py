from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
POD = f"--config={ROOT / 'configs' / 'deepresearcher_7b_v5p128.py'}"


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("plan", ROOT / "tools" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_arithmetic_of_a_pod_and_of_another_mesh_in_one_line(main, capsys):
    assert main(["plan", POD, "--nocompile", "--json", "--shapes"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert said["chips"] == 64
    assert any(line.startswith("params/blocks/mlp/up") for line in table)
    more_tensor = ["--config.mesh.fsdp=16", "--config.mesh.tensor=4", "--config.batch.micro_rows=16"]
    assert main(["plan", POD, "--nocompile", "--json", *more_tensor]) == 0
    other = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert other["hbm_gib_per_chip"]["params"] == pytest.approx(said["hbm_gib_per_chip"]["params"], rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.mesh.fsdp=32", "config.mesh: data=1 x fsdp=32 x tensor=1 is 32 devices, v5p:4x4x4"),
        ("--config.topology=v5p-128", "config.topology: got 'v5p-128'; need a kind of chip"),
        ("--config.engine.tensor=8", "config.engine.tensor: 8 chips, a host of v5p:4x4x4 has 4 at most"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(main, capsys, change, message):
    assert main(["plan", POD, "--nocompile", change]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
