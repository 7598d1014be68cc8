"""Builds a tiny FLUX-style model in diffusers' own layout: transformer, two text encoders, tokenizers, scheduler."""

import json
import tempfile
from pathlib import Path

from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from dp2osr.config import ArchitectureSettings
from dp2osr.models.flux import PATCH

SPECIAL = ("<pad>", "</s>", "<unk>")


def transformer(settings: ArchitectureSettings) -> FluxTransformer2DModel:
    """Return a transformer of double and single blocks whose tokens are patches of 2 x 2 latent cells."""
    shape = settings.transformer
    side = shape.head_dim * 7 // 16 // 2 * 2  # of the head's dimensions, as FLUX's 56 of 128; they turn in pairs
    return FluxTransformer2DModel(
        in_channels=settings.latent_channels * PATCH**2,
        num_layers=shape.layers,
        num_single_layers=shape.single_layers,
        attention_head_dim=shape.head_dim,
        num_attention_heads=shape.heads,
        joint_attention_dim=settings.text_width,
        pooled_projection_dim=settings.text_width,
        guidance_embeds=False,
        axes_dims_rope=(shape.head_dim - 2 * side, side, side),
    )


def control(backbone: FluxTransformer2DModel, settings: ArchitectureSettings) -> FluxControlNetModel:
    """Return a control branch that starts as a copy of the transformer's first blocks, its outputs at zero."""
    return FluxControlNetModel.from_transformer(
        backbone,
        num_layers=settings.transformer.control_layers,
        num_single_layers=settings.transformer.control_single_layers,
        attention_head_dim=settings.transformer.head_dim,
        num_attention_heads=settings.transformer.heads,
    )


def scheduler(*, tokens: int) -> FlowMatchEulerDiscreteScheduler:
    """Return FLUX's flow schedule, its shift 0.5 at `tokens` tokens, the images that the model is trained on."""
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=tokens,
        max_image_seq_len=16 * tokens,
    )


def t5_tokenizer(*, length: int) -> T5TokenizerFast:
    """Return a T5 tokenizer that knows the printable characters of ASCII one by one."""
    vocabulary = [*((token, 0.0) for token in SPECIAL), ("▁", -2.0), *((chr(code), -3.0) for code in range(33, 127))]
    built = Tokenizer(Unigram(vocabulary, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always", True)]
    built.pre_tokenizer = pre_tokenizers.Sequence(words)
    built.decoder = decoders.Metaspace("▁", "always", True)
    end = [("</s>", SPECIAL.index("</s>"))]
    built.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=end)
    told = {"tokenizer_class": "T5Tokenizer", "model_max_length": length, "extra_ids": 0}
    told |= {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    with tempfile.TemporaryDirectory() as folder:
        built.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(told))
        return T5TokenizerFast.from_pretrained(folder, local_files_only=True)


def t5_encoder(settings: ArchitectureSettings) -> T5EncoderModel:
    """Return a one-layer T5 encoder; it stays as initialised, for its codes only need to differ."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(SPECIAL) + 1 + 127 - 33,
            d_model=settings.text_width,
            d_kv=settings.text_width // 2,
            d_ff=2 * settings.text_width,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
