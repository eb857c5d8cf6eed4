"""The promises of docs/threat_model.md name tests that exist."""

from __future__ import annotations

import ast
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]


def test_every_promise_names_tests_that_are_there():
    text = (ROOT / "docs/threat_model.md").read_text()
    promises = text.split("## What is promised")[1].split("## What is not promised")[0].split("\n**")[1:]
    for promise in promises:
        named = re.findall(r"^- `(tests/\S+\.py)::(test_\w+)`$", promise, re.MULTILINE)
        assert 0 < len(named) == promise.count("\n- "), promise
        for file, test in named:
            assert test in _tests(ROOT / file), f"{file} has no {test}"


def _tests(path: pathlib.Path) -> set[str]:
    return {
        n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    }
