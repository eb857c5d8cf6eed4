from __future__ import annotations

import pytest

from dr_jax import chips
from dr_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "product", "count", "rings"),
    [
        ("v5p:4x4x4", "v5p-128", 64, (True, True, True)),  # product names of v4 and v5p count cores
        ("v5p:2x2x1", "v5p-8", 4, (False, False, False)),
        ("v5p:2x4x4", "v5p-64", 32, (False, False, False)),  # a ring needs whole cubes
        ("v4:4x4x4", "v4-128", 64, (True, True, True)),
        ("v5e:8x8", "v5e-64", 64, (False, False)),
        ("v6e:16x16", "v6e-256", 256, (True, True)),
        ("v5e:8x16", "v5e-128", 128, (False, True)),
    ],
)
def test_a_slice_by_name(name, product, count, rings):
    found = chips.find(name)
    assert (found.name, found.product, found.chips, found.rings) == (name, product, count, rings)


def test_the_chips_of_one_engine():
    assert chips.find("v5p:4x4x4").part(4) == chips.find("v5p:2x2x1")
    assert chips.find("v6e:8x8").part(8) == chips.find("v6e:2x4")
    with pytest.raises(ConfigError, match="config.engine.tensor: got 3; on a TPU host allowed: 1, 2, 4, 8"):
        chips.find("v6e:8x8").part(3)


@pytest.mark.parametrize(
    "name", ["v5p", "v5p-128", "v5p:4x4", "v5p:4x4x0", "v5p:4xx4", "v5p:4x4x4 ", "v9:2x2", "v5e:2x2x2", "v6e:32x8", "x"]
)
def test_a_name_that_is_no_slice_is_one_line(name):
    with pytest.raises(ConfigError, match="config.topology: .*such as") as raised:
        chips.find(name)
    assert "\n" not in str(raised.value)
