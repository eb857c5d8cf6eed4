from __future__ import annotations

import importlib.util
import pathlib

import pytest

from dr_jax import run_config

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="session")
def read_config():
    """`read_config(name, **{'section.field': value})`: a shipped config, changed, checked."""

    def read(name: str, **changes):
        spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config()
        config.update_from_flattened_dict(changes)
        return run_config.resolve(config.to_dict())

    return read


@pytest.fixture(scope="session")
def tiny(read_config):
    """The embedded checkpoint on a slice of four chips."""
    return read_config("quickstart", **{"topology": "v5e:2x2", "mesh.fsdp": 4, "batch.micro_rows": 4})
