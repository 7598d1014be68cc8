"""The networks of a model folder on torch's `meta` device: shapes and sizes from configurations alone, no weights.

`Footprint.backend` is the real backend with hollow networks: what it predicts has the right shape and no values.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, FluxControlNetModel, FluxTransformer2DModel, UNet2DConditionModel
from safetensors import safe_open
from torch import nn

import dp2osr
from dp2osr.config import PolicySettings
from dp2osr.errors import UserError
from dp2osr.models.backend import Backend, resolve
from dp2osr.models.parts import load_settings

META = torch.device("meta")
ARCHITECTURES = Path(dp2osr.__file__).parent / "assets" / "architectures"
FULL_SIZE = 500_000_000  # parameters of a backbone; a smaller one is not the paper's, and neither is its speed
CONTROL_LAYERS = 4  # double blocks of the paper's FLUX control branch; it has no single blocks

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Footprint:
    """A policy's networks, all on `meta`, the control branch trainable and in float32."""

    policy: PolicySettings
    backend: Backend
    backbone: Any
    branch: nn.Module
    vae: Any
    texts: list[Any]
    embeddings: Mapping[str, Shape]
    """Shape of a prompt's embeddings, by name."""
    control_shape: Callable[[int], Shape]
    """Shape of what the control branch takes of one image, by the image's side in pixels."""
    evaluations: int
    """Images of a candidate that pass through the networks at once in a step of sampling: 2 with guidance by two."""
    paper_seconds: float | None
    """Seconds of an A800 for a candidate of 512 px (the paper's), scaled to the policy's steps; None: unknown."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen networks."""
        return getattr(torch, self.policy.sampling.dtype)

    @property
    def vae_dtype(self) -> torch.dtype:
        """Of the VAE."""
        return getattr(torch, self.policy.sampling.vae_dtype)

    def latent_shape(self, size: int) -> Shape:
        """Return (C, h, w) of an image of `size` pixels."""
        cells = size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (self.vae.config.latent_channels, cells, cells)

    def embedding_bytes(self) -> int:
        """Return the bytes of one prompt's embeddings, on disk and in memory."""
        return sum(torch.Size(shape).numel() for shape in self.embeddings.values()) * self.dtype.itemsize

    def encoded_bytes(self, size: int, count: int, *, lr_bytes: float) -> float:
        """Return the bytes of a group in the training pack: `count` latents in float32, and the control.

        That is the LR image's file of `lr_bytes` where the control is an image, else latents in the networks' dtype.
        """
        latents = count * torch.Size(self.latent_shape(size)).numel() * torch.float32.itemsize
        if self.backend.control_factor == 1:
            return latents + lr_bytes
        return latents + torch.Size(self.control_shape(size)).numel() * self.dtype.itemsize

    def sizes(self) -> dict[str, int]:
        """Return how many parameters each part has."""
        parts = {"backbone": [self.backbone], "control branch": [self.branch], "VAE": [self.vae]}
        return {name: sum(map(parameters, found)) for name, found in (parts | {"text encoders": self.texts}).items()}

    def inputs(self, count: int, size: int, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return what `backend.predict` takes after the branch, of `count` images of `size` pixels."""
        shapes = {name: (count, *shape) for name, shape in self.embeddings.items()}
        embeddings = {name: torch.empty(shape, dtype=self.dtype, device=META) for name, shape in shapes.items()}
        noisy = torch.empty((count, *self.latent_shape(size)), dtype=dtype, device=META)
        control = torch.empty((count, *self.control_shape(size)), dtype=dtype, device=META)
        return noisy, torch.empty(count, device=META), control, embeddings


def parameters(module: nn.Module) -> int:
    """Return the number of a network's parameters, each once."""
    return sum(parameter.numel() for parameter in module.parameters())


def find(path: str) -> Path | None:
    """Return where a model or control branch lies, or None where it is not here."""
    try:
        return resolve(path)
    except UserError:
        return None


def architectures() -> list[str]:
    """Return the names of the packaged configurations."""
    return sorted(folder.name for folder in ARCHITECTURES.iterdir() if folder.is_dir())


def check_architecture(name: str) -> None:
    """Raise UserError where no packaged configuration has this name."""
    if name and name not in architectures():
        raise UserError(f"--architecture {name}: unknown; wanted one of {', '.join(architectures())}")


def load(policy: PolicySettings, *, architecture: str = "") -> Footprint:
    """Build the networks of a policy's model folder; where it is not here, those of a packaged `architecture`."""
    folder = find(policy.model) or (ARCHITECTURES / architecture if architecture else None)
    if folder is None:
        wanted = " or ".join(architectures())
        raise UserError(f"model {policy.model}: not found here; its sizes need --architecture {wanted}")
    if (folder / "unet").is_dir():
        return _diffusion(policy, folder)
    if (folder / "transformer").is_dir():
        return _flow(policy, folder)
    raise UserError(f"model {folder}: found neither unet/ nor transformer/, wanted diffusers' layout")


def build(kind: Any, folder: Path, part: str) -> Any:
    """Return the network of class `kind` that `folder`/`part`/config.json describes."""
    with META:
        return kind.from_config(load_settings(kind, folder, part))


def build_text(folder: Path, part: str) -> Any:
    """Return a text encoder of the class that its config.json names."""
    settings = transformers.AutoConfig.from_pretrained(folder / part, local_files_only=True)
    with META:
        return getattr(transformers, settings.architectures[0])(settings)


def _frozen(module: nn.Module, dtype: torch.dtype) -> Any:
    return nn.Module.to(module, dtype=dtype).requires_grad_(False).eval()


def _branch(control: str, kind: Any, empty: Callable[[Any], nn.Module], default: Callable[[], nn.Module]) -> nn.Module:
    """Return the control branch of a folder or a bare state dict; where neither is here, what the paper starts from."""
    path = find(control)
    with META, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers' control branch of FLUX on a module of its own
        if path is None:
            return default()
        if path.is_dir():
            return build(kind, path.parent, path.name)
        with safe_open(path, framework="pt") as handle:
            shapes = {name: handle.get_slice(name).get_shape() for name in handle.keys()}  # noqa: SIM118
        return empty({name: torch.empty(shape) for name, shape in shapes.items()})


def _seconds(backbone: nn.Module, seconds: float, *, share: float) -> float | None:
    return seconds * share if parameters(backbone) > FULL_SIZE else None


def _diffusion(policy: PolicySettings, folder: Path) -> Footprint:
    from dp2osr.models.sd import DiffusionBackend

    backend = DiffusionBackend.__new__(DiffusionBackend)
    backend.device, backend.dtype = META, getattr(torch, policy.sampling.dtype)
    backend.unet = _frozen(build(UNet2DConditionModel, folder, "unet"), backend.dtype)
    text = build_text(folder, "text_encoder")
    evaluations = 2 if policy.sampling.guidance > 1 else 1
    return Footprint(
        policy=policy,
        backend=backend,
        backbone=backend.unet,
        branch=_branch(
            policy.control, ControlNetModel, backend._empty_control, lambda: ControlNetModel.from_unet(backend.unet)
        ),
        vae=_frozen(build(AutoencoderKL, folder, "vae"), getattr(torch, policy.sampling.vae_dtype)),
        texts=[_frozen(text, backend.dtype)],
        embeddings={"prompt_embeds": (text.config.max_position_embeddings, text.config.hidden_size)},
        control_shape=lambda size: (3, size, size),
        evaluations=evaluations,
        paper_seconds=_seconds(backend.unet, 2.52, share=policy.sampling.steps * evaluations / (50 * 2)),
    )


def _flow(policy: PolicySettings, folder: Path) -> Footprint:
    from dp2osr.models.flux import FlowBackend

    backend = FlowBackend.__new__(FlowBackend)
    backend.device, backend.dtype = META, getattr(torch, policy.sampling.dtype)
    backend.guidance = policy.sampling.guidance
    backend.transformer = _frozen(build(FluxTransformer2DModel, folder, "transformer"), backend.dtype)
    clip, t5 = (build_text(folder, part) for part in ("text_encoder", "text_encoder_2"))
    vae = _frozen(build(AutoencoderKL, folder, "vae"), getattr(torch, policy.sampling.vae_dtype))
    factor = backend.control_factor = 2 ** (len(vae.config.block_out_channels) - 1)
    passes = 2 if policy.sampling.true_guidance > 1 else 1
    return Footprint(
        policy=policy,
        backend=backend,
        backbone=backend.transformer,
        branch=_branch(
            policy.control, FluxControlNetModel, backend._empty_control, lambda: _flow_branch(backend.transformer)
        ),
        vae=vae,
        texts=[_frozen(clip, backend.dtype), _frozen(t5, backend.dtype)],
        embeddings={
            "prompt_embeds": (policy.sampling.text_tokens, t5.config.d_model),
            "pooled": (clip.config.hidden_size,),
        },
        control_shape=lambda size: (vae.config.latent_channels, size // factor, size // factor),
        evaluations=1,  # true guidance predicts twice, one after the other
        paper_seconds=_seconds(backend.transformer, 6.48, share=policy.sampling.steps * passes / 25),
    )


def _flow_branch(transformer: Any) -> nn.Module:
    heads = {"attention_head_dim": transformer.config.attention_head_dim}
    heads["num_attention_heads"] = transformer.config.num_attention_heads
    return FluxControlNetModel.from_transformer(transformer, num_layers=CONTROL_LAYERS, num_single_layers=0, **heads)
