"""The paper's recipe on a v6e-64: 64 chips with 32 GiB each, 16 hosts.

    python tools/plan.py --config=configs/deepresearcher_7b_v6e64.py     # what it needs and how fast it can be

The recipe is that of `deepresearcher_7b.py`; this file says what the slice changes. It has not been run.

Weights are spread over all 64 chips (fsdp) and gathered layer by layer; each chip has a row of its own. That fits where
only a layer's input is kept for the backward pass, and an engine has pages for half of its sequences at full length.
"""

import pathlib
import runpy

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = runpy.run_path(str(pathlib.Path(__file__).with_name("deepresearcher_7b.py")))["get_config"]()
    config.engine.slots = 16  # of each host's engine
    config.engine.pages = 2048  # 3.5 GiB a chip: 8 sequences at full context, or 16 at half of it
    config.model.remat = "full"  # 7 KiB a token and layer
    config.model.compiler.update(  # as MaxText's for v6e
        dict(
            xla_tpu_scoped_vmem_limit_kib=65536,  # half of the on-chip memory, for pieces that keep wider units busy
            # Weights are gathered and gradients summed by the sparse cores, beside everything else.
            xla_tpu_enable_sparse_core_collective_offload_all_gather=True,
            xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=True,
            xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=True,
            xla_tpu_enable_sparse_core_collective_offload_all_reduce=True,
            xla_tpu_enable_all_gather_offload_tracing=True,
            xla_tpu_enable_reduce_scatter_offload_tracing=True,
            xla_tpu_enable_all_reduce_offload_tracing=True,
            xla_tpu_use_tc_device_shape_on_sc=True,
            xla_tpu_enable_async_collective_fusion_fuse_all_gather=False,
            xla_tpu_enable_async_collective_fusion_fuse_all_reduce=False,
            xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=False,
        )
    )
    config.topology = "v6e:8x8"
    config.mesh = ConfigDict(dict(data=1, fsdp=64, tensor=1))
    #                       weights    activations
    config.sharding = ConfigDict(
        dict(
            b=(None, ("data", "fsdp")),  # rows: each chip has its own
            t=(None, None),
            s=(None, None),
            d=("fsdp", None),  # channels: 3584 / 64 = 56 of weights a chip
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
