"""ADE20K's labels and intersection over union: hand-computed, and equal to torchmetrics over a benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp2osr.downstream import ade
from dp2osr.errors import UserError

pytest.importorskip("torchmetrics")


def write(path: Path, labels: object, dtype: type = np.uint8) -> Path:
    Image.fromarray(np.array(labels, dtype)).save(path)
    return path


def test_zero_is_ignored_and_classes_begin_at_one(tmp_path: Path) -> None:
    annotated = ade.read(write(tmp_path / "a.png", [[1, 2], [0, 150]]))
    assert annotated.tolist() == [[0, 1], [ade.IGNORED, 149]]


def test_hand_computed(tmp_path: Path) -> None:
    annotated = ade.read(write(tmp_path / "a.png", [[1, 2], [0, 2]]))
    counts = json.loads(ade.count(np.array([[0, 0], [5, 1]]), annotated))
    assert counts == [[0, 1, 2, 1], [1, 1, 1, 2]]  # class 5 is seen where nothing is annotated: it counts for nothing
    figures = ade.IntersectionOverUnion([counts])(np.ones(1))
    assert figures == pytest.approx({"miou": 0.5, "mean_accuracy": 0.75, "pixel_accuracy": 2 / 3})


def test_what_the_prediction_lacks_at_the_edges_is_cut(tmp_path: Path) -> None:
    annotated = ade.read(write(tmp_path / "a.png", [[1, 1, 7], [1, 1, 7], [7, 7, 7]]))
    assert json.loads(ade.count(np.zeros((2, 2), np.int64), annotated)) == [[0, 4, 4, 4]]


def test_the_benchmark_is_summed_up_as_torchmetrics_does(tmp_path: Path) -> None:
    import torch
    from torchmetrics.classification import MulticlassJaccardIndex

    rng = np.random.default_rng(3)
    wanted = MulticlassJaccardIndex(ade.CLASSES, average="macro", ignore_index=ade.IGNORED)
    counts, weights = [], np.array([1.0, 0.0, 2.0, 1.0])
    for weight in weights:
        annotated = ade.read(write(tmp_path / "a.png", rng.integers(0, 9, (12, 16))))
        predicted = np.where(rng.random((12, 16)) < 0.5, annotated % 9, rng.integers(0, 12, (12, 16)))
        counts.append(json.loads(ade.count(predicted, annotated)))
        for _ in range(int(weight)):
            wanted.update(torch.from_numpy(predicted), torch.from_numpy(annotated))
    figures = ade.IntersectionOverUnion(counts)(weights)
    assert figures["miou"] == pytest.approx(float(wanted.compute()))
    assert 0.2 < figures["miou"] < figures["pixel_accuracy"] < 0.8


def test_nothing_annotated_is_no_number() -> None:
    assert np.isnan(list(ade.IntersectionOverUnion([[]])(np.ones(1)).values())).all()


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.png: found label 151, wanted one channel with labels 0\.\.150"):
        ade.read(write(tmp_path / "a.png", [[151]]))
    with pytest.raises(UserError, match=r"found colours, wanted one channel"):
        ade.read(write(tmp_path / "a.png", [[[1, 2, 3]]]))
    path = write(tmp_path / "b.png", np.random.default_rng(0).integers(0, 150, (64, 64)))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=r"b\.png: no readable PNG"):
        ade.read(path)
    with pytest.raises(UserError, match="found 21 classes, wanted the 150"):
        ade.check_classes(["x"] * 21, "model")
