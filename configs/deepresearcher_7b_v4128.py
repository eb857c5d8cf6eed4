"""The paper's recipe on a v4-128: 64 chips with 32 GiB each, 16 hosts.

    python tools/plan.py --config=configs/deepresearcher_7b_v4128.py     # what it needs and how fast it can be

The recipe is that of `deepresearcher_7b.py`; this file says what the slice changes. It has not been run.

Four chips share a row of 32,768 tokens (tensor), which no chip of 32 GiB holds beside everything else; 16 such groups
share the weights (fsdp). Between layers each chip keeps a quarter of the channels of every token.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("deepresearcher_7b.py")))["get_config"]()
    config.model.attention = "splash"  # a v4 has no room for the keys of a row
    del config.engine.compiler["xla_tpu_scoped_vmem_limit_kib"]
    del config.model.compiler["xla_tpu_scoped_vmem_limit_kib"]  # nor for larger pieces of a product
    config.topology = "v4:4x4x4"
    config.mesh = ConfigDict(dict(data=1, fsdp=16, tensor=4))
    #                       weights    activations
    config.sharding = ConfigDict(
        dict(
            b=(None, ("data", "fsdp")),  # rows: each group of four chips has its own
            t=(None, None),
            s=(None, None),
            d=("fsdp", "tensor"),  # channels: 3584 / 16 = 224 of weights, 3584 / 4 = 896 of activations a chip
            f=("tensor", "tensor"),  # 18944 / 4 = 4736 a chip
            n=("tensor", "tensor"),  # 28 / 4 = 7 a chip
            k=("tensor", "tensor"),  # 4 / 4 = 1 a chip
            g=(None, None),
            h=(None, None),
            l=(None, None),
            v=("tensor", "tensor"),
        )
    )
    config.batch.micro_rows = 16  # one row to four chips
    return config
