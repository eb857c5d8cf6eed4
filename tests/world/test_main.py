"""The command line, as a person starts it: a process of its own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import urllib.request

import pytest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_told_to_stop(number):
    """Also where it was started with SIGINT ignored, as a shell starts what it puts into the background."""
    command = ["bash", "-c", f"trap '' INT; exec {sys.executable} -m dr_jax.world --port 0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = re.match(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())[0]
            with urllib.request.urlopen(address) as reply:
                assert b"<h1>Lore</h1>" in reply.read()
            process.send_signal(number)
            assert process.wait(timeout=10) == 0
        finally:
            process.kill()


def test_it_names_a_bad_seed():
    run = subprocess.run([sys.executable, "-m", "dr_jax.world", "--seed", "-1"], capture_output=True, text=True)
    assert run.returncode == 2
    (line,) = run.stderr.splitlines()
    assert line == "error: world.seed: got -1; allowed is a whole number from 0 up. Set world.seed to 0."
