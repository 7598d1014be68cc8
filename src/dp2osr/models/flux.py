"""Flow backend: FLUX.1 with a FluxControlNet, flow matching, embedded guidance.

A model folder is in diffusers' own layout: vae/, transformer/, text_encoder/ (CLIP), text_encoder_2/ (T5), tokenizer/,
tokenizer_2/, scheduler/. Outside of the transformer latents are (B, C, h, w); a token of it is a patch of 2 x 2 cells.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from dp2osr.config import PolicySettings, SamplingSettings
from dp2osr.errors import UserError
from dp2osr.models import parts as model_parts
from dp2osr.models import tiling
from dp2osr.models.backend import PARTS, Embeddings, logit_normal, resolve
from dp2osr.models.parts import Autoencoder, State, freeze, load_backbone, load_part, place

PATCH = 2  # latent cells along each side of a token
CONTROL_SIZE = 512  # pixels: the images that C-FLUX was trained on (method.md, LR synthesis)


class FlowBackend:
    """Frozen transformer, VAE and text encoders of one model folder; see `Backend` for shapes and ranges.

    Timesteps are t in (0, 1], x_t = (1 - t) x_0 + t ε. The embedded guidance is the policy's own in sampling and in
    training, so that the model which is tuned is the one that is sampled.
    """

    backbone_folder = "transformer"

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
        self.guidance = policy.sampling.guidance
        self.text_tokens = policy.sampling.text_tokens
        self.scheduler_config = model_parts.load_settings(FlowMatchEulerDiscreteScheduler, folder, "scheduler")
        if "backbone" in parts:
            how: dict[str, Any] = {"device": device, "dtype": self.dtype, "sharded": sharded}
            self.backbone = self.transformer = load_backbone(FluxTransformer2DModel, folder, "transformer", **how)
        if "vae" in parts:
            dtype = getattr(torch, policy.sampling.vae_dtype)
            self.autoencoder = Autoencoder(folder, device=device, dtype=dtype)
        if "text" in parts:
            self.tokenizer = load_part(CLIPTokenizer, folder, "tokenizer")
            self.text_encoder = freeze(load_part(CLIPTextModel, folder, "text_encoder"), device, self.dtype)
            self.tokenizer_2 = load_part(T5TokenizerFast, folder, "tokenizer_2")
            self.text_encoder_2 = freeze(load_part(T5EncoderModel, folder, "text_encoder_2"), device, self.dtype)
        self.latent_factor = self.control_factor = model_parts.latent_factor(folder)
        self.size_multiple = self.latent_factor * PATCH
        self.native_size = policy.native_size or CONTROL_SIZE

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        """Return scaled latents (B, C, h, w) float32: the mode of the VAE's posterior."""
        return self.autoencoder.encode(images)

    def decode_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Return images (B, 3, H, W) float32 in [0, 1]."""
        return self.autoencoder.decode(latents)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Embeddings:
        """Return {"prompt_embeds": (P, L, D) of T5, "pooled": (P, E) of CLIP}, as diffusers' FluxPipeline has them."""
        clip = model_parts.tokenize(self.tokenizer, prompts, self.tokenizer.model_max_length)
        t5 = model_parts.tokenize(self.tokenizer_2, prompts, self.text_tokens)
        pooled = self.text_encoder(clip.to(self.device)).pooler_output
        return {"prompt_embeds": self.text_encoder_2(t5.to(self.device))[0], "pooled": pooled}

    def prepare_control(self, images: torch.Tensor) -> torch.Tensor:
        """Return the latents (B, C, h, w) of the upsampled LR image: the mode, where diffusers' pipeline draws."""
        return self.autoencoder.encode(images).to(self.dtype)

    def load_control(self, path: str | Path) -> FluxControlNetModel:
        """Load a folder with config.json, or a bare state dict onto `FluxControlNetModel.from_transformer`."""
        branch = model_parts.load_branch(path, FluxControlNetModel, self._empty_control)
        return place(branch, self.device, self.dtype).eval()

    def _empty_control(self, state: State) -> FluxControlNetModel:
        """Return a branch of the transformer's shape with as many double and single blocks as `state` holds."""
        return FluxControlNetModel.from_transformer(
            self.transformer,
            num_layers=model_parts.count_blocks(state, "transformer_blocks"),
            num_single_layers=model_parts.count_blocks(state, "single_transformer_blocks"),
            attention_head_dim=self.transformer.config.attention_head_dim,
            num_attention_heads=self.transformer.config.num_attention_heads,
            load_weights_from_transformer=False,
        )

    def save_control(self, branch: nn.Module, folder: Path) -> None:
        """Write a control branch in diffusers' layout, loadable by FluxControlNetPipeline."""
        assert isinstance(branch, FluxControlNetModel)
        branch.save_pretrained(folder, max_shard_size="100GB")

    def checkpoint_gradients(self, branch: nn.Module) -> None:
        """Recompute activations of branch and backbone in the backward pass instead of keeping them."""
        modules: tuple[Any, ...] = (self.transformer, branch)
        for module in modules:
            module.enable_gradient_checkpointing()

    def make_scheduler(self, name: str, *, steps: int, tokens: int) -> Any:
        """Return a fresh sampler of `steps` steps, its timesteps shifted for images of `tokens` tokens."""
        kind = getattr(diffusers, name, None)
        if kind is None or not hasattr(kind, "from_config") or not name.startswith("FlowMatch"):
            raise UserError(f"config: sampling.scheduler: found '{name}', wanted a FlowMatch scheduler of diffusers")
        scheduler = kind.from_config(self.scheduler_config)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        found = [scheduler.config.get(name) for name in names]
        mu = None if None in found else calculate_shift(tokens, *found)
        try:
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=self.device, mu=mu)
        except TypeError:
            raise UserError(f"config: sampling.scheduler: {name} takes no sigmas of its own; wanted another") from None
        return scheduler

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
        noise, _ = model_parts.draw_noise(tuple(control.shape[1:]), seeds, self.dtype)
        latents = noise.to(self.device)
        height, width = (min(side, tile) if tile else side for side in control.shape[2:])
        tokens = (height // PATCH) * (width // PATCH)
        scheduler = self.make_scheduler(sampling.scheduler, steps=sampling.steps, tokens=tokens)
        for timestep in scheduler.timesteps:
            share = timestep.expand(len(latents)).to(self.dtype) / scheduler.config.num_train_timesteps
            predict = self._guided(branch, latents, share, control, embeddings, negative, sampling.true_guidance)
            velocity = tiling.blend(predict, latents.shape, tile=tile, overlap=overlap)
            latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        return latents

    def _guided(
        self,
        branch: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        control: torch.Tensor,
        embeddings: Embeddings,
        negative: Embeddings,
        guidance: float,
    ) -> Callable[[slice, slice], torch.Tensor]:
        """Return the function that predicts a window of latent cells, with classifier-free guidance where it is > 1.

        Both halves of it stand under the residuals of the prompted one, as in diffusers' pipeline.
        """

        def window(rows: slice, columns: slice) -> torch.Tensor:
            part = noisy[:, :, rows, columns]
            tokens, ids = self._tokens(part, embeddings)
            residuals = self._residuals(branch, tokens, timesteps, control[:, :, rows, columns], embeddings, ids)
            velocity = self._velocity(tokens, timesteps, embeddings, ids, residuals)
            if guidance > 1:
                without = self._velocity(tokens, timesteps, negative, ids, residuals)
                velocity = without + guidance * (velocity - without)
            return unpack(velocity, part.shape)

        return window

    def draw_timesteps(self, count: int, generator: torch.Generator, density: str = "uniform") -> torch.Tensor:
        """Return `count` times t in (0, 1]."""
        if density == "uniform":
            return (1 - torch.rand(count, generator=generator)).to(self.device)
        return logit_normal(count, generator).to(self.device)

    def add_noise(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x_t = (1 - t) x_0 + t ε."""
        t = timesteps[:, None, None, None]
        return (1 - t) * latents + t * noise

    def target(self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Return the velocity ε - x_0."""
        return noise - latents

    def shared(self) -> AbstractContextManager[None]:
        """Nothing that is worth it: residuals are added after the first block of 57, and all others depend on them."""
        return nullcontext()

    def predict(
        self,
        branch: nn.Module,
        noisy: torch.Tensor,
        timesteps: torch.Tensor,
        control: torch.Tensor,
        embeddings: Embeddings,
    ) -> torch.Tensor:
        """Return the transformer's velocity (B, C, h, w) under the residuals of `branch`."""
        tokens, ids = self._tokens(noisy, embeddings)
        residuals = self._residuals(branch, tokens, timesteps, control, embeddings, ids)
        return unpack(self._velocity(tokens, timesteps, embeddings, ids, residuals), noisy.shape)

    def _tokens(self, noisy: torch.Tensor, embeddings: Embeddings) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the image's tokens (B, S, 4C) and the positions of text and image, each (length, 3)."""
        rows, columns = (torch.arange(side // PATCH, device=noisy.device) for side in noisy.shape[2:])
        places = torch.stack([*torch.meshgrid(rows, columns, indexing="ij")], dim=-1).flatten(0, 1)
        text = noisy.new_zeros(embeddings["prompt_embeds"].shape[1], 3)
        image = torch.cat([torch.zeros_like(places[:, :1]), places], dim=1)
        return pack(noisy), {"txt_ids": text, "img_ids": image.to(noisy.dtype)}

    def _conditions(
        self, module: Any, timesteps: torch.Tensor, embeddings: Embeddings, ids: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Return what branch and transformer take alike."""
        guided = bool(module.config.guidance_embeds)
        return {
            "timestep": timesteps,
            "guidance": torch.full(timesteps.shape, self.guidance, device=self.device) if guided else None,
            "pooled_projections": embeddings["pooled"].to(self.dtype),
            "encoder_hidden_states": embeddings["prompt_embeds"].to(self.dtype),
            **ids,
            "return_dict": False,
        }

    def _residuals(
        self,
        branch: nn.Module,
        tokens: torch.Tensor,
        timesteps: torch.Tensor,
        control: torch.Tensor,
        embeddings: Embeddings,
        ids: Mapping[str, torch.Tensor],
    ) -> dict[str, Any]:
        conditions = self._conditions(branch, timesteps, embeddings, ids)
        double, single = branch(hidden_states=tokens, controlnet_cond=pack(control), **conditions)
        return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}

    def _velocity(
        self,
        tokens: torch.Tensor,
        timesteps: torch.Tensor,
        embeddings: Embeddings,
        ids: Mapping[str, torch.Tensor],
        residuals: Mapping[str, Any],
    ) -> torch.Tensor:
        conditions = self._conditions(self.transformer, timesteps, embeddings, ids)
        found: torch.Tensor = self.transformer(hidden_states=tokens, **conditions, **residuals)[0]
        return found


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return tokens (B, h/2 · w/2, 4C) of latents (B, C, h, w): row by row, a channel's four cells together."""
    batch, channels, height, width = latents.shape
    cells = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PATCH * PATCH)


def unpack(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Return latents of `shape` (B, C, h, w) from their tokens."""
    batch, channels, height, width = shape
    cells = tokens.reshape(batch, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(shape)
