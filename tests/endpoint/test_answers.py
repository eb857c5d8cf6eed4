"""What an answer says about its weights; its other parts are seen through OpenAI's client in `test_server`."""

from __future__ import annotations

import pytest

from dr_jax.endpoint.answers import fingerprint, version_of


@pytest.mark.parametrize("version", [0, 7, 12345])
def test_the_version_of_the_weights_travels_along(version):
    assert version_of(fingerprint(version)) == version


@pytest.mark.parametrize("foreign", [None, "", "fp_44709d6fcb", "dr_jax-weights-x", "fp-7", 3])
def test_other_servers_do_not_say(foreign):
    assert version_of(foreign) == 0
