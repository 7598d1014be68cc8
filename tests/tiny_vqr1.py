"""A tiny random Qwen2.5-VL in the true layout: settings, tokenizer, processor, chat template, safetensors."""

import itertools
import json
from pathlib import Path

import torch
import transformers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
SPECIAL += ["<|video_pad|>"]
# Whole words of an answer, one token each; the first follows the prompt's last token, a line's end.
ANSWER = ["<think>", "soft", "</think>", "<answer>", "3", ".", "2", "5", "</answer>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{% if add_vision_id %}Picture 1: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(folder: Path, *, answers: bool = False) -> Path:
    """Write the model; with `answers` it says ANSWER whatever it sees, else what random weights say."""
    tokenizer = build_tokenizer(folder)
    width = 8 * -(-len(tokenizer) // 8) if answers else 32
    config = build_config(tokenizer, width)
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    if answers:
        rig(model, tokenizer)
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=1e-6,
        repetition_penalty=1.05,
        eos_token_id=tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="100KB")
    images = transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)
    videos = transformers.Qwen2VLVideoProcessor()
    transformers.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def build_tokenizer(folder: Path) -> transformers.Qwen2Tokenizer:
    """Return a byte-level tokenizer that knows no merges."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True, exist_ok=True)
    symbols = sorted(ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({symbol: number for number, symbol in enumerate(symbols)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL, "pad_token": SPECIAL[0]})
    tokenizer.add_tokens([word for word in ANSWER if len(word) > 1])
    return tokenizer


def build_config(tokenizer: transformers.Qwen2Tokenizer, width: int) -> transformers.Qwen2_5_VLConfig:
    """Return the shape: one layer each of language and vision model."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections(width // 4)},
        "tie_word_embeddings": False,
    }
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": width,
        "fullatt_block_indexes": [0],
        "initializer_range": 0.5,
    }
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{word}|>")
        for name, word in (("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"))
    }
    ids["vision_end_token_id"] = tokenizer.convert_tokens_to_ids("<|vision_end|>")
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)


def sections(half: int) -> list[int]:
    """Split half a head's width into the rotary parts of time, height and width."""
    return [half - 2 * (half // 3), half // 3, half // 3]


def rig(model: transformers.Qwen2_5_VLForConditionalGeneration, tokenizer: transformers.Qwen2Tokenizer) -> None:
    """Let each token be followed by the next of the answer: one-hot embeddings, no layers, a head that looks it up."""
    start = tokenizer("\n").input_ids[-1]
    chain = [start, *tokenizer.convert_tokens_to_ids(ANSWER), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    with torch.no_grad():
        language = model.model.language_model
        for layer in language.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        size = language.embed_tokens.weight.shape[0]
        language.embed_tokens.weight.zero_()[:, :size] = torch.eye(size)
        model.lm_head.weight.zero_()
        for token, following in itertools.pairwise(chain):
            model.lm_head.weight[following, token] = 1.0
