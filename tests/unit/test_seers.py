"""Models by path: what they see, and what does not fit a benchmark. They are random; of text, the red is found."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tiny_benchmarks as tiny
from dp2osr import images
from dp2osr.downstream import seers
from dp2osr.errors import UserError

CPU = torch.device("cpu")
SSD = "ssdlite320_mobilenet_v3_large"


def pixels(path: Path) -> seers.Pixels:
    return images.decode(path.read_bytes(), max_pixels=10**6)


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.text_detector(tmp_path_factory.mktemp("text") / "model")


def load(kind: str, model: Path, annotations: Path, architecture: str = "") -> Any:
    return seers.load(kind, model, architecture=architecture, annotations=annotations, device=CPU)


def test_a_detector_of_transformers(tmp_path: Path, coco: tuple[Path, Path]) -> None:
    labels = {number: row["name"] for number, row in enumerate(tiny.coco_categories())}  # 0..79
    seer = load("detection", tiny.yolos(tmp_path / "model", labels), coco[1])
    image = pixels(coco[0] / "000000000001.png")
    boxes = json.loads(seer.see(image, None))
    raw = seer.found(image, threshold=0.0)
    assert len(boxes) == len(raw["scores"]) == 5  # one a query, unsure ones too
    left, top, right, bottom = raw["boxes"][0].tolist()
    assert boxes[0][:4] == pytest.approx([left, top, right - left, bottom - top], abs=1e-3)
    assert 0 < right <= tiny.SIZE[0] and 0 < bottom <= tiny.SIZE[1]
    wanted = tiny.coco_categories()[int(raw["labels"][0])]["id"]
    assert boxes[0][4:] == [float(raw["scores"][0]), wanted]


def test_a_detector_for_other_classes(tmp_path: Path, coco: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=r"2 labels lack 'airplane' \(79 of the 80"):
        load("detection", tiny.yolos(tmp_path / "model", {0: "person", 1: "wheel"}), coco[1])


def test_a_detector_of_torchvision(tmp_path: Path, coco: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    build = torchvision.models.get_model_builder(SSD)
    state = build(weights=None, weights_backbone=None, num_classes=91).state_dict()
    torch.save(state, tmp_path / "ssd.pth")
    seer = load("detection", tmp_path / "ssd.pth", coco[1], SSD)
    assert all(torch.equal(value, state[name]) for name, value in seer.model.state_dict().items())
    assert seer.categories[90] == 90 and 12 not in seer.categories
    assert json.loads(seer.see(pixels(coco[0] / "000000000001.png"), None))
    found = {"boxes": torch.tensor([[1.0, 2, 4, 8], [0, 0, 9, 9]]), "scores": torch.tensor([0.75, 0.5])}
    monkeypatch.setattr(seer, "model", lambda _: [found | {"labels": torch.tensor([72, 12])}])
    assert json.loads(seer.see(np.zeros((8, 8, 3), np.uint8), None)) == [[1, 2, 3, 6, 0.75, 72]]  # 12 is N/A
    fewer = {
        name: value[:21] if "classification_head" in name and value.ndim else value for name, value in state.items()
    }
    torch.save(fewer, tmp_path / "fewer.pth")
    with pytest.raises(UserError, match=r"fewer\.pth: other weights than the architecture has \(.*size mismatch"):
        load("detection", tmp_path / "fewer.pth", coco[1], SSD)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "ssd.pth").read_bytes()[:10000])
    with pytest.raises(UserError, match=r"cut\.pth: no readable state dict"):
        load("detection", tmp_path / "cut.pth", coco[1], SSD)
    with pytest.raises(UserError, match=r"found 'yolo', wanted one of fasterrcnn_"):
        load("detection", tmp_path / "ssd.pth", coco[1], "yolo")


def test_released_weights_run_without_an_epsilon(tmp_path: Path, coco: tuple[Path, Path], monkeypatch: Any) -> None:
    """torchvision runs them in frozen layers, which count no batches; weights of one's own training do."""
    from torchvision.ops import FrozenBatchNorm2d

    monkeypatch.setattr("torchvision.models.get_model_builder", lambda _: lambda **_: torch.nn.BatchNorm2d(2))
    for layer, wanted in ((torch.nn.BatchNorm2d(2), 1e-5), (FrozenBatchNorm2d(2), 0.0)):
        torch.save(layer.state_dict(), tmp_path / "weights.pth")
        seer = load("detection", tmp_path / "weights.pth", coco[1], "fasterrcnn_resnet50_fpn")
        assert seer.model.eps == wanted


def test_a_segmenter(tmp_path: Path) -> None:
    folder, labels = tiny.ade(tmp_path, count=1)
    seer = load("segmentation", tiny.segformer(tmp_path / "model"), labels)
    name = "ADE_val_00000001"
    counts = np.array(json.loads(seer.see(pixels(folder / f"{name}.jpg"), labels / f"{name}.png")))
    annotated = {label: count for label, _, _, count in counts.tolist() if count}
    assert annotated == {12: 32 * 40, 149: 24 * 96}
    assert counts[:, 2].sum() == counts[:, 3].sum()  # a class for each pixel that is annotated
    with pytest.raises(UserError, match="found 21 classes, wanted the 150"):
        load("segmentation", tiny.segformer(tmp_path / "other", classes=21), labels)


def test_a_text_detector(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network says "text" on red pixels, the corners are those of the red, widened as its processor does."""
    folder, annotations = tiny.icdar(tmp_path, count=1)
    seer = load("text", text, annotations)

    def red(pixel_values: torch.Tensor) -> SimpleNamespace:
        channels = pixel_values[:, [2, 1, 0]]  # its processor turns them around
        return SimpleNamespace(last_hidden_state=(channels[:, :1] - channels[:, 1:2] > 1).float())

    monkeypatch.setattr(seer, "model", red)
    corners = np.array(json.loads(seer.see(pixels(folder / "img_1.png"), None)))
    assert corners.shape == (1, 4, 2)
    assert 0 <= corners[0, :, 0].min() <= 8 and 48 <= corners[0, :, 0].max() <= 62
    assert 0 <= corners[0, :, 1].min() <= 8 and 24 <= corners[0, :, 1].max() <= 38


def test_a_text_detector_runs_as_it_is(tmp_path: Path, text: Path) -> None:
    folder, annotations = tiny.icdar(tmp_path, count=1)
    assert isinstance(json.loads(load("text", text, annotations).see(pixels(folder / "img_1.png"), None)), list)


def test_a_detector_of_things_is_no_text_detector(tmp_path: Path) -> None:
    folder, annotations = tiny.icdar(tmp_path, count=1)
    seer = load("text", tiny.yolos(tmp_path / "model", {0: "person", 1: "cat"}), annotations)
    seer.processor.post_process_object_detection = lambda *_, **__: [{"boxes": torch.zeros(2, 4)}]
    with pytest.raises(UserError, match=r"boxes of shape \(4,\), wanted the corners \(4, 2\)"):
        seer.see(pixels(folder / "img_1.png"), None)


@pytest.mark.parametrize("kind", ["detection", "segmentation", "text"])
def test_what_is_no_model(tmp_path: Path, kind: str) -> None:
    with pytest.raises(UserError, match=f"{kind} model .*: wanted a folder in transformers' layout"):
        load(kind, tmp_path / "absent", tmp_path)
    with pytest.raises(UserError, match=f"{kind} model .*: cannot be loaded"):
        load(kind, tmp_path, tmp_path)
