"""Random models of a few thousand weights in diffusers' layout: they show that code runs, not that images get better.

`build(folder)` writes one in the style of Stable Diffusion, `build_flux(folder)` one in the style of FLUX.1-dev; the
same bytes each time.
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
    from diffusers import ControlNetModel, DDPMScheduler, UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _vae()
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


def build_flux(folder: Path, *, seed: int = 0) -> Path:
    """Write the model to `folder` and return it: 2 double and 2 single blocks, guidance as an input."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel

    from dp2osr.models import build_flux as tokenizers

    heads = {"attention_head_dim": 16, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
        transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=2,
            num_single_layers=2,
            joint_attention_dim=CROSS_ATTENTION,
            pooled_projection_dim=CROSS_ATTENTION,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
            **heads,
        )
        control = FluxControlNetModel.from_transformer(transformer, num_layers=1, num_single_layers=1, **heads)
        for name, parameter in control.named_parameters():
            if name.startswith(("controlnet_blocks", "controlnet_single_blocks", "controlnet_x_embedder")):
                torch.nn.init.normal_(parameter, std=0.05)
        text_encoder, text_encoder_2 = _text_encoder(), _t5_encoder()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts: dict[str, Any] = {"vae": vae, "transformer": transformer, "controlnet": control, "scheduler": scheduler}
    parts |= {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
    parts["tokenizer_2"] = tokenizers.t5_tokenizer(length=512)
    for part, module in parts.items():
        module.save_pretrained(folder / part)
    write_tokenizer(folder / "tokenizer")
    return folder


def _vae(**changes: Any) -> torch.nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=16,
        **changes,
    )


def _t5_encoder() -> torch.nn.Module:
    from transformers import T5Config, T5EncoderModel

    shape = {"d_model": CROSS_ATTENTION, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=98, feed_forward_proj="gated-gelu", **shape))


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
