"""What makes sampling faster and changes no candidate beyond rounding: the switches of `rollout.speed`.

For jobs that sample and save no network: some of it changes modules in place.
"""

import importlib.util
import logging
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dp2osr.config_rollout import SpeedSettings
from dp2osr.errors import UserError
from dp2osr.models.backend import Backend

LOG = logging.getLogger("speed")

# Each is repeated in its network, and holds nearly all of its arithmetic
BLOCKS = frozenset({"BasicTransformerBlock", "ResnetBlock2D", "FluxTransformerBlock", "FluxSingleTransformerBlock"})
SHAPES = 64  # compiled at most, then torch goes on without: SD2's blocks have 15 widths, some of them in two sizes
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def prepare(backend: Backend, branch: nn.Module, settings: SpeedSettings) -> None:
    """Change the networks of a job as `settings` say; raises UserError where something that they need is not here."""
    networks = (backend.backbone, branch)
    if not settings.channels_last:
        for network in (*networks, backend.autoencoder.vae):
            network.to(memory_format=torch.contiguous_format)
    if settings.fuse_qkv:
        for network in networks:
            fuse_qkv(network)
    torch.backends.cudnn.benchmark = settings.cudnn_benchmark
    if settings.compile:
        check_compiler(backend.device)
        compile_blocks(networks, settings.compile_cache)


def fuse_qkv(network: nn.Module) -> None:
    """Let each attention make query, key and value by one product, of another sequence key and value.

    diffusers' method of a whole network is lacking in Stable Diffusion's ControlNet. The separate weights stay, too.
    """
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    for module in network.modules():
        part: Any = module
        if hasattr(part, "fuse_projections"):
            part.fuse_projections()
        if isinstance(part, Attention):  # FLUX's has a processor that knows both
            part.set_processor(FusedAttnProcessor2_0())


def attention(settings: SpeedSettings) -> AbstractContextManager[Any]:
    """Return what to sample within: the kernel of `settings` comes first, the others where it cannot compute."""
    if settings.attention == "auto":
        return nullcontext()
    first = KERNELS[settings.attention]
    if first is SDPBackend.MATH:
        return sdpa_kernel(first)
    others = [kernel for kernel in KERNELS.values() if kernel is not first]
    return sdpa_kernel([first, *others], set_priority=True)


def check_compiler(device: torch.device) -> None:
    """Raise UserError where torch.compile would fail in the first batch: for a CPU it builds C++, for a GPU Triton."""
    variable, names = ("CXX", ("g++", "clang++")) if device.type == "cpu" else ("CC", ("gcc", "clang"))
    lacking = [] if any(map(shutil.which, filter(None, (os.environ.get(variable), *names)))) else [" or ".join(names)]
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        lacking.append("the package triton")
    if lacking:
        raise UserError(
            f"config: rollout.speed.compile: found true on {device.type} without {' and '.join(lacking)}; "
            "wanted that installed, or compile: false"
        )


def compile_blocks(networks: tuple[nn.Module, ...], cache: str) -> None:
    """Compile the repeated blocks, each shape when it comes first; `cache` is a folder, empty for torch's own."""
    import torch._dynamo

    if cache:
        try:
            Path(cache).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"config: rollout.speed.compile_cache: {error}; wanted a folder to write to") from None
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(cache).absolute())
    limits: Any = torch._dynamo.config
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # of older torch
    setattr(limits, name, max(SHAPES, getattr(limits, name)))
    blocks = [block for network in networks for block in network.modules() if type(block).__name__ in BLOCKS]
    for block in blocks:
        block.compile(dynamic=False)
    LOG.info("%d blocks are compiled as they are first used; cache: %s", len(blocks), cache or "torch's own")
