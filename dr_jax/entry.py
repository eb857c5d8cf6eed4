"""How every command starts: flags, one clear line for a mistake, and an exit code that a script can act on.

Exit codes: 0 done; 2 a mistake the user can correct (`ConfigError`, `CheckpointError`, bad flags), nothing was
overwritten; 3 the outside world failed too often (`RolloutHalted`), start the same command again later; 1 a defect.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import flags
from ml_collections import config_flags

from dr_jax.errors import ConfigError, DrJaxError, RolloutHalted
from dr_jax.run_config import RunConfig, resolve

SERVER_HELP = "URL of an OpenAI-compatible endpoint that has the model, such as http://127.0.0.1:8000/v1."


def run(
    command: Callable[[RunConfig, flags.FlagValues], int | None],
    values: flags.FlagValues,
    *,
    about: str,
    argv: Sequence[str] | None = None,
) -> int:
    """The exit code of `command`, called with the resolved --config and the parsed flags of `values`; None is 0.

    `about` is what --help says before it lists the flags; `argv` is the process's own where it is None.
    """
    argv = sys.argv if argv is None else argv
    config_flags.DEFINE_config_file(
        "config", None, "The run: a file in configs/.", flag_values=values, sys_argv=list(argv)
    )

    def with_config(values: flags.FlagValues) -> int | None:
        if values.config is None:
            raise ConfigError("--config is required, for example --config=configs/quickstart.py")
        return command(resolve(values.config.to_dict()), values)

    return run_without_config(with_config, values, about=about, argv=argv)


def run_without_config(
    command: Callable[[flags.FlagValues], int | None],
    values: flags.FlagValues,
    *,
    about: str,
    argv: Sequence[str] | None = None,
) -> int:
    """The same for a command that flags alone describe."""
    argv = sys.argv if argv is None else argv
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if {"--help", "-h"} & set(argv):
        print(f"{about}\nFlags:\n{values.get_help()}")
        return 0
    try:
        _parse(values, argv)
        return command(values) or 0
    except RolloutHalted as halted:
        print(f"halted: {halted}", file=sys.stderr)
        return 3
    except DrJaxError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2


def _parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Parses flags; whatever absl or ml_collections says about a mistake becomes one `ConfigError`."""
    path = next((arg.split("=", 1)[1] for arg in argv if arg.startswith("--config=")), None)
    if path is not None and not os.path.exists(path.split(":")[0]):
        raise ConfigError(f"--config: no such file {path!r}; the configs that come with dr_jax are in configs/")
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise ConfigError(str(error).split("\n")[0]) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # ml_collections: a misspelt or mistyped field
        raise ConfigError(" ".join(str(error).split())) from error
    if len(rest) > 1:
        raise ConfigError(
            f"unknown argument {rest[1]!r}: flags are --name=value, settings --config.section.field=value"
        )
