"""The frozen backbone, shared out over the processes of a training by torch's FSDP2.

Each process keeps its share of every weight. The weights of a block are gathered from all processes when it runs, in a
forward pass and once more in a backward pass, and let go after it. So whoever runs the backbone meets all others there:
one that ran it less often would leave them waiting for ever. `training.batches.turns` and `training.guard` see to it
that all run it equally often, in the same order, with a graph or without.
"""

import warnings
from typing import Any

import torch
from torch import nn

BLOCKS = ("transformer_blocks", "single_transformer_blocks", "down_blocks", "mid_block", "up_blocks")


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a transformer or UNet: what is gathered at a time."""
    parts = [getattr(backbone, name, None) for name in BLOCKS]
    found = [block for part in parts for block in (part if isinstance(part, nn.ModuleList) else [part])]
    return [block for block in found if block is not None]


def shard(backbone: nn.Module, device: torch.device) -> Any:
    """Share out a backbone on the CPU whose weights are contiguous; it is on `device` afterwards.

    Blocks move one by one, and of each this process keeps its share alone: `device` never holds the whole.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # FLUX's single blocks return views; nothing writes into them
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in blocks(backbone):
        fully_shard(block, mesh=mesh)
    return fully_shard(backbone, mesh=mesh)
