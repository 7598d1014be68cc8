"""ICDAR 2015 incidental scene text: gt_NAME.txt as published, and precision, recall and their harmonic mean.

The protocol of the competition's text localisation: a box that lies with more than half of its area in one unreadable
word (`###`) does not count. Each readable word, in the order of the file, takes the first box that is still free and
whose intersection over union with it is above one half: that box is right. Sums are over the benchmark.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from dp2osr.errors import UserError

Floats = npt.NDArray[np.float64]
Quad = npt.NDArray[np.float32]  # (4, 2) corners, x and y in px
UNREADABLE = "###"


@dataclass(frozen=True)
class Word:
    """A word of the annotation."""

    corners: Quad
    readable: bool


def files(folder: Path) -> list[Path]:
    """Return the annotations of a folder."""
    found = sorted(folder.glob("gt_*.txt"))
    if not found:
        raise UserError(f"{folder}: no annotations, wanted a text file a photograph (gt_img_1.txt)")
    return found


def photo(path: Path) -> str:
    """Return the photograph that an annotation is of."""
    return path.stem.removeprefix("gt_")


def read(path: Path) -> list[Word]:
    """Return the words of an annotation: a line x1,y1,...,x4,y4,transcription each."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"annotation {path}: not readable ({error})") from None
    return [_word(line, f"annotation {path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def _word(line: str, where: str) -> Word:
    *numbers, text = line.split(",", 8)  # the transcription may hold commas
    if len(numbers) != 8 or not all(re.fullmatch(r"\s*-?\d+(\.\d+)?\s*", number) for number in numbers):
        raise UserError(f"{where}: found '{line[:60]}', wanted x1,y1,x2,y2,x3,y3,x4,y4,transcription")
    return Word(hull(np.array(numbers, dtype=np.float32).reshape(4, 2)), readable=text.strip() != UNREADABLE)


def hull(corners: npt.ArrayLike) -> Quad:
    """Return a convex outline (N, 2): corners that are drawn concave or crossed count as their hull."""
    return np.asarray(cv2.convexHull(np.asarray(corners, dtype=np.float32)), dtype=np.float32).reshape(-1, 2)


def overlap(left: Quad, right: Quad) -> float:
    """Return the area that two convex outlines share, px²."""
    return float(cv2.intersectConvexConvex(left, right)[0]) if min(len(left), len(right)) > 2 else 0.0


def match(words: Sequence[Word], boxes: Sequence[npt.ArrayLike]) -> tuple[int, int, int]:
    """Return how many boxes are right, how many boxes count, and how many words are to be found."""
    unreadable = [word.corners for word in words if not word.readable]
    readable = [word.corners for word in words if word.readable]
    counting = [box for box in map(hull, boxes) if not _within(box, unreadable)]
    free = set(range(len(counting)))
    right = 0
    for word in readable:
        hit = next((index for index in sorted(free) if _iou(word, counting[index]) > 0.5), None)
        if hit is not None:
            free.remove(hit)
            right += 1
    return right, len(counting), len(readable)


def _within(box: Quad, areas: Sequence[Quad]) -> bool:
    size = _area(box)
    return size > 0 and any(overlap(box, area) / size > 0.5 for area in areas)


def _iou(left: Quad, right: Quad) -> float:
    shared = overlap(left, right)
    return shared / (_area(left) + _area(right) - shared) if shared else 0.0


def _area(outline: Quad) -> float:
    return float(cv2.contourArea(outline)) if len(outline) > 2 else 0.0


class HarmonicMean:
    """Precision, recall and their harmonic mean of one source, as a function of the photographs' weights."""

    def __init__(self, folder: Path, names: Sequence[str], boxes: Sequence[Sequence[npt.ArrayLike]]) -> None:
        words = [read(folder / f"gt_{name}.txt") for name in names]
        self.counts = np.array([match(*pair) for pair in zip(words, boxes, strict=True)], dtype=float).reshape(-1, 3)

    def __call__(self, weights: Floats) -> dict[str, float]:
        """Return precision, recall and hmean; 0 where no box counts, recall NaN where no word is to be found."""
        right, boxes, words = weights @ self.counts
        precision = right / boxes if boxes else 0.0
        recall = right / words if words else float("nan")
        total = precision + recall
        hmean = 2 * precision * recall / total if total else 0.0
        return {"precision": float(precision), "recall": float(recall), "hmean": float(hmean)}
