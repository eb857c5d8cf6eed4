"""Exit codes: what a script that starts dr_jax can rely on."""

from __future__ import annotations

import pathlib

import pytest
from absl import flags

from dr_jax import entry
from dr_jax.errors import CheckpointError, ConfigError, RolloutHalted

QUICKSTART = pathlib.Path(__file__).parents[1] / "configs" / "quickstart.py"


def call(command, *more: str) -> int:
    return entry.run(command, flags.FlagValues(), about="About.", argv=["x", f"--config={QUICKSTART}", *more])


def raising(error: Exception):
    def command(*_):
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ConfigError("mend this"), 2, "error: mend this\n"),
        (CheckpointError("no step 4"), 2, "error: no step 4\n"),
        (RolloutHalted("an outage"), 3, "halted: an outage\n"),
    ],
)
def test_each_kind_of_error_has_its_code_and_one_line(capsys, error, code, says):
    assert call(raising(error)) == code
    assert capsys.readouterr().err == says


def test_a_defect_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        call(raising(ZeroDivisionError()))


def test_fields_can_be_set_on_the_command_line():
    seen = []
    assert call(lambda run, values: seen.append(run), "--config.optim.lr=0.5", "--config.mesh.tensor=2") == 0
    assert (seen[0].optim.lr, seen[0].mesh["tensor"]) == (0.5, 2)


def test_a_command_that_flags_alone_describe():
    seen = []
    values = flags.FlagValues()
    flags.DEFINE_integer("port", 1, "", flag_values=values)
    assert (
        entry.run_without_config(lambda values: seen.append(values.port), values, about="", argv=["x", "--port=7"]) == 0
    )
    assert (
        entry.run_without_config(raising(ConfigError("no")), flags.FlagValues(), about="", argv=["x", "--port=7"]) == 2
    )
    assert seen == [7]


def test_help_lists_the_flags(capsys):
    assert call(raising(AssertionError()), "--help") == 0
    out = capsys.readouterr().out
    assert out.startswith("About.")
    assert "--config" in out


def test_without_a_config_it_says_which_to_try(capsys):
    assert entry.run(raising(AssertionError()), flags.FlagValues(), about="", argv=["x"]) == 2
    assert "--config=configs/quickstart.py" in capsys.readouterr().err
