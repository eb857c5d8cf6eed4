"""Strictness lives here: four CPU devices, rank promotion raises, warnings are errors (pyproject), loopback only."""

from __future__ import annotations

import os
import pathlib
import runpy
import socket

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import pytest

from dr_jax import run_config

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared"
QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


@pytest.fixture(autouse=True)
def _loopback_only(monkeypatch):
    """A test that opens a connection to anything but this machine fails."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1")):
            raise AssertionError(f"test tried to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(scope="session")
def run() -> run_config.RunConfig:
    """The settings of configs/quickstart.py."""
    return run_config.resolve(runpy.run_path(str(QUICKSTART))["get_config"]().to_dict())


@pytest.fixture(scope="session")
def share_compilations(tmp_path_factory):
    """Engines of equal sizes compile once; also across the tests that must break theirs."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("jax")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def qwen_tokenizer_dir() -> pathlib.Path:
    """The real Qwen2.5 tokenizer, where it lies beside the checkout."""
    path = SHARED / "qwen2.5-tokenizer"
    if not path.exists():
        pytest.skip("the real Qwen2.5 tokenizer is not beside this checkout (../shared/qwen2.5-tokenizer)")
    return path
