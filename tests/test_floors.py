"""Who may import whom, read from every file: the host column works without JAX, the device column without a socket."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "dr_jax"

# What each room may import from dr_jax besides floor 0 and itself.
FLOOR_0 = {"chips", "errors", "records", "interfaces", "batch", "metrics"}
ROOMS = {
    "model": set(),
    "engine": {"model"},
    "learner": {"model"},
    "web": set(),
    "task": set(),
    "world": set(),
    "agent": {"web", "task"},
    "rollout": {"agent", "task"},
    "endpoint": {"agent", "web"},
}
HOST = {"web", "task", "world", "agent", "rollout", "endpoint", *FLOOR_0}
DEVICE_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}
HOST_PACKAGES = {"aiohttp", "protego", "pypdfium2", "selectolax", "w3lib", "yarl"}


def imports(path: pathlib.Path, *, top_only: bool = False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(room: str):
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def ours(path: pathlib.Path):
    names = [name.split(".") for name in imports(path) if name.startswith("dr_jax.")]
    return {parts[1] for parts in names if (PACKAGE / parts[1]).exists() or (PACKAGE / f"{parts[1]}.py").exists()}


def packages(path: pathlib.Path, **how):
    return {name.split(".")[0] for name in imports(path, **how)}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_lower_floors_only(room):
    for path in files(room):
        assert ours(path) <= FLOOR_0 | ROOMS[room] | {room}, path


@pytest.mark.parametrize("room", sorted(FLOOR_0))
def test_floor_0_stands_on_the_standard_library_and_numpy(room):
    (path,) = files(room)
    assert ours(path) <= FLOOR_0, path
    assert packages(path, top_only=True) <= sys.stdlib_module_names | {"numpy", "dr_jax"}, path


@pytest.mark.parametrize("room", sorted(HOST))
def test_the_host_column_never_imports_jax(room):
    for path in files(room):
        assert not packages(path) & DEVICE_PACKAGES, path


@pytest.mark.parametrize("room", ["model", "engine", "learner"])
def test_the_device_column_never_opens_a_socket(room):
    for path in files(room):
        assert not packages(path) & HOST_PACKAGES, path


def test_single_importers():
    for path in PACKAGE.rglob("*.py"):
        where = str(path.relative_to(PACKAGE))
        if "orbax" in packages(path):
            assert where == "learner/checkpoint.py"
        if "transformers" in packages(path):
            assert where in ("agent/chat.py", "model/hf.py")
        assert "transformers" not in packages(path, top_only=True), where
        if "redis" in packages(path):
            assert where == "web/store.py"
        if "ray" in packages(path):
            assert where == "web/ray_workers.py"
        assert "ray" not in packages(path, top_only=True), where
        if {"absl", "ml_collections"} & packages(path):
            assert where in ("entry.py", "train.py", "evaluate.py", "ask.py", "serve.py")


def test_the_host_column_runs_where_jax_is_not_installed():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room in HOST
        for path in files(room)
        if path.name not in ("__init__.py", "__main__.py")
    ]
    script = (
        "import sys\n"
        f"for name in {sorted(DEVICE_PACKAGES)!r}: sys.modules[name] = None\n"
        "import importlib\n"
        f"for name in {sorted(modules)!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
