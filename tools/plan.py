"""Says, before a chip is reserved, whether a config fits its TPU slice and how fast it can be.

    python tools/plan.py --config=configs/deepresearcher_7b_v5p128.py [--json] [--shapes] [--nocompile] [--layout]

Compiles learner step (in two programs where `config.batch.parts` is above 1), prefill, decode and weight hand-over for
`config.topology`, from the config alone: no weights, no TPU. The compiler is `pip install libtpu`; without it only the
arithmetic part is printed. `--layout` prints what lies where and nothing else: tests/golden has it for every config, so
that a change of sharding can be read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import jax
from absl import flags

from dr_jax import entry
from dr_jax.errors import ConfigError
from dr_jax.plan import programs, report
from dr_jax.run_config import RunConfig


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, or 2 after one line about a mistake the user can correct; a run that does not fit is one."""
    argv = list(sys.argv if argv is None else argv)
    values = flags.FlagValues()
    flags.DEFINE_bool("json", False, "One JSON object as the last line.", flag_values=values)
    flags.DEFINE_bool("compile", True, "Off: the arithmetic part only, in seconds.", flag_values=values)
    flags.DEFINE_bool("shapes", False, "Every array: shape, letters, placement, bytes a chip.", flag_values=values)
    flags.DEFINE_bool("layout", False, "Only HBM and arrays, in a second; nothing is traced.", flag_values=values)
    name = next((word.split("=", 1)[1] for word in argv if word.startswith("--config=")), "")
    return entry.run(lambda run, values: plan(run, values, name), values, about=__doc__, argv=argv)


def plan(run: RunConfig, values: flags.FlagValues, name: str) -> None:
    """Prints the plan; raises `ConfigError` where the run does not fit."""
    if values.layout:
        print(report.layout(programs.setup(run, compiler=False), name))
        return
    compiler = values.compile and programs.has_compiler()
    made = report.make(programs.setup(run, compiler=compiler), compiler=compiler)
    print(report.table(made, name))
    if values.shapes:
        print("\n" + report.shapes(made))
    said = report.summary(made, name)
    if values.json:
        print(json.dumps(said), flush=True)
    if said["fits"] is False:
        raise ConfigError(f"config: does not fit {run.topology}. {report.advice(made)}")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # leaves an accelerator to the run that is using it
    sys.exit(main())
