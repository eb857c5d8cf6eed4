"""The command itself, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import sys

import aiohttp
import pytest

from dr_jax import serve

ROOT = pathlib.Path(__file__).parents[1]


async def test_it_serves_until_it_is_told_to_stop_and_finishes_what_is_under_way():
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dr_jax.serve", "--checkpoint=world", "--port=0", "--name=tiny", "--slots=2",
        stdout=asyncio.subprocess.PIPE, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    async with asyncio.timeout(120), aiohttp.ClientSession() as session:
        name, url = (await process.stdout.readline()).decode().split(": ")
        assert name == "tiny"
        body = {"prompt": [5, 6, 7], "max_tokens": 1500, "temperature": 2, "ignore_eos": True, "stream": True}
        async with session.post(f"{url.strip()}/completions", json=body) as response:
            await response.content.readline()
            process.send_signal(signal.SIGTERM)
            assert (await process.stdout.readline()).startswith(b"stopping")
            assert (await response.text()).endswith("data: [DONE]\n\n")
        assert await process.wait() == 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "--checkpoint is required, for example --checkpoint=world"),
        (["--checkpoint=/nowhere"], "--checkpoint: no Hugging Face checkpoint at /nowhere"),
        (["--checkpoint=world", "--dtype=int8"], "--dtype: got 'int8'; allowed: float32, bfloat16"),
        (["--checkpoint=world", "--max_sequences=0"], "--max_sequences: got 0"),
        (["--checkpoint=world", "--host=0.0.0.0"], "can be reached by others; that needs an API key"),
        (["--checkpoint=world", "--tensor=3"], "do not divide"),
        (["--checkpoint=world", "--slots=0"], "engine.slots: got 0"),
        (["--checkpoint=world", "--prot=1"], "Unknown command line flag 'prot'"),
        (["--checkpoint=world", "8000"], "unknown argument '8000'"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, more, words):
    monkeypatch.delenv("DR_JAX_API_KEY", raising=False)
    assert serve.main(["serve", *more]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_help_says_where_the_key_comes_from(capsys):
    assert serve.main(["serve", "--help"]) == 0
    assert "DR_JAX_API_KEY" in capsys.readouterr().out
