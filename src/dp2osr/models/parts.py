"""What both backends do alike with a model in diffusers' layout: load, freeze, encode, decode, draw noise."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils.logging import disable_progress_bar

from dp2osr.errors import UserError
from dp2osr.models import sharding
from dp2osr.models.backend import resolve
from dp2osr.repeats import once_an_image

State = Mapping[str, torch.Tensor]

# Decoded at once, four images of 512 px: they fill a GPU, and a whole batch would take the most memory of a rollout
DECODED_PIXELS = 2**20

disable_progress_bar()  # of weights that are loaded in a moment; logs are plain lines


def load_part(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    """Load one folder of a model; raises UserError that names it."""
    try:
        found = kind.from_pretrained(folder / part, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model {folder / part}: cannot be loaded ({first}); wanted diffusers' layout") from None
    if isinstance(found, diffusers.ModelMixin):
        found.register_to_config(_name_or_path="")  # or what is saved later would tell where this lay
    return found


def load_settings(kind: Any, folder: Path, part: str) -> dict[str, Any]:
    """Return the settings file of one folder of a model as it is; raises UserError that names it."""
    try:
        return dict(kind.load_config(folder / part, local_files_only=True))
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model {folder / part}: no readable settings ({first}); wanted diffusers' layout") from None


def load_branch(path: str | Path, kind: Any, build: Callable[[State], nn.Module]) -> Any:
    """Load a control branch: a folder with config.json, or a bare safetensors state dict onto what `build` makes of it.

    Raises UserError that names a weight which the backbone's control branch lacks, or which is missing in the file.
    """
    found = resolve(path)
    if found.is_dir():
        return load_part(kind, found.parent, found.name)
    try:
        state = load_file(found)
    except SafetensorError as error:
        raise UserError(f"control weights {path}: no readable safetensors file ({error})") from None
    branch = build(state)
    wanted = branch.state_dict()
    if odd := sorted(wanted.keys() ^ state.keys()):
        kinds = "is missing" if odd[0] in wanted else "is no part"
        raise UserError(f"control weights {path}: '{odd[0]}' {kinds} of the control branch of this backbone")
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"control weights {path}: '{name}' has shape {tuple(tensor.shape)}, wanted {tuple(wanted[name].shape)}"
            )
    branch.load_state_dict(state)
    return branch


def count_blocks(state: State, prefix: str) -> int:
    """Return how many blocks `prefix`.0, `prefix`.1 … a state dict holds."""
    return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in state if name.startswith(f"{prefix}.")})


def place(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Cast and move; diffusers' own `to(dtype)` warns of modules to keep in float32 where a class has none."""
    return nn.Module.to(module, device, dtype).to(memory_format=torch.channels_last)


def freeze(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Any:
    """Cast, move, and switch off gradients and whatever behaves otherwise in training."""
    return place(module, device, dtype).requires_grad_(False).eval()


def load_backbone(
    kind: Any, folder: Path, part: str, *, device: torch.device, dtype: torch.dtype, sharded: bool
) -> Any:
    """Load and freeze a UNet or transformer; `sharded`, this process keeps its share alone (models/sharding.py)."""
    # without a dtype diffusers makes float32 of it, 48 GB for FLUX; in the file's own it is the file's pages
    loaded = load_part(kind, folder, part, torch_dtype=dtype)
    if not sharded:
        return freeze(loaded, device, dtype)
    return sharding.shard(nn.Module.to(loaded, dtype).requires_grad_(False).eval(), device)


class Autoencoder:
    """The VAE of a model folder, between images in [0, 1] and scaled latents."""

    def __init__(self, folder: Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self.vae = freeze(load_part(AutoencoderKL, folder, "vae"), device, dtype)
        self.device, self.dtype = device, dtype

    @property
    def shift(self) -> float:
        """What is taken from a latent before it is scaled."""
        return float(self.vae.config.shift_factor or 0.0)

    @property
    def scale(self) -> float:
        """The factor that gives latents unit variance."""
        return float(self.vae.config.scaling_factor)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Return latents (B, C, h, w) float32 of (B, 3, H, W): the mode of the posterior, once for equal neighbours."""
        return once_an_image(self._encode)(images.to(self.device))

    def _encode(self, images: torch.Tensor) -> torch.Tensor:
        posterior = self.vae.encode((images * 2 - 1).to(self.dtype)).latent_dist
        return ((posterior.mode() - self.shift) * self.scale).float()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images (B, 3, H, W) float32, clamped to [0, 1]."""
        latents = latents.to(self.device, self.dtype) / self.scale + self.shift
        factor = _factor(self.vae.config.block_out_channels)
        pieces = latents.split(decoded_at_once(latents.shape[2] * latents.shape[3] * factor**2))
        return torch.cat([(self.vae.decode(piece).sample.float() / 2 + 0.5).clamp(0, 1) for piece in pieces])


def decoded_at_once(pixels: int) -> int:
    """Return how many images of so many pixels the VAE decodes at once."""
    return max(1, DECODED_PIXELS // pixels)


def _factor(channels: Sequence[int]) -> int:
    return int(2 ** (len(channels) - 1))


def latent_factor(folder: Path) -> int:
    """Return the pixels per latent cell along each side of a model folder's VAE."""
    return _factor(load_settings(AutoencoderKL, folder, "vae")["block_out_channels"])


def draw_noise(
    shape: tuple[int, ...], seeds: Sequence[int], dtype: torch.dtype
) -> tuple[torch.Tensor, list[torch.Generator]]:
    """Return noise (B, *shape) on the CPU, each row from a generator of its own, and the generators for more of it."""
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    rows = [torch.randn((1, *shape), generator=generator, dtype=dtype) for generator in generators]
    return torch.cat(rows), generators


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> torch.Tensor:
    """Return token ids (P, length), padded and cut."""
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids
