"""Qwen2.5-0.5B-Instruct by the paper's recipe, on a v5e-8: one host of 8 chips with 16 GiB each.

    python tools/plan.py --config=configs/deepresearcher_05b_v5e8.py     # what it needs and how fast it can be

The recipe is that of `deepresearcher_7b.py`; this file says what the slice changes. It has not been run.

The smallest machine that trains on the real web: to try a change before it costs a pod. 14 query heads and 2 key/value
heads let two chips share a row (tensor); four such pairs share the weights (fsdp).
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("deepresearcher_7b.py")))["get_config"]()
    config.engine.slots = 16
    config.engine.pages = 4096  # of 128 tokens, 12,288 bytes each: 3 GiB a chip, every slot at full context
    config.engine.attention = "blocks"  # the kernel takes no heads of 64 channels
    config.engine.tensor = 2  # the most that 2 kv heads allow
    config.model.path = "Qwen2.5-0.5B-Instruct"
    config.model.remat = "full"
    config.topology = "v5e:2x4"
    config.mesh = ConfigDict(dict(data=1, fsdp=4, tensor=2))
    #                       weights    activations
    config.sharding = ConfigDict(
        dict(
            b=(None, ("data", "fsdp")),  # rows: each pair of chips has its own
            t=(None, None),
            s=(None, None),
            d=("fsdp", "tensor"),  # channels: 896 / 4 = 224 of weights, 896 / 2 = 448 of activations a chip
            f=("tensor", "tensor"),  # 4864 / 2 = 2432 a chip
            n=("tensor", "tensor"),  # 14 / 2 = 7 a chip
            k=("tensor", "tensor"),  # 2 / 2 = 1 a chip
            g=(None, None),
            h=(None, None),
            l=(None, None),
            v=("tensor", "tensor"),
        )
    )
    config.batch.micro_rows = 4  # one row to two chips
    return config
