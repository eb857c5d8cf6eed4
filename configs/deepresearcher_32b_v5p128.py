"""The paper's recipe for Qwen2.5-32B-Instruct, on a v5p-128: 64 chips with 95 GiB each, 16 hosts.

    python tools/plan.py --config=configs/deepresearcher_32b_v5p128.py     # what it needs and how fast it can be

The recipe is that of `deepresearcher_7b.py`; this file says what the slice changes. It has not been run.

Weights are spread over all 64 chips (fsdp), and each chip has a row of its own, as for the 7B; only a layer's input is
kept for the backward pass.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("deepresearcher_7b.py")))["get_config"]()
    config.engine.slots = 8  # of each host's engine
    config.engine.pages = 2048  # of 128 tokens, 262,144 bytes each: 16 GiB a chip, every slot at full context
    config.model.path = "Qwen2.5-32B-Instruct"
    config.model.remat = "full"  # 10 KiB a token and layer: 20 GiB for a row
    config.topology = "v5p:4x4x4"
    config.mesh = ConfigDict(dict(data=1, fsdp=64, tensor=1))
    #                       weights    activations
    config.sharding = ConfigDict(
        dict(
            b=(None, ("data", "fsdp")),  # rows: each chip has its own
            t=(None, None),
            s=(None, None),
            d=("fsdp", None),  # channels: 5120 / 64 = 80 of weights a chip
            f=("tensor", "tensor"),  # tensor=1: whole
            n=("tensor", "tensor"),
            k=("tensor", "tensor"),
            g=(None, None),
            h=(None, None),
            l=(None, None),
            v=("tensor", "tensor"),
        )
    )
    config.batch.micro_rows = 64  # one row a chip
    return config
