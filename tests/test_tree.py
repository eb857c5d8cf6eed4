"""The shape of the tree: tests mirror the package, and nothing grows past what a reader can hold."""

from __future__ import annotations

import ast
import pathlib

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "dr_jax"
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
# Tested through what is built on them, or holding data or text alone.
UNTESTED = {"__init__.py", "__main__.py", "errors.py", "interfaces.py", "records.py", "world/style.py"}
UNTESTED |= {"agent/strategies/linear.py"}  # the numbered promises of tests/agent/test_episode.py
NOTHING = ("util", "helper", "common", "misc", "manager", "handler", "factory", "registry")


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def test_every_module_has_its_test_file():
    missing = []
    for path in sources():
        inside = path.relative_to(PACKAGE)
        if path.name in UNTESTED or str(inside) in UNTESTED:
            continue
        mirror = ROOT / "tests" / inside.with_name(f"test_{inside.name}")
        if not mirror.exists():
            missing.append(str(inside))
    assert missing == []


def test_files_and_functions_stay_small():
    large = []
    for path in [*sources(), *(ROOT / "tools").glob("*.py")]:
        text = path.read_text()
        lines = text.count("\n")
        if lines > MAX_FILE_LINES:
            large.append((str(path.relative_to(ROOT)), lines))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    large.append((f"{path.relative_to(ROOT)}:{node.name}", length))
    assert large == []


def test_names_say_something():
    for path in sources():
        assert not any(word in part for part in path.relative_to(ROOT).parts for word in NOTHING), path


def test_no_file_is_a_pickle_and_the_checkpoint_is_small():
    checkpoint = PACKAGE / "world" / "checkpoint"
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 5_000_000
    assert {path.suffix for path in checkpoint.iterdir()} <= {".json", ".safetensors", ".jinja", ".md"}
