"""COCO: instances in JSON as published, and average precision of boxes by pycocotools.

Resampled photographs count by weight. pycocotools matches boxes once; precision is then summed up from its matches, the
same way but weighted: with all weights 1 the figures are those of pycocotools itself, and whole weights give those of a
benchmark in which a photograph stands so often (but for boxes of equal score, whose order is anybody's).
"""

import contextlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dp2osr.config_checks import need_extra
from dp2osr.errors import UserError

Floats = npt.NDArray[np.float64]
Box = Sequence[float]  # x, y, width, height, px; score; category id
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "images": {"id": int, "file_name": str, "width": int, "height": int},
    "categories": {"id": int, "name": str},
    "annotations": {
        "image_id": int,
        "category_id": int,
        "bbox": list,
        "area": (int, float),
        "iscrowd": int,
    },
}
AREAS = ("all", "small", "medium", "large")  # as pycocotools orders them: under 32² px, under 96² px, above
AP50, AP75 = 0, 5  # places among the thresholds .50, .55 ... .95
# Names that some models give to COCO's categories, those of Pascal VOC
ALIASES = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Read and check an instances JSON; raises UserError naming the file, the entry and what is wrong with it."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"annotations {path}: no readable JSON ({error})") from None
    for section, fields in FIELDS.items():
        rows = data.get(section) if isinstance(data, dict) else None
        if not isinstance(rows, list):
            raise UserError(
                f"annotations {path}: no list '{section}', wanted COCO's instances (instances_val2017.json)"
            )
        for number, row in enumerate(rows):
            for name, kind in fields.items():
                if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                    raise UserError(f"annotations {path}: {section}[{number}] has no valid '{name}'")
    _check_names(path, data)
    return {section: data[section] for section in FIELDS}


def _check_names(path: Path, data: dict[str, list[dict[str, Any]]]) -> None:
    for image in data["images"]:
        if Path(image["file_name"]).name != image["file_name"]:
            raise UserError(f"annotations {path}: file_name '{image['file_name']}': wanted a name without a folder")
    known = {
        "image_id": {row["id"] for row in data["images"]},
        "category_id": {row["id"] for row in data["categories"]},
    }
    for number, row in enumerate(data["annotations"]):
        for key, ids in known.items():
            if row[key] not in ids:
                raise UserError(f"annotations {path}: annotations[{number}]: {key} {row[key]} stands nowhere else")
        if len(row["bbox"]) != 4 or not all(isinstance(value, int | float) for value in row["bbox"]):
            raise UserError(
                f"annotations {path}: annotations[{number}]: bbox {row['bbox']}, wanted x, y, width, height"
            )


def category_ids(labels: Mapping[int, str], path: Path) -> dict[int, int]:
    """Return the category id of each of a model's labels, matched by name; a label of no category is left out.

    Labels are 0..79 in some models and category ids, which have gaps, in others: the name alone says what is meant.
    Raises UserError where a category has no label: the model was trained for other ones.
    """
    ids = {row["name"].lower(): row["id"] for row in read(path)["categories"]}
    named = {label: ALIASES.get(name.lower(), name.lower()) for label, name in labels.items()}
    if lacking := sorted(set(ids) - set(named.values())):
        raise UserError(
            f"the model's {len(labels)} labels lack '{lacking[0]}' "
            f"({len(lacking)} of the {len(ids)} categories of {path})"
        )
    return {label: ids[name] for label, name in named.items() if name in ids}


