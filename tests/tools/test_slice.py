"""A config names its slice, as it is sold."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from dr_jax import chips

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("slice_tool", ROOT / "tools" / "slice.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        ("v4:2x2x1", "v4-8"), ("v4:4x4x4", "v4-128"), ("v5p:2x2x1", "v5p-8"), ("v5p:2x2x2", "v5p-16"),
        ("v5p:2x2x4", "v5p-32"), ("v5p:2x4x4", "v5p-64"), ("v5p:4x4x8", "v5p-256"), ("v5e:1x1", "v5litepod-1"),
        ("v5e:2x4", "v5litepod-8"), ("v5e:8x8", "v5litepod-64"), ("v6e:8x16", "v6e-128"), ("v6e:16x16", "v6e-256"),
    ],
)  # fmt: skip
def test_a_slice_is_ordered_by_its_product_name(tool, topology, name):
    assert tool.accelerator_type(chips.find(topology)) == name


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("deepresearcher_7b.py", "v5p-8 v2-alpha-tpuv5 1"),
        ("deepresearcher_7b_v5p128.py", "v5p-128 v2-alpha-tpuv5 16"),
        ("deepresearcher_7b_v6e64.py", "v6e-64 v2-alpha-tpuv6e 16"),
    ],
)
def test_every_shipped_config_says_what_to_order(tool, config, said, capsys):
    assert tool.main(["slice", f"--config={ROOT / 'configs' / config}"]) == 0
    assert capsys.readouterr().out.strip() == said


POD = f"--config={ROOT / 'configs' / 'deepresearcher_7b_v5p128.py'}"


def test_the_programs_are_built_before_there_are_chips_where_the_network_is_known(tool, capsys):
    assert tool.main(["slice", POD, "--programs"]) == 0
    wrong = ["--config.mesh.fsdp=8", "--config.mesh.tensor=8", "--programs"]
    assert tool.main(["slice", POD, *wrong]) == 2
    assert capsys.readouterr().err.startswith("error: mesh.tensor: 28 query heads do not divide over tensor=8.")
    assert tool.main(["slice", POD, "--config.batch.micro_rows=32", "--programs"]) == 2
    said = "error: micro_rows: got 32, need a multiple of the 64 devices that share rows"
    assert capsys.readouterr().err.startswith(said)
    assert tool.main(["slice", POD, *wrong, "--config.model.path=/mnt/of_the_pod/Mine-7B"]) == 0
