"""Diffusion backend: Stable Diffusion and kin, a UNet with a ControlNet, epsilon or v prediction.

A model folder is in diffusers' own layout: vae/, unet/, text_encoder/, tokenizer/, scheduler/.
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils.logging import disable_progress_bar

from dp2osr.config import PolicySettings, SamplingSettings
from dp2osr.errors import UserError
from dp2osr.models import tiling
from dp2osr.models.backend import PARTS, Embeddings, resolve
from dp2osr.repeats import once_an_image

Predict = Callable[[torch.Tensor], torch.Tensor]

disable_progress_bar()  # of weights that are loaded in a moment; logs are plain lines


def load_part(kind: Any, folder: Path, part: str, **options: Any) -> Any:
    """Load one folder of a model; raises UserError that names it."""
    try:
        found = kind.from_pretrained(folder / part, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"model {folder / part}: cannot be loaded ({first}); wanted diffusers' layout") from None
    if isinstance(found, diffusers.ModelMixin):
        found.register_to_config(_name_or_path="")  # or what is saved later would tell where this lay
    return found


class SharedConditioning(ControlNetConditioningEmbedding):
    """diffusers' embedding of the control image, computed once for neighbours in the batch that share theirs.

    In training and rollouts the candidates of a group stand side by side; embedding the image for each was a fifth of
    the tiny model's forward pass. A class, for a function put into the module would not survive its deep copy.
    """

    def forward(self, conditioning: torch.Tensor) -> torch.Tensor:
        """Embed (B, 3, H, W); returns (B, channels, h, w)."""
        return once_an_image(super().forward)(conditioning)


class DiffusionBackend:
    """Frozen UNet, VAE and text encoder of one model folder; see `Backend` for shapes and ranges."""

    def __init__(self, policy: PolicySettings, *, device: torch.device, parts: frozenset[str] = PARTS) -> None:
        folder = resolve(policy.model)
        self.device = device
        self.dtype = getattr(torch, policy.sampling.dtype)
        self.vae_dtype = getattr(torch, policy.sampling.vae_dtype)
        self.scheduler_config = dict(load_part(DDPMScheduler, folder, "scheduler").config)
        self.noise_scheduler = DDPMScheduler.from_config(self.scheduler_config)
        self.noise_scheduler.alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(device)
        if "backbone" in parts:
            self.unet = self._freeze(load_part(UNet2DConditionModel, folder, "unet"), self.dtype)
        if "vae" in parts:
            self.vae = self._freeze(load_part(AutoencoderKL, folder, "vae"), self.vae_dtype)
        if "text" in parts:
            self.tokenizer = load_part(CLIPTokenizer, folder, "tokenizer")
            self.text_encoder = self._freeze(load_part(CLIPTextModel, folder, "text_encoder"), self.dtype)
        stages = len(AutoencoderKL.load_config(folder / "vae")["block_out_channels"])
        self.latent_factor = 2 ** (stages - 1)
        unet = UNet2DConditionModel.load_config(folder / "unet")
        self.size_multiple = self.latent_factor * 2 ** (len(unet["block_out_channels"]) - 1)
        self.native_size = self.latent_factor * (unet["sample_size"] or 64)

    def _freeze(self, module: nn.Module, dtype: torch.dtype) -> Any:
        return self._place(module, dtype).requires_grad_(False).eval()

    def _place(self, module: nn.Module, dtype: torch.dtype) -> Any:
        """Cast and move; diffusers' own `to(dtype)` warns of modules to keep in float32 where a class has none."""
        return nn.Module.to(module, self.device, dtype).to(memory_format=torch.channels_last)

    @torch.no_grad()
    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return scaled latents (B, C, h, w) float32: the mode of the VAE's posterior."""
        posterior = self.vae.encode((images.to(self.device) * 2 - 1).to(self.vae_dtype)).latent_dist
        shift = self.vae.config.shift_factor or 0.0
        return ((posterior.mode() - shift) * self.vae.config.scaling_factor).float()

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images (B, 3, H, W) float32 in [0, 1]."""
        shift = self.vae.config.shift_factor or 0.0
        latents = latents.to(self.device, self.vae_dtype) / self.vae.config.scaling_factor + shift
        return (self.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        """Return {"prompt_embeds": (P, L, D)}: the text encoder's last hidden state, as diffusers' pipelines use it."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {"prompt_embeds": self.text_encoder(tokens.input_ids.to(self.device))[0]}

    def prepare_control(self, images: torch.Tensor) -> torch.Tensor:
        """The conditioning embedding takes the upsampled LR image in [0, 1] as it is."""
        return images.to(self.device, self.dtype)

    def load_control(self, path: str | Path) -> ControlNetModel:
        """Load a folder with config.json, or a bare state dict onto `ControlNetModel.from_unet(unet)`."""
        found = resolve(path)
        if found.is_dir():
            branch = load_part(ControlNetModel, found.parent, found.name)
        else:
            branch = ControlNetModel.from_unet(self.unet)
            missing, unexpected = branch.load_state_dict(load_file(found), strict=False)
            if missing or unexpected:
                name = (missing or unexpected)[0]
                raise UserError(f"control weights {path}: '{name}' does not fit the control branch of this UNet")
        if type(branch.controlnet_cond_embedding) is ControlNetConditioningEmbedding:
            branch.controlnet_cond_embedding.__class__ = SharedConditioning
        return self._place(branch, self.dtype).eval()

    def save_control(self, branch: nn.Module, folder: Path) -> None:
        """Write a control branch in diffusers' layout, loadable by StableDiffusionControlNetPipeline."""
        assert isinstance(branch, ControlNetModel)
        branch.save_pretrained(folder)

    def make_scheduler(self, name: str) -> Any:
        """Return a fresh sampler: the diffusers scheduler class `name` on the model's own noise schedule."""
        kind = getattr(diffusers, name, None)
        if kind is None or not hasattr(kind, "from_config"):
            raise UserError(f"config: sampling.scheduler: found '{name}', wanted a scheduler class of diffusers")
        return kind.from_config(self.scheduler_config)

    @torch.no_grad()
    def sample(
        self,
        branch: nn.Module,
        control: torch.Tensor,
        embeddings: Embeddings,
        negative: Embeddings,
        seeds: Sequence[int],
        sampling: SamplingSettings,
        *,
        tile: int = 0,
        overlap: int = 0,
    ) -> torch.Tensor:
        """Denoise one candidate a seed; the noise of a candidate does not depend on its batch."""
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        cells = (control.shape[2] // self.latent_factor, control.shape[3] // self.latent_factor)
        shape = (1, self.unet.config.in_channels, *cells)
        scheduler = self.make_scheduler(sampling.scheduler)
        scheduler.set_timesteps(sampling.steps, device=self.device)
        noise = [torch.randn(shape, generator=generator, dtype=self.dtype) for generator in generators]
        latents = torch.cat(noise).to(self.device) * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {"generator": generators} if takes_generator else {}
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep)
            prediction = self._guided(branch, scaled, timestep, control, embeddings, negative, sampling, tile, overlap)
            latents = scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
        return latents

    def _guided(
        self,
        branch: nn.Module,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        control: torch.Tensor,
        embeddings: Embeddings,
        negative: Embeddings,
        sampling: SamplingSettings,
        tile: int,
        overlap: int,
    ) -> torch.Tensor:
        """Classifier-free guidance where guidance > 1: n + g · (p - n), both halves in one batch."""
        guided = sampling.guidance > 1
        if guided:
            noisy, control = torch.cat([noisy] * 2), torch.cat([control] * 2)
            embeddings = {name: torch.cat([negative[name], tensor]) for name, tensor in embeddings.items()}

        def window(rows: slice, columns: slice) -> torch.Tensor:
            factor = self.latent_factor
            pixels = (slice(s.start * factor, s.stop * factor) for s in (rows, columns))
            part = control[(slice(None), slice(None), *pixels)]
            return self.predict(branch, noisy[:, :, rows, columns], timestep, part, embeddings)

        prediction = tiling.blend(window, noisy.shape, tile=tile, overlap=overlap)
        if not guided:
            return prediction
        without, with_prompt = prediction.chunk(2)
        return without + sampling.guidance * (with_prompt - without)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Return `count` timesteps, uniform over the training schedule."""
        total = self.noise_scheduler.config.num_train_timesteps
        return torch.randint(0, total, (count,), generator=generator).to(self.device)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = α_t x_0 + σ_t ε, α² + σ² = 1."""
        return self.noise_scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return ε or v, as the scheduler's prediction_type says."""
        kind = self.noise_scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "v_prediction":
            return self.noise_scheduler.get_velocity(latents, noise, timesteps)
        raise UserError(f"scheduler: prediction_type: found '{kind}', wanted epsilon or v_prediction")

    def predict(
        self,
        branch: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        control: torch.Tensor,
        embeddings: Embeddings,
    ) -> torch.Tensor:
        """Return the UNet's prediction under the residuals of `branch`."""
        text = embeddings["prompt_embeds"].to(self.dtype)
        down, middle = branch(noisy, timesteps, encoder_hidden_states=text, controlnet_cond=control, return_dict=False)
        return self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]
