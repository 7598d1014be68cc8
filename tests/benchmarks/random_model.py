"""Models of the published architectures with random weights, made on the device: speed does not depend on values.

`reduced` divides the widths, for machines where the full size has no place; depth, resolutions and shapes of the
computation stay.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, FluxControlNetModel

from dp2osr import config
from dp2osr.iqa.pretrained import replaced
from dp2osr.models import flux, parts, sd
from dp2osr.models.backend import Backend, Embeddings, load_backend
from dp2osr.models.footprint import ARCHITECTURES, CONTROL_LAYERS

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = {"sd2-base": "c-sd2.yaml", "flux-dev": "c-flux.yaml"}
NARROWER = ("block_out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim")


def settings(architecture: str) -> config.Config:
    """Return the configuration of the paper's setting of an architecture."""
    return config.read(ROOT / "config" / "config.yaml", ROOT / "config" / OVERLAYS[architecture])


def reduced(architecture: str, width: int, folder: Path) -> Path:
    """Write the configurations of an architecture with widths divided by `width` (a power of two) to `folder`."""
    shutil.copytree(ARCHITECTURES / architecture, folder)
    for part in ("unet", "transformer", "vae"):
        path = folder / part / "config.json"
        if not path.exists():
            continue
        values = json.loads(path.read_text())
        for name in NARROWER:
            if name in values:
                wide = values[name]
                values[name] = [each // width for each in wide] if isinstance(wide, list) else wide // width
        if "norm_num_groups" in values:
            values["norm_num_groups"] //= width
        if "num_attention_heads" in values:
            values["num_attention_heads"] //= width
        if part == "unet":  # here attention_head_dim counts heads
            values["attention_head_dim"] = [max(1, heads // width) for heads in values["attention_head_dim"]]
        path.write_text(json.dumps(values))
    return folder


@contextlib.contextmanager
def made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Make new tensors of this type on this device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def load(policy: config.PolicySettings, device: torch.device) -> Backend:
    """Return the real backend of a folder that holds configurations alone, with random weights."""

    def random_part(kind: Any, folder: Path, part: str, **_: Any) -> Any:
        name = policy.sampling.vae_dtype if kind is AutoencoderKL else policy.sampling.dtype
        with made_on(device, getattr(torch, name)):
            return kind.from_config(parts.load_settings(kind, folder, part))

    with contextlib.ExitStack() as stack:
        for module in (parts, sd, flux):
            stack.enter_context(replaced(module, "load_part", random_part))
        return load_backend(policy, device=device, parts=frozenset({"backbone", "vae"}))


def control_branch(backend: Backend, dtype: torch.dtype) -> Any:
    """Return a control branch as the paper starts one, in `dtype` on the backend's device."""
    backbone: Any = backend.backbone
    with made_on(backend.device, dtype):
        if backend.backbone_folder == "unet":
            branch: Any = ControlNetModel.from_unet(backbone)
        else:
            branch = FluxControlNetModel.from_transformer(
                backbone,
                num_layers=CONTROL_LAYERS,
                num_single_layers=0,
                attention_head_dim=backbone.config.attention_head_dim,
                num_attention_heads=backbone.config.num_attention_heads,
            )
    return parts.place(branch, backend.device, dtype)


def embeddings(backend: Backend, policy: config.PolicySettings, count: int) -> Embeddings:
    """Return random text embeddings of `count` prompts."""
    settings: Any = backend.backbone.config
    if backend.backbone_folder == "unet":
        shapes = {"prompt_embeds": (77, settings.cross_attention_dim)}
    else:
        pooled = (settings.pooled_projection_dim,)
        shapes = {"prompt_embeds": (policy.sampling.text_tokens, settings.joint_attention_dim), "pooled": pooled}
    options = {"device": backend.device, "dtype": backend.dtype}
    return {name: torch.randn((count, *shape), **options) for name, shape in shapes.items()}