@dataclass(frozen=True)
class Curve:
    """Detections of one category and range of areas, the surest first; T thresholds, D detections, I photographs."""

    image: npt.NDArray[np.int64]
    """(D,) index of the photograph"""
    right: npt.NDArray[np.bool_]
    """(T, D) whether it matches an annotation"""
    wrong: npt.NDArray[np.bool_]
    """(T, D) whether it matches none; neither where it is ignored (crowds, other areas)"""
    wanted: Floats
    """(I,) annotations to be found"""

    def precision(self, weights: Floats) -> Floats | None:
        """Return the average precision at each threshold (T,); None where nothing is annotated.

        The mean over the recalls 0, .01 ... 1 of the best precision at that recall or a higher one.
        """
        total = self.wanted @ weights
        if total == 0:
            return None
        each = weights[self.image]
        right, wrong = np.cumsum(self.right * each, axis=1), np.cumsum(self.wrong * each, axis=1)
        precision = right / (right + wrong + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        best = np.pad(best, ((0, 0), (0, 1)))  # recalls that are never reached
        recalls = np.linspace(0, 1, 101)
        places = [np.searchsorted(row, recalls, side="left") for row in right / total]
        return np.array([row[place].mean() for row, place in zip(best, places, strict=True)])


class AveragePrecision:
    """Average precision of one source's boxes, as a function of the photographs' weights."""

    def __init__(self, path: Path, names: Sequence[str], boxes: Sequence[Sequence[Box]]) -> None:
        need_extra("detection")
        data = read(path)
        ids = {Path(image["file_name"]).stem: image["id"] for image in data["images"]}
        images = [ids[name] for name in names]
        self.curves = _curves(_matched(data, images, boxes), images)

    def __call__(self, weights: Floats) -> dict[str, float]:
        """Return ap, ap50, ap75 and those of small, medium and large objects; NaN where there are none."""
        found: dict[str, float] = {}
        for area in AREAS:
            each = [curve.precision(weights) for curve in self.curves[area]]
            table = np.array([values for values in each if values is not None])
            found["ap" if area == "all" else f"ap_{area}"] = _mean(table)
            if area == "all":
                found["ap50"], found["ap75"] = (
                    _mean(table[:, place]) if len(table) else np.nan for place in (AP50, AP75)
                )
        return found


def _mean(values: Floats) -> float:
    return float(values.mean()) if values.size else float("nan")


def _matched(data: dict[str, list[dict[str, Any]]], images: list[int], boxes: Sequence[Sequence[Box]]) -> Any:
    """Return pycocotools' evaluation of boxes: each photograph, category and range of areas matched."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    wanted = set(images)
    truth = [row for row in data["annotations"] if row["image_id"] in wanted]
    found = [
        {"image_id": image, "bbox": list(box[:4]), "area": box[2] * box[3], "score": box[4], "category_id": int(box[5])}
        for image, each in zip(images, boxes, strict=True)
        for box in each
    ]
    sides = []
    with contextlib.redirect_stdout(io.StringIO()):  # it prints; logs say what matters
        for rows in (truth, found):
            side = COCO()
            numbered = [
                {"iscrowd": 0, **row, "id": number} for number, row in enumerate(rows, start=1)
            ]  # 0 is no match
            side.dataset = data | {"annotations": numbered}
            side.createIndex()
            sides.append(side)
        evaluation = COCOeval(*sides, "bbox")
        evaluation.params.imgIds = images
        evaluation.evaluate()
    return evaluation


def _curves(evaluation: Any, images: list[int]) -> dict[str, list[Curve]]:
    """Return the curves of each range of areas, one a category."""
    at = {image: index for index, image in enumerate(images)}
    grouped: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for matches in evaluation.evalImgs:
        if matches is not None:
            area = evaluation.params.areaRng.index(matches["aRng"])
            grouped.setdefault((area, matches["category_id"]), []).append(matches)
    curves: dict[str, list[Curve]] = {area: [] for area in AREAS}
    for (area, _), rows in sorted(grouped.items()):
        curves[AREAS[area]].append(_curve(rows, at))
    return curves


def _curve(rows: list[dict[str, Any]], at: dict[int, int]) -> Curve:
    wanted = np.zeros(len(at))
    for row in rows:
        wanted[at[row["image_id"]]] = np.count_nonzero(row["gtIgnore"] == 0)
    order = np.argsort(-np.concatenate([row["dtScores"] for row in rows]), kind="mergesort")
    matched = np.concatenate([row["dtMatches"] for row in rows], axis=1)[:, order] > 0
    counts = np.concatenate([row["dtIgnore"] for row in rows], axis=1)[:, order] == 0
    image = np.repeat([at[row["image_id"]] for row in rows], [len(row["dtScores"]) for row in rows])
    return Curve(image[order], matched & counts, ~matched & counts, wanted)
