"""COCO's files and average precision: hand-computed, equal to pycocotools', and by weight as by repetition."""

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_benchmarks
from dp2osr.downstream import coco
from dp2osr.errors import UserError

pytest.importorskip("pycocotools")


def write(path: Path, boxes: list[list[dict[str, Any]]], *, categories: int = 1) -> Path:
    """Write annotations: a list of {"bbox", "category_id", "iscrowd"} for each of the photographs "0", "1" ..."""
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(len(boxes))]
    rows = [
        {"image_id": i, "category_id": 1, "iscrowd": 0, "area": box["bbox"][2] * box["bbox"][3], "id": 10 * i + j} | box
        for i, each in enumerate(boxes)
        for j, box in enumerate(each)
    ]
    known = [{"id": i + 1, "name": f"thing {i + 1}"} for i in range(categories)]
    path.write_text(json.dumps({"images": images, "annotations": rows, "categories": known}))
    return path


def ap(path: Path, found: list[list[list[float]]]) -> dict[str, float]:
    """Return the figures of boxes found in the photographs "0", "1" ..."""
    names = [str(i) for i in range(len(found))]
    return coco.AveragePrecision(path, names, found)(np.ones(len(found)))


def test_one_wrong_box_between_two_right_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [[{"bbox": [0, 0, 100, 100]}], [{"bbox": [50, 50, 200, 100]}]])
    found = [[[0, 0, 100, 100, 0.9, 1]], [[300, 300, 50, 50, 0.8, 1], [50, 50, 200, 100, 0.7, 1]]]
    # precision 1 up to recall .5, 2/3 up to recall 1: 51 and 50 of the 101 recalls
    wanted = (51 + 50 * 2 / 3) / 101
    figures = ap(path, found)
    assert [figures[name] for name in ("ap", "ap50", "ap75")] == pytest.approx([wanted] * 3)
    assert figures["ap_large"] == pytest.approx(1)  # the wrong box is none of a large object
    assert np.isnan(figures["ap_small"]) and np.isnan(figures["ap_medium"])


def test_thresholds_of_overlap(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [[{"bbox": [0, 0, 10, 10]}]])
    figures = ap(path, [[[0, 0, 10, 6.25, 0.9, 1]]])  # overlap .625: over .5, .55 and .6
    assert (figures["ap50"], figures["ap75"]) == (pytest.approx(1), 0)
    assert figures["ap"] == pytest.approx(0.3) and figures["ap_small"] == pytest.approx(0.3)


def test_a_box_in_a_crowd_counts_neither_way(tmp_path: Path) -> None:
    crowd = {"bbox": [200, 0, 200, 200], "iscrowd": 1}
    path = write(tmp_path / "a.json", [[{"bbox": [0, 0, 100, 100]}, crowd]])
    right, inside = [0, 0, 100, 100, 0.5, 1], [220, 20, 40, 40, 0.9, 1]
    assert ap(path, [[right, inside]])["ap"] == pytest.approx(1)
    assert ap(path, [[right, [420, 20, 40, 40, 0.9, 1]]])["ap"] == pytest.approx(0.5)
    assert ap(path, [[inside]])["ap"] == 0  # a crowd is nothing to be found


def test_no_box_is_no_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [[{"bbox": [0, 0, 100, 100]}], []])
    assert ap(path, [[], []])["ap"] == 0


def random_benchmark(path: Path) -> list[list[list[float]]]:
    """Write annotations of 12 photographs and 3 categories, crowds among them; return boxes that nearly fit them."""
    rng = np.random.default_rng(5)
    boxes, found = [], []
    for _ in range(12):
        each = [
            {"bbox": [*rng.integers(0, 200, 2).tolist(), *rng.integers(8, 140, 2).tolist()]}
            for _ in range(rng.integers(1, 7))
        ]
        each = [box | {"category_id": int(rng.integers(1, 4)), "iscrowd": int(rng.random() < 0.2)} for box in each]
        boxes.append(each)
        near = [(np.array(box["bbox"]) + rng.integers(-6, 7, 4)).clip(1).tolist() for box in each + each]
        scores = rng.random(len(near))  # equal ones would stand in an order of their own in each repetition
        found.append([[*box, float(score), int(rng.integers(1, 4))] for box, score in zip(near, scores, strict=True)])
        for row, box in zip(found[-1], each, strict=False):
            row[5] = box["category_id"]
    write(path, boxes, categories=3)
    return found


