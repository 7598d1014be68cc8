"""A tuned control branch as the one file that the paper's release holds: a bare state dict in safetensors."""

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dp2osr.errors import UserError
from dp2osr.resume import write_bytes

logger = logging.getLogger(__name__)

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name that diffusers gives a network's weights


def export(policy: Path, out: Path, *, dtype: str) -> None:
    """Write the weights of the control branch in folder `policy` to the file `out`, cast to `dtype`.

    Raises UserError where the folder holds no weights, or `out` is no .safetensors file.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: found '{out.suffix}', wanted a .safetensors file")
    if not (policy / WEIGHTS).is_file():
        raise UserError(f"policy {policy}: no {WEIGHTS} in it; wanted the folder of a tuned policy or control branch")
    try:
        state = load_file(policy / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"{policy / WEIGHTS}: no readable safetensors file ({error})") from None
    cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    if odd := [name for name, tensor in cast.items() if tensor.isfinite().logical_not().any()]:
        raise UserError(f"policy {policy}: '{odd[0]}' holds no finite numbers as {dtype}; choose another --dtype")
    write_bytes(out, save(cast))
    logger.info("%s: %d tensors, %d parameters, %s", out, len(cast), sum(t.numel() for t in cast.values()), dtype)
