"""Models of the published architectures with random weights, made on the device: speed does not depend on values.

`reduced` divides the widths, for machines where the full size has no place; depth, resolutions and shapes of the
computation stay. On torch's `meta` device nothing is held at all, and the true size fits any machine.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, FluxControlNetModel
from torch import nn

from dp2osr import config
from dp2osr.iqa.pretrained import replaced
from dp2osr.models import flux, parts, sd
from dp2osr.models.backend import Backend, Embeddings, load_backend
from dp2osr.models.footprint import ARCHITECTURES, CONTROL_LAYERS, META

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = {"sd2-base": "c-sd2.yaml", "flux-dev": "c-flux.yaml"}
NARROWER = ("block_out_channels", "cross_attention_dim", "joint_attention_dim", "pooled_projection_dim")


def settings(architecture: str, overlays: Sequence[Path] = ()) -> config.Config:
    """Return the configuration of the paper's setting of an architecture, and of further overlays."""
    return config.read(ROOT / "config" / "config.yaml", ROOT / "config" / OVERLAYS[architecture], *overlays)


def reduced(architecture: str, width: int, folder: Path) -> Path:
    """Write the configurations of an architecture with widths divided by `width` (a power of two) to `folder`."""
    shutil.copytree(ARCHITECTURES / architecture, folder)
    for part in ("unet", "transformer", "vae"):
        path = folder / part / "config.json"
        if path.exists():
            path.write_text(json.dumps(narrowed(json.loads(path.read_text()), width, part)))
    return folder


def narrowed(values: dict[str, Any], width: int, part: str) -> dict[str, Any]:
    """Return a network's configuration with its widths divided."""
    for name in NARROWER:
        if name in values:
            wide = values[name]
            values[name] = [each // width for each in wide] if isinstance(wide, list) else wide // width
    if "norm_num_groups" in values:
        values["norm_num_groups"] = max(1, values["norm_num_groups"] // width)
    if "num_attention_heads" in values:
        values["num_attention_heads"] = max(1, values["num_attention_heads"] // width)
    if part == "unet":  # here attention_head_dim counts heads
        values["attention_head_dim"] = [max(1, heads // width) for heads in values["attention_head_dim"]]
    return values


def policy(base: config.PolicySettings, architecture: str, width: int, folder: Path) -> config.PolicySettings:
    """Return `base` with its model in `folder`, where the configurations are written."""
    return base.model_copy(update={"model": str(reduced(architecture, width, folder))})


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


@contextlib.contextmanager
def random_parts(device: torch.device, dtype: torch.dtype, vae_dtype: torch.dtype) -> Iterator[None]:
    """Let folders that hold configurations alone load as networks with random weights."""

    def random_part(kind: Any, folder: Path, part: str, **_: Any) -> Any:
        with made_on(device, vae_dtype if kind is AutoencoderKL else dtype):
            return kind.from_config(parts.load_settings(kind, folder, part))

    with contextlib.ExitStack() as stack:
        for module in (parts, sd, flux):
            stack.enter_context(replaced(module, "load_part", random_part))
        yield


def load(policy: config.PolicySettings, device: torch.device) -> Backend:
    """Return the real backend of a folder that holds configurations alone, with random weights."""
    dtypes = (getattr(torch, name) for name in (policy.sampling.dtype, policy.sampling.vae_dtype))
    with random_parts(device, *dtypes):
        return load_backend(policy, device=device, parts=frozenset({"backbone", "vae"}))


def control_branch(backend: Backend, dtype: torch.dtype) -> Any:
    """Return a control branch as the paper starts one and the backend loads it, in `dtype` on the backend's device."""
    with tempfile.TemporaryDirectory() as folder, random_parts(backend.device, backend.dtype, backend.dtype):
        plain_branch(backend, backend.dtype, META).save_config(Path(folder) / "controlnet")
        return nn.Module.to(backend.load_control(Path(folder) / "controlnet"), dtype=dtype)


def plain_branch(backend: Backend, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """Return the same as diffusers has it, by default on the backend's device."""
    backbone: Any = backend.backbone
    with made_on(device or backend.device, dtype):
        if backend.backbone_folder == "unet":
            return ControlNetModel.from_unet(backbone, load_weights_from_unet=False).eval()
        return FluxControlNetModel.from_transformer(
            backbone,
            num_layers=CONTROL_LAYERS,
            num_single_layers=0,
            attention_head_dim=backbone.config.attention_head_dim,
            num_attention_heads=backbone.config.num_attention_heads,
            load_weights_from_transformer=False,
        ).eval()


def plain_backbone(backend: Backend, dtype: torch.dtype) -> Any:
    """Return a backbone as diffusers has it."""
    kind: Any = type(backend.backbone)
    with made_on(backend.device, dtype):
        return kind.from_config(backend.backbone.config).requires_grad_(False).eval()


def embeddings(backend: Backend, policy: config.PolicySettings, count: int) -> Embeddings:
    """Return random text embeddings of `count` prompts."""
    settings: Any = backend.backbone.config
    if backend.backbone_folder == "unet":
        shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (77, settings.cross_attention_dim)}
    else:
        shapes = {"prompt_embeds": (policy.sampling.text_tokens, settings.joint_attention_dim)}
        shapes["pooled"] = (settings.pooled_projection_dim,)
    options: dict[str, Any] = {"device": backend.device, "dtype": backend.dtype}
    return {name: torch.randn((count, *shape), **options) for name, shape in shapes.items()}


def latent_shape(backend: Backend, size: int) -> tuple[int, int, int]:
    """Return (C, h, w) of the latent of an image of `size` pixels."""
    channels: int = backend.autoencoder.vae.config.latent_channels
    cells = size // backend.latent_factor
    return channels, cells, cells


class RandomPack:
    """The training pack of groups that nobody encoded."""

    def __init__(self, backend: Backend, size: int) -> None:
        self._latent = latent_shape(backend, size)
        self._control = torch.rand(3, size, size) if backend.control_factor == 1 else torch.randn(self._latent)

    def load(self, group_id: str, rollouts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return latents (K, C, h, w) and the control of a group, whose name is a number."""
        return torch.randn(len(rollouts), *self._latent), self._control + int(group_id) / 1000
