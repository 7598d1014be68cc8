"""diffusers' own pipelines on the tiny models, one image and one seed at a time, and settings that both ways take."""

from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.nn import functional
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from dp2osr.config import PolicySettings
from dp2osr.models.parts import draw_noise
from training_rig import DEFAULTS

SIZE, SEEDS = 32, (11, 12, 13)
PROMPTS = ["a grey cat", "", "leaves, stone wall"]
NEGATIVE = "dotted, noise, blur, lowres, smooth"


def policy(model: Path, backend: str, **sampling: Any) -> PolicySettings:
    base = DEFAULTS["policy_defaults"]
    control = {"backend": backend, "model": str(model), "control": str(model / "controlnet"), "native_size": SIZE}
    return PolicySettings(**{**base, **control, "sampling": base["sampling"] | sampling})


def controls(count: int) -> torch.Tensor:
    coarse = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1)


def sd_pipeline(settings: PolicySettings, control: Any) -> Any:
    """Return diffusers' pipeline, made of what lies in the folder and a control branch that it loads itself."""
    folder = Path(settings.model)
    start = diffusers.DDPMScheduler.from_pretrained(folder / "scheduler")
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
        controlnet=diffusers.ControlNetModel.from_pretrained(control),
        scheduler=getattr(diffusers, settings.sampling.scheduler).from_config(start.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs_sd(settings: PolicySettings, row: int, control: Path) -> torch.Tensor:
    images: torch.Tensor = sd_pipeline(settings, control)(
        prompt=PROMPTS[row],
        negative_prompt=settings.sampling.negative_prompt,
        image=controls(len(SEEDS))[row : row + 1],
        num_inference_steps=settings.sampling.steps,
        guidance_scale=settings.sampling.guidance,
        generator=torch.Generator().manual_seed(SEEDS[row]),
        output_type="pt",
    ).images
    return images


def flux_pipeline(settings: PolicySettings, control: Any) -> Any:
    """Return diffusers' pipeline; it draws the control's latents where we take the mode: its VAE gets no spread."""
    folder = Path(settings.model)
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        half = vae.config.latent_channels
        vae.encoder.conv_out.weight[half:] = 0
        vae.encoder.conv_out.bias[half:] = -30
    pipeline = diffusers.FluxControlNetPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        transformer=diffusers.FluxTransformer2DModel.from_pretrained(folder / "transformer"),
        controlnet=diffusers.FluxControlNetModel.from_pretrained(control),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs_flux(settings: PolicySettings, row: int, control: Path) -> torch.Tensor:
    """Return diffusers' image; its control image is in [-1, 1], and its initial noise is given in tokens."""
    pipeline = flux_pipeline(settings, control)
    cells = SIZE // pipeline.vae_scale_factor
    noise, _ = draw_noise((pipeline.vae.config.latent_channels, cells, cells), [SEEDS[row]], torch.float32)
    guided = settings.sampling.true_guidance > 1
    images: torch.Tensor = pipeline(
        prompt=PROMPTS[row],
        negative_prompt=settings.sampling.negative_prompt if guided else None,
        true_cfg_scale=settings.sampling.true_guidance,
        control_image=controls(len(SEEDS))[row : row + 1] * 2 - 1,
        height=SIZE,
        width=SIZE,
        num_inference_steps=settings.sampling.steps,
        guidance_scale=settings.sampling.guidance,
        latents=pipeline._pack_latents(noise, 1, noise.shape[1], cells, cells),
        max_sequence_length=settings.sampling.text_tokens,
        output_type="pt",
    ).images
    return images


SD_SAMPLERS = {
    "ddpm": {"scheduler": "DDPMScheduler", "steps": 50, "guidance": 3.5},  # the authors' test code
    "ddim": {"scheduler": "DDIMScheduler", "steps": 10, "guidance": 3.5},
    "unipc": {"scheduler": "UniPCMultistepScheduler", "steps": 8, "guidance": 2.0},
    "dpm++": {"scheduler": "DPMSolverMultistepScheduler", "steps": 8, "guidance": 1.0},
    "euler ancestral": {"scheduler": "EulerAncestralDiscreteScheduler", "steps": 8, "guidance": 3.5},
}
FLUX_SAMPLERS = {
    "flux.1-dev": {"steps": 25, "guidance": 2.5, "text_tokens": 512},
    "true guidance": {"steps": 8, "guidance": 2.5, "true_guidance": 3.0, "text_tokens": 32},
}
