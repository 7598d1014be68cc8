"""Captions by models that lie in a folder: tiny random ones of each kind, the likeliest word each time, no network."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from dp2osr.errors import UserError
from dp2osr.models.caption import Captioner

WORDS = [
    "a",
    "bird",
    "over",
    "the",
    "sea",
    "stone",
    "wall",
    "what",
    "is",
    "it",
    "night",
    "red",
    "car",
    "and",
    "<image>",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
SIZE = {"height": 16, "width": 16}
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = TEXT | {"image_size": 16, "patch_size": 8}


def tokenizer(folder: Path) -> transformers.BertTokenizer:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    return transformers.BertTokenizer(str(folder / "vocab.txt"))


def build_blip(folder: Path) -> Path:
    ids = {"vocab_size": 21, "bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = TEXT | ids | {"encoder_hidden_size": 16, "initializer_range": 1.0}
    config = transformers.BlipConfig(text_config=text, vision_config=VISION | {"initializer_range": 1.0})
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    words = tokenizer(folder)
    words.add_special_tokens({"bos_token": "[DEC]"})
    transformers.BlipProcessor(transformers.BlipImageProcessor(size=SIZE), words).save_pretrained(folder)
    return folder


def build_pair(folder: Path) -> Path:
    """A ViT and a BERT that were put together: no processor of the pair's own."""
    decoder = transformers.BertConfig(
        **TEXT, vocab_size=21, is_decoder=True, add_cross_attention=True, initializer_range=1.0
    )
    encoder = transformers.ViTConfig(**VISION, initializer_range=1.0)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 0, 3
    transformers.VisionEncoderDecoderModel(config=config).save_pretrained(folder)
    transformers.ViTImageProcessor(size=SIZE).save_pretrained(folder)
    tokenizer(folder).save_pretrained(folder)
    return folder


def build_llava(folder: Path) -> Path:
    """A decoder that reads image tokens and a question in its chat template, and repeats both before it answers."""
    words = tokenizer(folder)
    words.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = transformers.LlamaConfig(**TEXT, vocab_size=21, initializer_range=1.0, bos_token_id=2, eos_token_id=3)
    vision = transformers.CLIPVisionConfig(**VISION, projection_dim=16, initializer_range=1.0)
    image_token = words.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image_token, vision_feature_layer=-1
    )
    config.pad_token_id = 0
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size=SIZE, crop_size=SIZE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for turn in messages %}{% for part in turn.content %}"
        "{{ '<image> ' if part.type == 'image' else part.text }}{% endfor %}{% endfor %}",
    ).save_pretrained(folder)
    return folder


BUILDERS = {"blip": build_blip, "pair": build_pair, "llava": build_llava}
QUESTIONS = {"blip": "", "pair": "", "llava": "what is it"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def find(kind: str) -> Path:
        if kind not in built:
            torch.manual_seed(0)
            built[kind] = BUILDERS[kind](tmp_path_factory.mktemp("caption") / kind)
        return built[kind]

    return find


def captioner(folder: Path, question: str = "", max_tokens: int = 6) -> Captioner:
    return Captioner(folder, question=question, max_tokens=max_tokens, device=torch.device("cpu"))


def pictures() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    noise = [torch.rand(3, side, side, generator=generator) for side in (16, 16, 24)]
    return [*noise, torch.zeros(3, 8, 16), torch.ones(3, 16, 16)]


@pytest.mark.parametrize("kind", BUILDERS)
def test_captions_are_short_lines_that_do_not_depend_on_the_batch(kind: str, folders: Callable[[str], Path]) -> None:
    model = captioner(folders(kind), QUESTIONS[kind])
    found = model.describe(pictures())
    assert len(found) == len(pictures())
    assert len(set(found)) > 1  # they follow from the image
    assert all(len(text.split()) <= 6 and set(text.split()) <= {*WORDS} for text in found)
    assert found == [model.describe([image])[0] for image in pictures()]
    assert found == captioner(folders(kind), QUESTIONS[kind]).describe(pictures())


def test_each_word_is_the_likeliest(folders: Callable[[str], Path]) -> None:
    model = captioner(folders("blip"))
    for image in pictures():
        pixels = model.images(images=[(image * 255).round().byte().permute(1, 2, 0).numpy()], return_tensors="pt")
        tokens = torch.tensor([[5]])
        while tokens[0, -1] != 3 and tokens.shape[1] <= 6:
            with torch.no_grad():
                logits = model.model(input_ids=tokens, pixel_values=pixels.pixel_values).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        assert model.describe([image]) == [model.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()]


def test_a_question_is_asked_and_not_repeated(folders: Callable[[str], Path]) -> None:
    model = captioner(folders("llava"), "what is it")
    assert model.text == "<image> what is it"
    assert not any(text.startswith("what is it") for text in model.describe(pictures()))
    other = captioner(folders("llava"), "the night").describe(pictures())
    assert other != model.describe(pictures())


def test_a_question_that_the_model_cannot_take_is_refused(folders: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match=r"caption\.question: this model takes none"):
        captioner(folders("pair"), "what is it").describe(pictures())


def test_what_is_no_such_model_is_named(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="absent: no such folder"):
        captioner(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"caption model .*: cannot be loaded \(.*wanted transformers' layout") as found:
        captioner(tmp_path)
    assert "\n" not in str(found.value)
    spoilt = build_blip(tmp_path / "spoilt")
    weights = spoilt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="spoilt: cannot be loaded"):
        captioner(spoilt)


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "odd", "auto_map": {"AutoConfig": "code.Odd", "AutoModelForImageTextToText": "code.Odd"}}'
    )
    (tmp_path / "code.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(UserError, match="cannot be loaded"):
        captioner(tmp_path)