def test_equals_pycocotools(tmp_path: Path) -> None:
    found = random_benchmark(tmp_path / "a.json")
    evaluation = coco._matched(coco.read(tmp_path / "a.json"), list(range(12)), found)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    figures = ap(tmp_path / "a.json", found)
    assert [figures[name] for name in names] == pytest.approx(evaluation.stats[:6].tolist(), abs=1e-9)
    assert all(0.1 < figures[name] < 0.9 for name in names)


def test_a_weight_is_a_repetition(tmp_path: Path) -> None:
    found = random_benchmark(tmp_path / "a.json")
    weights = np.array([0, 2, 1, 3, 0, 0, 1, 1, 2, 0, 1, 1])
    measure = coco.AveragePrecision(tmp_path / "a.json", [str(i) for i in range(12)], found)
    data = json.loads((tmp_path / "a.json").read_text())
    repeated: dict[str, Any] = data | {"images": [], "annotations": []}
    drawn = [index for index, weight in enumerate(weights) for _ in range(weight)]
    for number, index in enumerate(drawn):
        repeated["images"].append(data["images"][index] | {"id": number, "file_name": f"{number}.jpg"})
        rows = [row for row in data["annotations"] if row["image_id"] == index]
        repeated["annotations"] += [copy.deepcopy(row) | {"image_id": number} for row in rows]
    (tmp_path / "b.json").write_text(json.dumps(repeated))
    assert measure(weights.astype(float)) == pytest.approx(
        ap(tmp_path / "b.json", [found[i] for i in drawn]), nan_ok=True
    )


def test_labels_are_matched_by_name(tmp_path: Path) -> None:
    _, path = tiny_benchmarks.coco(tmp_path)
    categories = {row["id"]: row["name"] for row in tiny_benchmarks.coco_categories()}
    gaps = {number: categories.get(number, "N/A") for number in range(91)}
    assert coco.category_ids(gaps, path) == {number: number for number in categories}
    dense = dict(enumerate(categories.values()))
    dense |= {62: "tvmonitor", 57: "sofa"}  # as RT-DETR calls them
    assert coco.category_ids(dense, path)[62] == 72 and coco.category_ids(dense, path)[79] == 90
    with pytest.raises(UserError, match=r"20 labels lack 'apple' \(60 of the 80 categories"):
        coco.category_ids(dict(list(dense.items())[:20]), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("categories"), "no list 'categories'"),
        (lambda data: data["annotations"][1].pop("iscrowd"), r"annotations\[1\] has no valid 'iscrowd'"),
        (lambda data: data["annotations"][0].update(image_id=7), r"annotations\[0\]: image_id 7 stands nowhere else"),
        (lambda data: data["annotations"][0].update(category_id=12), r"category_id 12 stands nowhere else"),
        (lambda data: data["annotations"][0].update(bbox=[1, 2, 3]), r"bbox \[1, 2, 3\], wanted x, y, width, height"),
        (lambda data: data["images"][0].update(file_name="../x.jpg"), r"'\.\./x\.jpg': wanted a name without a folder"),
    ],
)
def test_wrong_annotations_are_named(tmp_path: Path, change: Any, message: str) -> None:
    _, path = tiny_benchmarks.coco(tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        coco.read(path)


def test_truncated_annotations(tmp_path: Path) -> None:
    _, path = tiny_benchmarks.coco(tmp_path)
    path.write_text(path.read_text()[:500])
    with pytest.raises(UserError, match="no readable JSON"):
        coco.read(path)
