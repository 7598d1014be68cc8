"""A random model of a few thousand weights in diffusers' layout: it shows that code runs, not that images get better.

`build(folder)` writes vae, unet, controlnet, text_encoder, tokenizer and scheduler; the same bytes each time.
"""

import json
from pathlib import Path
from typing import Any

import torch

CROSS_ATTENTION = 16  # width of the text embedding
LATENT_CHANNELS = 4
START, END = "<|startoftext|>", "<|endoftext|>"


def build(folder: Path, *, seed: int = 0) -> Path:
    """Write the model to `folder` and return it: VAE of factor 2, UNet and ControlNet of two levels, one text layer."""
    from diffusers import AutoencoderKL, ControlNetModel, DDPMScheduler, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            sample_size=16,
        )
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=8,
            cross_attention_dim=CROSS_ATTENTION,
            attention_head_dim=8,
        )
        # one step between two widths: the control image is halved once, as the VAE does
        control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))
        for name, parameter in control.named_parameters():
            if name.startswith(
                ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
            ):
                torch.nn.init.normal_(parameter, std=0.05)
        text_encoder = _text_encoder()
    parts: dict[str, Any] = {"vae": vae, "unet": unet, "controlnet": control, "text_encoder": text_encoder}
    for part, module in parts.items():
        module.save_pretrained(folder / part, safe_serialization=True)
    scheduler: Any = DDPMScheduler(beta_schedule="scaled_linear", prediction_type="epsilon", clip_sample=False)
    scheduler.save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer")
    write_index(folder)
    return folder


def _text_encoder() -> torch.nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = byte_vocabulary()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=CROSS_ATTENTION,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=vocabulary[START],
            eos_token_id=vocabulary[END],
            pad_token_id=vocabulary[END],
        )
    )


def byte_vocabulary() -> dict[str, int]:
    """Return CLIP's vocabulary without merges: each byte, each byte at a word's end, start and end of the text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable]
    symbols += [chr(256 + i) for i in range(256 - len(printable))]  # GPT-2's stand-ins for the other bytes
    return {token: i for i, token in enumerate([*symbols, *(symbol + "</w>" for symbol in symbols), START, END])}


def write_tokenizer(folder: Path) -> None:
    """Write a CLIPTokenizer of single bytes: vocab.json, merges.txt and its settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(byte_vocabulary(), ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": END, "unk_token": END}
    settings |= {"bos_token": START, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, sort_keys=True))


def write_index(folder: Path) -> None:
    """Write model_index.json, so that diffusers' own pipeline opens the folder."""
    index = {
        "_class_name": "StableDiffusionControlNetPipeline",
        "_diffusers_version": "0.35.0",
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "controlnet": ["diffusers", "ControlNetModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1))
