"""ADE20K scene parsing: PNGs of labels as published, and intersection over union summed up over the benchmark."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from dp2osr.config_checks import need_extra
from dp2osr.errors import UserError

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
CLASSES = 150
IGNORED = 255


def read(path: Path) -> Labels:
    """Return the labels (H, W) of an annotation: classes 0..149, IGNORED where the file has 0, "other"."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            found = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"annotation {path}: no readable PNG ({error})") from None
    if found.ndim != 2 or found.max(initial=0) > CLASSES:
        what = "colours" if found.ndim != 2 else f"label {found.max()}"
        raise UserError(f"annotation {path}: found {what}, wanted one channel with labels 0..{CLASSES} (SceneParse150)")
    return np.where(found == 0, IGNORED, found.astype(np.int64) - 1)


def check_classes(labels: Sequence[str], what: str) -> None:
    """Raise UserError where a model does not tell ADE20K's classes apart."""
    if len(labels) != CLASSES:
        raise UserError(f"{what}: found {len(labels)} classes, wanted the {CLASSES} of ADE20K's scene parsing")


def count(predicted: Labels, annotated: Labels) -> str:
    """Return pixels right, predicted and annotated of each class that occurs; ignored pixels count for none.

    predicted, annotated: (H, W); what the annotation has beyond the prediction, as LR is a whole number of pixels, is
    cut. Returns JSON: [class, right, predicted, annotated] of each class.
    """
    need_extra("segmentation")
    import torch
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    height, width = predicted.shape
    found, wanted = (
        torch.from_numpy(np.ascontiguousarray(labels)) for labels in (predicted, annotated[:height, :width])
    )
    matrix = multiclass_confusion_matrix(found, wanted, num_classes=CLASSES, ignore_index=IGNORED).numpy()
    table = np.stack([np.arange(CLASSES), np.diagonal(matrix), matrix.sum(axis=0), matrix.sum(axis=1)], axis=1)
    return json.dumps(table[table[:, 2:].sum(axis=1) > 0].tolist())


class IntersectionOverUnion:
    """Mean intersection over union of one source, as a function of the photographs' weights."""

    def __init__(self, counts: Sequence[Sequence[Sequence[int]]]) -> None:
        self.table = np.zeros((len(counts), CLASSES, 3))
        for image, rows in enumerate(counts):
            for label, *pixels in rows:
                self.table[image, label] = pixels

    def __call__(self, weights: Floats) -> dict[str, float]:
        """Return miou (classes that are neither predicted nor annotated count for nothing), and both accuracies."""
        right, predicted, annotated = np.einsum("i,icn->nc", weights, self.table)
        union = predicted + annotated - right
        seen, known = union > 0, annotated > 0
        if not known.any():
            return dict.fromkeys(("miou", "mean_accuracy", "pixel_accuracy"), float("nan"))
        return {
            "miou": float((right[seen] / union[seen]).mean()),
            "mean_accuracy": float((right[known] / annotated[known]).mean()),
            "pixel_accuracy": float(right.sum() / annotated.sum()),
        }
