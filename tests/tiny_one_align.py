"""A tiny random Q-Align (one-align) in the true layout, as a repository of a weights cache."""

import json
from pathlib import Path
from typing import Any

import torch

import stand_ins

REPO = "q-future/one-align"
WIDTH = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
CONFIG: dict[str, Any] = {
    "model_type": "mplug_owl2",
    **WIDTH,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "visual_config": {
        "visual_model": {**WIDTH, "image_size": 448, "patch_size": 14},
        "visual_abstractor": {**WIDTH, "num_learnable_queries": 4, "encoder_hidden_size": 32, "grid_size": 32},
    },
}
CLIP = {"crop_size": 448, "do_center_crop": True, "do_normalize": True, "do_resize": True, "size": 448}
CLIP |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
TEXT = "USER: How would you rate the quality of this image? ASSISTANT: The quality is excellent good fair poor bad\n"


def add(cache: Path, scratch: Path) -> None:
    """File tokenizer, settings and weights under the repository's name; pyiqa's class is made with the first two."""
    import sentencepiece

    scratch.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 50),
        model_prefix=str(scratch / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (scratch / "tokenizer.vocab").unlink()
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **tokens}
    (scratch / "tokenizer_config.json").write_text(json.dumps(settings))
    (scratch / "special_tokens_map.json").write_text(json.dumps(tokens))
    (scratch / "preprocessor_config.json").write_text(json.dumps(CLIP))
    (scratch / "config.json").write_text(json.dumps(CONFIG))
    snapshot = stand_ins.add_repository(cache / "hub", REPO, scratch)
    from pyiqa.archs.q_align.modeling_mplug_owl2 import MPLUGOwl2Config, MPLUGOwl2LlamaForCausalLM

    torch.manual_seed(0)
    model = MPLUGOwl2LlamaForCausalLM(MPLUGOwl2Config(**CONFIG)).half()
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim > 1:
                value.normal_(std=0.3)
    torch.save(model.state_dict(), snapshot / "pytorch_model.bin")
