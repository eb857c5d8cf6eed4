"""Every way to get a config wrong is one clear line, and equal settings compare equal."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from dr_jax.errors import ConfigError
from dr_jax.run_config import as_dict, difference, resolve

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict()


def quickstart():
    return load(next(path for path in CONFIGS if path.stem == "quickstart"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_resolves(path):
    resolve(load(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["optim"].update(lrr=1), r"config.optim.lrr: no such setting; did you mean 'lr'\?"),
        (lambda c: c.update(zebra=1), "config.zebra: no such setting; fields here: seed, steps"),
        (lambda c: c["optim"].pop("lr"), "config.optim.lr: missing"),
        (lambda c: c["batch"].update(parts=3), "config.batch.parts: 3 does not divide config.rollout.questions = 16"),
        (lambda c: c["optim"].update(lr="fast"), "config.optim.lr: got 'fast' .str., need float"),
        (lambda c: c.update(steps=1.5), "config.steps: got 1.5 .float., need int"),
        (lambda c: c.update(steps=True), "config.steps: got True .bool., need int"),
        (lambda c: c.update(steps=0), "config.steps: got 0; must be above 0"),
        (lambda c: c["grpo"].update(kl_coef=-1.0), "config.grpo.kl_coef: got -1.0; must not be negative"),
        (lambda c: c["grpo"].update(advantage="median"), "config.grpo.advantage: got 'median'; allowed: std, mean"),
        (
            lambda c: c["web"].update(reader="oracle"),
            "config.web.reader: got 'oracle'; allowed: extractive, policy, endp",
        ),
        (lambda c: c["reading"].update(max_segments=0), "config.reading.max_segments: got 0; must be above 0"),
        (lambda c: c["reading"].update(max_tokens=0), "config.reading.max_tokens: got 0; must be above 0"),
        (lambda c: c["reading"].update(train="yes"), "config.reading.train: got 'yes' .str., need bool"),
        (lambda c: c["reading"].update(parameters=3), "config.reading.parameters: got 3, need a table"),
        (lambda c: c.update(optim=3), "config.optim: got 3, need a section"),
        (lambda c: c.update(mesh=3), "config.mesh: got 3, need a table"),
        (lambda c: c.update(topology="v5p-8"), "config.topology: got 'v5p-8'; need a kind of chip"),
        (
            lambda c: c.update(topology="v5e:2x2"),
            "config.mesh: data=1 x fsdp=1 x tensor=1 is 1 devices, v5e:2x2 .* has 4",
        ),
        (lambda c: c["batch"].update(micro_rows=7), "config.batch.micro_rows: 7 does not divide"),
        (
            lambda c: c["batch"].update(shorter_rows=(500,)),
            "config.batch.shorter_rows: 500 does not divide config.batch.row_tokens = 2048",
        ),
        (
            lambda c: c["batch"].update(shorter_rows=(1024, 512)),
            "config.batch.shorter_rows: got .1024, 512., need rising lengths below row_tokens",
        ),
        (
            lambda c: c["batch"].update(shorter_rows=(512, 512)),
            "config.batch.shorter_rows: got .512, 512., need rising lengths below row_tokens",
        ),
        (
            lambda c: c["batch"].update(shorter_rows=(4096,)),
            "config.batch.shorter_rows: 4096 does not divide config.batch.row_tokens = 2048",
        ),
        (
            lambda c: c["batch"].update(shorter_rows=(2048,)),
            "config.batch.shorter_rows: got .2048,., need rising lengths below row_tokens",
        ),
        (
            lambda c: c["batch"].update(shorter_rows=(2,)),
            "config.batch.shorter_rows: 2 .* its micro-batch does not divide config.batch.rows",
        ),
        (lambda c: c["batch"].update(row_tokens=64), "config.batch.row_tokens: 64 is less than config.engine.context"),
        (
            lambda c: c["rollout"].update(max_policy_lag=1),
            "config.grpo.tis_cap: 0 with config.rollout.max_policy_lag = 1",
        ),
        (
            lambda c: c["rollout"].update(max_policy_lag=-1),
            "config.rollout.max_policy_lag: got -1; must not be negative",
        ),
        (lambda c: c["batch"].update(rows=8, micro_rows=8), "config.batch.rows: 8 is less than questions x rollouts"),
    ],
)
def test_each_mistake_is_named_with_its_field_and_its_remedy(change, message):
    config = quickstart()
    change(config)
    with pytest.raises(ConfigError, match=message):
        resolve(config)


def test_a_lag_is_taken_with_a_cap_or_with_the_samplers_own_ratio():
    config = quickstart()
    config["rollout"]["max_policy_lag"] = 1
    config["grpo"]["tis_cap"] = 2.0
    assert resolve(config).grpo.tis_cap == 2.0
    config["grpo"].update(tis_cap=0.0, old_logp="sampler")
    assert resolve(config).rollout.max_policy_lag == 1


def test_a_whole_number_is_a_float_where_one_is_needed():
    config = quickstart()
    config["agent"]["temperature"] = 1
    assert resolve(config).agent.temperature == 1.0


def test_difference_names_every_changed_leaf():
    old, new = as_dict(resolve(quickstart())), quickstart()
    assert difference(old, as_dict(resolve(new))) == []
    new["optim"]["lr"], new["steps"] = 0.5, 7
    lines = difference(old, as_dict(resolve(new)))
    assert lines == [f"config.optim.lr: {old['optim']['lr']} -> 0.5", f"config.steps: {old['steps']} -> 7"]
