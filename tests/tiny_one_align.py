"""A tiny random Q-Align in the layout of q-future/one-align: settings, SentencePiece tokenizer, shards of weights."""

import io
import json
from pathlib import Path
from typing import Any

import torch

WORDS = ["excellent", "good", "fair", "poor", "bad"]
BEFORE, AFTER = "USER: How would you rate the quality of this image?\n", "\nASSISTANT: The quality of the image is"
SIDE, PATCH, QUERIES, WIDTH = 112, 14, 8, 32  # 448, 14, 64; 4096 and 1024 channels
# What transformers 4.31 wrote of any model beside its own settings; mPLUG-Owl2 stores its visual parts so (to_dict).
WRITTEN_BY_4 = """{"_name_or_path": "", "add_cross_attention": false, "architectures": null, "bad_words_ids": null,
    "begin_suppress_tokens": null, "bos_token_id": null, "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": null, "decoder_start_token_id": null, "diversity_penalty": 0.0, "do_sample":
    false, "early_stopping": false, "encoder_no_repeat_ngram_size": 0, "eos_token_id": null,
    "exponential_decay_length_penalty": null, "finetuning_task": null, "forced_bos_token_id": null,
    "forced_eos_token_id": null, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "is_decoder": false,
    "is_encoder_decoder": false, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0, "max_length":
    20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
    "num_return_sequences": 1, "output_attentions": false, "output_hidden_states": false, "output_scores":
    false, "pad_token_id": null, "prefix": null, "problem_type": null, "pruned_heads": {},
    "remove_invalid_values": false, "repetition_penalty": 1.0, "return_dict": true, "return_dict_in_generate":
    false, "sep_token_id": null, "suppress_tokens": null, "task_specific_params": null, "temperature": 1.0,
    "tf_legacy_loss": false, "tie_encoder_decoder": false, "tie_word_embeddings": true, "tokenizer_class": null,
    "top_k": 50, "top_p": 1.0, "torch_dtype": null, "torchscript": false, "transformers_version": "4.31.0",
    "typical_p": 1.0, "use_bfloat16": false}"""
CODE = "raise RuntimeError('code of the repository was run')\n"


def build(folder: Path, *, bos: bool | None = None, safetensors: bool = False) -> Path:
    """Write the repository; bos: what tokenizer_config.json says of it, if anything."""
    folder.mkdir(parents=True)
    pieces = add_tokenizer(folder)
    for name, settings in settings_files(pieces, bos).items():
        (folder / name).write_text(json.dumps(settings))
    state = random_state(json.loads((folder / "config.json").read_text()))
    names = list(state)
    stem, end = ("model", "safetensors") if safetensors else ("pytorch_model", "bin")
    shards = {f"{stem}-0000{at + 1}-of-00002.{end}": names[at::2] for at in range(2)}
    for file, members in shards.items():
        save(folder / file, {name: state[name] for name in members})
    index = {"metadata": {}, "weight_map": {name: file for file, members in shards.items() for name in members}}
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    add_code(folder)
    return folder


def save(file: Path, state: dict[str, torch.Tensor]) -> None:
    """Write tensors in the format that the file's name says."""
    from safetensors.torch import save_file

    if file.suffix == ".safetensors":
        save_file(state, file, metadata={"format": "pt"})
    else:
        torch.save(state, file)


def add_code(folder: Path) -> None:
    """Write what the published repository holds and must not run, and what transformers would look for."""
    for name in ("configuration_mplug_owl2.py", "modeling_mplug_owl2.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE)


def add_tokenizer(folder: Path) -> int:
    """Train a tokenizer with LLaMA's settings on the prompt and the five words; returns its count of pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([BEFORE.strip(), AFTER.strip()] * 20 + WORDS * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        hard_vocab_limit=False,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return int(pieces(folder).vocab_size())


def pieces(folder: Path) -> Any:
    """Return SentencePiece's own reading of the tokenizer."""
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def settings_files(vocabulary: int, bos: bool | None) -> dict[str, Any]:
    """Return what the .json files hold, as transformers 4 wrote them."""
    vision = json.loads(WRITTEN_BY_4)
    vision |= {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = {
        "architectures": ["MPLUGOwl2LlamaForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_mplug_owl2.MPLUGOwl2LlamaForCausalLM"},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_vision_model": False,
        "hidden_act": "silu",
        "image_aspect_ratio": "pad",
        "model_type": "mplug_owl2",
        "pretraining_tp": 1,
        "transformers_version": "4.31.0",
        "use_cache": True,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": vocabulary,
        "visual_config": {
            "visual_model": vision | {"model_type": "mplug_owl_vision_model", "image_size": SIDE, "patch_size": PATCH},
            "visual_abstractor": vision
            | {
                "model_type": "mplug_owl_visual_abstract",
                "encoder_hidden_size": WIDTH,
                "num_learnable_queries": QUERIES,
                "grid_size": SIDE // PATCH,
            },
        },
    }
    tokenizer = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "model_max_length": 2048, "sp_model_kwargs": {}}
    images = {
        "crop_size": SIDE,
        "size": SIDE,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
    }
    return {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6},
        "preprocessor_config.json": images,
        "tokenizer_config.json": tokenizer | ({} if bos is None else {"add_bos_token": bos}),
    }


def random_state(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return weights in bfloat16; sines of the positions are what they are, norms let everything through."""
    from pyiqa.archs.q_align.modeling_mplug_owl2 import MPLUGOwl2Config, MPLUGOwl2LlamaModel

    torch.manual_seed(0)
    names = MPLUGOwl2LlamaModel(MPLUGOwl2Config(**settings)).state_dict()
    state = {f"model.{name}": value for name, value in names.items()}
    state["lm_head.weight"] = torch.empty(settings["vocab_size"], WIDTH)
    for name, value in state.items():
        if not name.endswith("pos_embed"):
            noise = torch.randn(value.shape)
            norm = value.ndim == 1 and name.endswith("weight")
            state[name] = 1 + 0.1 * noise if norm else noise * (0.1 if value.ndim == 1 else 1.5 * WIDTH**-0.5)
    return {name: value.bfloat16() for name, value in state.items()}
