"""Diffusion backend: Stable Diffusion and kin, a UNet with a ControlNet, epsilon or v prediction.

A model folder is in diffusers' own layout: vae/, unet/, text_encoder/, tokenizer/, scheduler/.
"""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

from dp2osr.config import PolicySettings, SamplingSettings
from dp2osr.errors import UserError
from dp2osr.models import parts as model_parts
from dp2osr.models import tiling
from dp2osr.models.backend import PARTS, Embeddings, logit_normal, resolve
from dp2osr.models.parts import Autoencoder, State, freeze, load_backbone, load_part, place
from dp2osr.repeats import computed_once, once_an_image


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

    backbone_folder = "unet"
    control_factor = 1

    def __init__(
        self,
        policy: PolicySettings,
        *,
        device: torch.device,
        parts: frozenset[str] = PARTS,
        sharded: bool = False,
    ) -> None:
        folder = resolve(policy.model)
        self.device, self.sharded = device, sharded
        self.dtype = getattr(torch, policy.sampling.dtype)
        self.scheduler_config = model_parts.load_settings(DDPMScheduler, folder, "scheduler")
        self.noise_scheduler = DDPMScheduler.from_config(self.scheduler_config)
        self.noise_scheduler.alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(device)
        if "backbone" in parts:
            how: dict[str, Any] = {"device": device, "dtype": self.dtype, "sharded": sharded}
            self.backbone = self.unet = load_backbone(UNet2DConditionModel, folder, "unet", **how)
        if "vae" in parts:
            dtype = getattr(torch, policy.sampling.vae_dtype)
            self.autoencoder = Autoencoder(folder, device=device, dtype=dtype)
        if "text" in parts:
            self.tokenizer = load_part(CLIPTokenizer, folder, "tokenizer")
            self.text_encoder = freeze(load_part(CLIPTextModel, folder, "text_encoder"), device, self.dtype)
        self.latent_factor = model_parts.latent_factor(folder)
        unet = model_parts.load_settings(UNet2DConditionModel, folder, "unet")
        self.size_multiple = self.latent_factor * 2 ** (len(unet["block_out_channels"]) - 1)
        self.native_size = policy.native_size or self.latent_factor * (unet["sample_size"] or 64)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return scaled latents (B, C, h, w) float32: the mode of the VAE's posterior."""
        return self.autoencoder.encode(images)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images (B, 3, H, W) float32 in [0, 1]."""
        return self.autoencoder.decode(latents)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        """Return {"prompt_embeds": (P, L, D)}: the text encoder's last hidden state, as diffusers' pipelines use it."""
        tokens = model_parts.tokenize(self.tokenizer, prompts, self.tokenizer.model_max_length)
        return {"prompt_embeds": self.text_encoder(tokens.to(self.device))[0]}

    def prepare_control(self, images: torch.Tensor) -> torch.Tensor:
        """The conditioning embedding takes the upsampled LR image in [0, 1] as it is."""
        return images.to(self.device, self.dtype)

    def load_control(self, path: str | Path) -> ControlNetModel:
        """Load a folder with config.json, or a bare state dict onto `ControlNetModel.from_unet(unet)`."""
        branch = model_parts.load_branch(path, ControlNetModel, self._empty_control)
        if type(branch.controlnet_cond_embedding) is ControlNetConditioningEmbedding:
            branch.controlnet_cond_embedding.__class__ = SharedConditioning
        return place(branch, self.device, self.dtype).eval()

    def _empty_control(self, state: State) -> ControlNetModel:
        """Return a branch of the UNet's shape with the conditioning embedding that `state` holds."""
        blocks = model_parts.count_blocks(state, "controlnet_cond_embedding.blocks")
        names = ["conv_in", *(f"blocks.{number}" for number in range(1, blocks, 2))]  # each second block widens
        weights = [state.get(f"controlnet_cond_embedding.{name}.weight") for name in names]
        channels = tuple(len(weight) for weight in weights if weight is not None)
        options = {"conditioning_embedding_out_channels": channels} if channels else {}
        return ControlNetModel.from_unet(self.unet, load_weights_from_unet=False, **options)

    def checkpoint_gradients(self, branch: nn.Module) -> None:
        """Recompute activations of branch and backbone in the backward pass instead of keeping them."""
        modules: tuple[Any, ...] = (self.unet, branch)
        for module in modules:
            module.enable_gradient_checkpointing()

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
        cells = (control.shape[2] // self.latent_factor, control.shape[3] // self.latent_factor)
        scheduler = self.make_scheduler(sampling.scheduler)
        scheduler.set_timesteps(sampling.steps)  # on the CPU: a sampler reads them, and would wait for the GPU
        noise, generators = model_parts.draw_noise((self.unet.config.in_channels, *cells), seeds, self.dtype)
        latents = noise.to(self.device) * scheduler.init_noise_sigma
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        options: dict[str, Any] = {"generator": generators} if takes_generator else {}
        if sampling.guidance > 1:
            control = torch.cat([control] * 2)
            embeddings = {name: torch.cat([negative[name], tensor]) for name, tensor in embeddings.items()}
        at: dict[str, Any] = {"tile": tile, "overlap": overlap, "guidance": sampling.guidance}
        with self._embedded_once(branch, tiled=tiling.tiled(*cells, tile)):
            for timestep, moved in zip(scheduler.timesteps, scheduler.timesteps.to(self.device), strict=True):
                scaled = scheduler.scale_model_input(latents, timestep)
                prediction = self._guided(branch, scaled, moved, control, embeddings, **at)
                latents = scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
        return latents

    def _embedded_once(self, branch: nn.Module, *, tiled: bool) -> AbstractContextManager[None]:
        """Within it all steps share the first step's embedding of the control image, which is the same in each."""
        embedding = getattr(branch, "controlnet_cond_embedding", None)
        return nullcontext() if tiled or embedding is None else computed_once([embedding])

    def _guided(
        self,
        branch: nn.Module,
        noisy: torch.Tensor,
        timestep: torch.Tensor,
        control: torch.Tensor,
        embeddings: Embeddings,
        *,
        guidance: float,
        tile: int,
        overlap: int,
    ) -> torch.Tensor:
        """Classifier-free guidance where guidance > 1: n + g · (p - n), both halves in one batch.

        Of control and embeddings the first half is then the negative prompt's, the second the prompt's.
        """
        if guidance > 1:
            noisy = torch.cat([noisy] * 2)

        def window(rows: slice, columns: slice) -> torch.Tensor:
            factor = self.latent_factor
            pixels = (slice(s.start * factor, s.stop * factor) for s in (rows, columns))
            part = control[(slice(None), slice(None), *pixels)]
            return self.predict(branch, noisy[:, :, rows, columns], timestep, part, embeddings)

        prediction = tiling.blend(window, noisy.shape, tile=tile, overlap=overlap)
        if guidance <= 1:
            return prediction
        without, with_prompt = prediction.chunk(2)
        return without + guidance * (with_prompt - without)

    def draw_timesteps(self, count: int, generator: torch.Generator, density: str = "uniform") -> torch.Tensor:
        """Return `count` timesteps of the training schedule."""
        total = self.noise_scheduler.config.num_train_timesteps
        if density == "uniform":
            return torch.randint(0, total, (count,), generator=generator).to(self.device)
        return (logit_normal(count, generator) * total).long().to(self.device)

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

    def shared(self) -> AbstractContextManager[None]:
        """The UNet's way down and its middle: a branch's residuals are added after them."""
        modules = [self.unet.conv_in, *self.unet.down_blocks, self.unet.mid_block]
        return computed_once(module for module in modules if module is not None)

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
