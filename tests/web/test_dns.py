"""A real DNS server under the C library's own resolver: which of its answers are about a name, which are outages."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

from dr_jax.records import FailureKind as K

ALONE = ("unshare", "--user", "--map-root-user", "--mount", "--net")


def test_what_the_resolver_answers_is_about_the_name_and_silence_is_an_outage(tmp_path):
    if not shutil.which("unshare") or subprocess.run([*ALONE, "true"], capture_output=True).returncode:
        pytest.skip("this machine gives nobody a network namespace of their own")
    script = pathlib.Path(__file__).with_name("dns_world.py")
    command = [*ALONE, sys.executable, str(script), str(tmp_path / "resolv.conf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "nxdomain": [K.NO_SUCH_HOST, False],
        "empty": [K.NO_SUCH_HOST, False],
        "private": [K.BLOCKED, False],
        "servfail": [K.DNS, True],
        "refused": [K.DNS, True],
        "silent": [K.DNS, True],
        "half-failed": [K.DNS, True],  # no IPv6 address, and no answer about IPv4
        "half-silent": [K.DNS, True],
    }
