"""Builds the tiny SD-style model in diffusers' own layout: networks, byte-level tokenizer, scheduler.

`write` builds either backend's model; what FLUX has of its own is in build_flux.py.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dp2osr.config import ArchitectureSettings

MAX_TOKENS = 24


def write(folder: Path, settings: ArchitectureSettings, *, backend: str, size: int) -> None:
    """Write an untrained model of `backend` to `folder`, its control branch in controlnet/, from torch's own seed.

    size: side in pixels of the images that it is to be trained on.
    """
    cells = size // 2 ** (len(settings.vae_channels) - 1)
    parts: dict[str, Any] = {"tokenizer": tokenizer(), "text_encoder": text_encoder(settings), "vae": vae(settings)}
    if backend == "sd":
        parts["unet"] = unet(settings, sample_size=cells)
        parts["scheduler"] = scheduler(settings)
    else:
        from dp2osr.models import build_flux

        parts["transformer"] = build_flux.transformer(settings)
        parts["scheduler"] = build_flux.scheduler(tokens=(cells // 2) ** 2)
        parts["tokenizer_2"] = build_flux.t5_tokenizer(length=MAX_TOKENS)
        parts["text_encoder_2"] = build_flux.t5_encoder(settings)
    parts["controlnet"] = new_control(parts.get("unet") or parts["transformer"], settings)
    for name, part in parts.items():
        part.save_pretrained(folder / name)


def new_control(backbone: nn.Module, settings: ArchitectureSettings) -> nn.Module:
    """Return an untrained control branch for a given UNet or transformer."""
    if isinstance(backbone, UNet2DConditionModel):
        return control(backbone, settings)
    from dp2osr.models import build_flux

    assert isinstance(backbone, build_flux.FluxTransformer2DModel)
    return build_flux.control(backbone, settings)


def vae(settings: ArchitectureSettings) -> AutoencoderKL:
    """Return a VAE that halves the image once per entry of `vae_channels` after the first.

    Its posterior starts narrow (log variance -6), so that the decoder sees all of the latents from the first step, and
    its first three latents start as the colours of a smaller image: a small VAE that starts at random learns to restore
    luma alone and stays there.
    """
    stages = len(settings.vae_channels)
    model = AutoencoderKL(
        block_out_channels=tuple(settings.vae_channels),
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=1,  # groups of few channels would lose their mean and contrast
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        model.quant_conv.bias[settings.latent_channels :] = -6.0
        _carry_colours(model)
    return model


# Orthonormal colour axes: luma, red against blue, green against magenta; the last two vary less and are amplified.
COLOUR_AXES = torch.tensor([[1.0, 1, 1], [1, 0, -1], [-1, 2, -1]]) / torch.tensor([[3.0], [2], [6]]).sqrt()
COLOUR_GAINS = torch.tensor([1.0, 3.0, 3.0])


def _carry_colours(model: AutoencoderKL) -> None:
    """Let residual branches start at zero and six channels carry the colours, each as itself and as its negative.

    The encoder averages them down to three latents and the decoder repeats them up again. As silu(x) - silu(-x) = x,
    the last activation of either leaves them as they are, up to the contrast that its normalisation divides by.
    """
    identity = torch.eye(3)
    signs = torch.cat([identity, -identity])
    for part in model.modules():
        if isinstance(part, ResnetBlock2D):
            nn.init.zeros_(part.conv2.weight)
            nn.init.zeros_(part.conv2.bias)
            if part.conv_shortcut is not None:
                _set_taps(part.conv_shortcut, torch.eye(6))
        elif isinstance(part, Downsample2D):  # pads below and on the right: its first taps are the cell to average
            _set_taps(part.conv, torch.eye(6) / 4, cell=slice(0, 2))
        elif isinstance(part, Upsample2D):
            _set_taps(part.conv, torch.eye(6))
    _set_taps(model.encoder.conv_in, signs @ torch.diag(COLOUR_GAINS) @ COLOUR_AXES)
    _set_taps(model.encoder.conv_out, signs.T)
    _set_taps(model.quant_conv, identity)
    _set_taps(model.post_quant_conv, identity)
    _set_taps(model.decoder.conv_in, signs)
    _set_taps(model.decoder.conv_out, COLOUR_AXES.T @ torch.diag(1 / COLOUR_GAINS) @ signs.T)


def _set_taps(convolution: nn.Conv2d, matrix: torch.Tensor, cell: slice | None = None) -> None:
    """Let the first outputs be `matrix` (outputs, inputs) of the first inputs, at the centre or the taps of `cell`."""
    outputs, inputs = matrix.shape
    middle = convolution.kernel_size[0] // 2
    taps = cell or slice(middle, middle + 1)
    convolution.weight[:outputs] = 0
    convolution.weight[:outputs, :inputs, taps, taps] = matrix[:, :, None, None]
    if convolution.bias is not None:
        convolution.bias[:outputs] = 0


def unet(settings: ArchitectureSettings, *, sample_size: int) -> UNet2DConditionModel:
    """Return a UNet whose attention, to itself and to the text, is in the middle block.

    sample_size: side in latent cells of the images that it is trained on; larger ones are tiled by it.
    """
    stages = len(settings.unet_channels)
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=settings.latent_channels,
        out_channels=settings.latent_channels,
        block_out_channels=tuple(settings.unet_channels),
        down_block_types=("DownBlock2D",) * stages,
        up_block_types=("UpBlock2D",) * stages,
        layers_per_block=settings.layers_per_block,
        cross_attention_dim=settings.text_width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def control(backbone: UNet2DConditionModel, settings: ArchitectureSettings) -> ControlNetModel:
    """Return a control branch that starts as a copy of the UNet's encoder, its outputs at zero."""
    return ControlNetModel.from_unet(
        backbone, conditioning_embedding_out_channels=tuple(settings.conditioning_channels)
    )


def scheduler(settings: ArchitectureSettings) -> DDPMScheduler:
    """Return Stable Diffusion's noise schedule; with v prediction its last step is pure noise (Lin et al. 2024)."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=settings.prediction_type,
        rescale_betas_zero_snr=settings.prediction_type == "v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer without merges: one token a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        vocab, merges = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab.write_text(json.dumps({word: index for index, word in enumerate(words)}))
        merges.write_text("#version: 0.2\n")
        # said here, or the saved settings would tell whether the hub was switched off while they were made
        return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS, local_files_only=True)


def text_encoder(settings: ArchitectureSettings) -> CLIPTextModel:
    """Return a one-layer CLIP text encoder; it stays as initialised, for its codes only need to differ."""
    size = 514
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=size,
            hidden_size=settings.text_width,
            intermediate_size=2 * settings.text_width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=settings.text_width,
            bos_token_id=size - 2,
            eos_token_id=size - 1,
            pad_token_id=size - 1,
        )
    )
