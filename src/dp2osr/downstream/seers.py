"""Models that look at an image: detectors, segmenters, text detectors, by path and without code from it.

Each gives what a table of predictions holds of an image: boxes in COCO's categories, counted pixels, corners of text.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torchvision
from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoModelForSemanticSegmentation

from dp2osr.downstream import ade, coco
from dp2osr.errors import UserError
from dp2osr.models import folders

# Detectors whose released weights torchvision runs with no epsilon in their normalisation
EXACT_NORM = frozenset(
    {"fasterrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"}
)

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


class Seer(Protocol):
    """A model of one kind of benchmark."""

    def see(self, image: Pixels, annotation: Path | None) -> str:
        """Return the JSON of tables.PREDICTIONS for an image; annotation: that of the image, for segmentation."""


def load(kind: str, model: Path, *, architecture: str, annotations: Path, device: torch.device) -> Seer:
    """Load the model of a benchmark; raises UserError where it does not fit the benchmark's annotations."""
    if kind == "detection" and architecture:
        return TorchvisionDetector(model, architecture, annotations, device)
    if not model.is_dir():
        raise UserError(f"{kind} model {model}: wanted a folder in transformers' layout")
    kinds: dict[str, Any] = {"detection": Detector, "segmentation": Segmenter, "text": TextDetector}
    return kinds[kind](model, annotations, device)


class TorchvisionDetector:
    """A detector of torchvision by the name of its builder, with weights for the categories of its COCO release."""

    def __init__(self, file: Path, architecture: str, annotations: Path, device: torch.device) -> None:
        names = torchvision.models.list_models(module=torchvision.models.detection)
        if architecture not in names:
            raise UserError(f"config: architecture: found '{architecture}', wanted one of {', '.join(names)}")
        released = next(iter(torchvision.models.get_model_weights(architecture)))
        labels = dict(enumerate(released.meta["categories"]))  # label 0 is no object, and gaps are called N/A
        self.categories = coco.category_ids(labels, annotations)
        build = torchvision.models.get_model_builder(architecture)
        self.model = build(weights=None, weights_backbone=None, num_classes=len(labels))
        state = read_state(file)
        load_state(self.model, state, file)
        if architecture in EXACT_NORM and not any(name.endswith("num_batches_tracked") for name in state):
            for module in self.model.modules():  # released weights come from frozen layers, whose variance is exact
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.eps = 0.0
        self.model.to(device).requires_grad_(False).eval()
        self.device = device

    @torch.no_grad()
    def see(self, image: Pixels, annotation: Path | None) -> str:
        """Return the boxes of an image."""
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float().div(255).to(self.device)
        return boxes_json(self.model([pixels])[0], self.categories)


def read_state(file: Path) -> dict[str, torch.Tensor]:
    """Read a plain state dict, tensors alone; raises UserError naming the file."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what is wrong with the file
        raise UserError(f"detection model {file}: no readable state dict ({_first_line(error)})") from None


def load_state(model: torch.nn.Module, state: dict[str, torch.Tensor], file: Path) -> None:
    """Load a state dict; raises UserError naming the file and the first thing that does not fit."""
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"detection model {file}: other weights than the architecture has ({_first_line(error)})"
        ) from None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:200] or type(error).__name__


class Detector:
    """An object detector of transformers."""

    what = "detection model"

    def __init__(self, folder: Path, annotations: Path, device: torch.device) -> None:
        self.model = folders.load(AutoModelForObjectDetection, folder, what=self.what)
        self.model.to(device).requires_grad_(False).eval()
        self.processor = folders.load(AutoImageProcessor, folder, what=self.what)
        self.device, self.folder = device, folder
        self.prepare(annotations)

    def prepare(self, annotations: Path) -> None:
        """Match the model's labels with the benchmark's categories."""
        self.categories = coco.category_ids(self.model.config.id2label, annotations)

    @torch.no_grad()
    def found(self, image: Pixels, **options: float) -> dict[str, torch.Tensor]:
        """Return boxes, scores and labels that transformers makes of an image."""
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        size = torch.tensor([image.shape[:2]], device=self.device)
        outputs = self.model(pixel_values=pixels)
        found = self.processor.post_process_object_detection(outputs, target_sizes=size, **options)
        return found[0]

    def see(self, image: Pixels, annotation: Path | None) -> str:
        """Return the boxes of an image, unsure ones too: average precision weighs them."""
        return boxes_json(self.found(image, threshold=0.0), self.categories)


class TextDetector(Detector):
    """A text detector of transformers that gives the four corners of each word or line, such as PP-OCRv5's."""

    what = "text model"

    def prepare(self, annotations: Path) -> None:
        """Nothing: text is one class."""

    def see(self, image: Pixels, annotation: Path | None) -> str:
        """Return the corners of each box of an image, at the thresholds that the model's processor has."""
        corners = self.found(image)["boxes"].cpu()
        if len(corners) and corners.shape[1:] != (4, 2):
            raise UserError(
                f"text model {self.folder}: found boxes of shape {tuple(corners.shape[1:])}, wanted the corners (4, 2) "
                "of a text detector (PP-OCRv5)"
            )
        return json.dumps(corners.tolist())


class Segmenter:
    """A semantic segmenter of transformers for ADE20K's 150 classes."""

    def __init__(self, folder: Path, annotations: Path, device: torch.device) -> None:
        what = "segmentation model"
        self.model = folders.load(AutoModelForSemanticSegmentation, folder, what=what)
        ade.check_classes(list(self.model.config.id2label.values()), f"{what} {folder}")
        self.model.to(device).requires_grad_(False).eval()
        self.processor = folders.load(AutoImageProcessor, folder, what=what)
        self.device = device

    @torch.no_grad()
    def see(self, image: Pixels, annotation: Path | None) -> str:
        """Return the pixels of each class, counted against the annotation."""
        assert annotation is not None
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"].to(self.device)
        outputs = self.model(pixel_values=pixels)
        labels = self.processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])[0]
        return ade.count(labels.cpu().numpy().astype(np.int64), ade.read(annotation))


def boxes_json(found: dict[str, torch.Tensor], categories: dict[int, int]) -> str:
    """Return the JSON of [x, y, width, height, score, category id] of each box whose label is a category."""
    rows = zip(found["boxes"].tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True)
    boxes = [
        [*(round(side, 3) for side in (left, top, right - left, bottom - top)), score, categories[label]]
        for (left, top, right, bottom), score, label in rows
        if label in categories
    ]
    return json.dumps(boxes)
