"""The paper's recipe on a v5e-64: 64 chips with 16 GiB each, 16 hosts.

    python tools/plan.py --config=configs/deepresearcher_7b_v5e64.py     # what it needs and how fast it can be

The recipe is that of `deepresearcher_7b.py`; this file says what the slice changes. It has not been run.

Four chips share a row of 32,768 tokens (tensor), which no chip of 16 GiB holds beside everything else; 16 such groups
share the weights (fsdp). Between layers each chip keeps a quarter of the channels of every token.
The tightest of the slices: an engine of four chips has room for 4 sequences.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("deepresearcher_7b.py")))["get_config"]()
    config.engine.slots = 4  # of each host's engine
    config.engine.pages = 1024  # 1.75 GiB a chip: every slot at full context
    config.model.remat = "full"  # 7 KiB a token and layer, cut in four
    config.topology = "v5e:8x8"
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
