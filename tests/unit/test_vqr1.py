"""VisualQuality-R1: answers are read strictly, the likeliest token each time, what has no score is recorded."""

import math
from pathlib import Path

import pandas as pd
import pytest
import torch

import tiny_vqr1
from dp2osr.config_metrics import Vqr1Settings
from dp2osr.errors import UserError
from dp2osr.iqa.metric import Scorer
from dp2osr.iqa.vqr1 import PROMPT, VisualQuality, parse_score
from dp2osr.stages import score

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vqr1.build(tmp_path_factory.mktemp("vqr1") / "answers", answers=True)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vqr1.build(tmp_path_factory.mktemp("vqr1") / "random")


def judge(folder: Path, max_tokens: int = 24) -> VisualQuality:
    return VisualQuality(Vqr1Settings(model=str(folder), max_tokens=max_tokens), device=CPU)


def pictures() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noise = torch.rand(1, 3, 64, 64, generator=generator)
    return torch.cat([noise, torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>soft, some noise</think><answer>3.25</answer>", 3.25),
        ("<think>a\nb</think>\n<answer> 1.00 </answer>\n", 1.0),
        ("<answer>5.00</answer>", 5.0),
        ("<think>I say it in <answer> tags: <answer>2.00</answer></think><answer>4.50</answer>", 4.5),
    ],
)
def test_a_score_is_read(text: str, wanted: float) -> None:
    assert parse_score(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3.25",
        "<think>3.25</think>",
        "<think>good</think><answer></answer>",
        "<answer>3</answer>",
        "<answer>3.5</answer>",
        "<answer>3.255</answer>",
        "<answer>0.99</answer>",
        "<answer>5.01</answer>",
        "<answer>-3.25</answer>",
        "<answer>3.25/5.00</answer>",
        "<answer>3,25</answer>",
        "<answer>nan</answer>",
        "<answer>3.٢٥</answer>",
        "<answer>3.25",  # cut off
        "<think>good <answer>3.25</answer>",  # cut off while it thought
        "<answer>3.25</answer><answer>3.50</answer>",
        "I rate it <answer>3.25</answer>",
        "<think>good</think><answer>3.25</answer> and a half",
    ],
)
def test_what_is_no_score_is_none(text: str) -> None:
    assert math.isnan(parse_score(text))


def test_the_answer_comes_through_processor_model_and_tokenizer(folder: Path) -> None:
    model = judge(folder)
    assert model.answer(pictures()[0]) == "<think>soft</think><answer>3.25</answer>"
    found = model(pictures())
    assert found.tolist() == [3.25, 3.25, 3.25] and found.dtype == torch.float64


def test_an_answer_that_is_cut_off_is_no_score(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert math.isnan(judge(folder, max_tokens=8)(pictures()[:1]).item())
    assert "no score in the answer, which ends: '<think>soft</think><answer>3.25'" in caplog.text


def test_the_prompt_is_asked_with_the_image_before_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = judge(folder)
    asked = {}
    original = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **inputs: asked.update(inputs) or original(**inputs))
    model.answer(torch.rand(3, 100, 64))
    text = model.processor.tokenizer.decode(asked["input_ids"][0])
    # 100 x 64 px are resized to multiples of 28, 112 x 56, and each token sees 28 x 28
    image = "<|vision_start|>" + "<|image_pad|>" * 8 + "<|vision_end|>"
    assert text == f"<|im_start|>user\nPicture 1: {image}{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    assert asked["image_grid_thw"].tolist() == [[1, 8, 4]] and asked["max_new_tokens"] == 24


def test_each_token_is_the_likeliest_and_follows_from_the_image(random_folder: Path) -> None:
    model = judge(random_folder, max_tokens=6)
    found = [model.answer(image) for image in pictures()]
    assert len(set(found)) > 1
    torch.manual_seed(99)
    assert found == [judge(random_folder, max_tokens=6).answer(image) for image in pictures()]
    settings = model.model.generation_config
    assert (settings.do_sample, settings.temperature, settings.repetition_penalty) == (False, None, 1.05)


def test_failures_are_rows_with_a_status_and_are_not_averaged(folder: Path, random_folder: Path) -> None:
    keys, images = [("a", 0), ("a", 1), ("b", 0)], pictures()
    rows = {}
    for name, place in (("ok", folder), ("bad", random_folder)):
        how = {"vqr1": Vqr1Settings(model=str(place), max_tokens=12), "niqe": None, "niqe_block": 32}
        scorer = Scorer(["vqr1"], device=CPU, batch_size=8, **how)
        assert not scorer.needs_hr and scorer.micro_batch("vqr1", 64, 64) == 1
        rows[name] = score.score_batch(score.Batch(keys, images, None), scorer)
        small = score.score_batch(score.Batch(keys[:1], images[:1, :, :20, :20], None), scorer)
        assert [row[4] for row in small] == ["too_small"]
    assert rows["ok"] == [(*key, "vqr1", 3.25, "ok") for key in keys]
    assert [row[4] for row in rows["bad"]] == ["unparsed"] * 3
    frame = pd.DataFrame(
        [*rows["ok"][:1], *rows["bad"][1:]], columns=["group_id", "rollout", "metric", "score", "status"]
    )
    assert frame["score"].mean() == 3.25


def test_user_errors(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(UserError, match=r"metric 'vqr1': no model given"):
        Scorer(["vqr1"], device=CPU, niqe=None, niqe_block=32, batch_size=1)
    with pytest.raises(UserError, match=r"absent: no such folder \(iqa\.vqr1\.model\)"):
        judge(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot be loaded \(.*wanted transformers' layout") as found:
        judge(tmp_path)
    assert "\n" not in str(found.value)
    spoilt = tiny_vqr1.build(tmp_path / "spoilt")
    part = sorted(spoilt.glob("model-*.safetensors"))[0]
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match="spoilt: cannot be loaded"):
        judge(spoilt)
