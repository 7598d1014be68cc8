"""ICDAR 2015's files and protocol: hand-computed matches, unreadable words, corners of any kind."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp2osr.downstream import icdar
from dp2osr.errors import UserError


def square(x: float, y: float, width: float, height: float) -> list[list[float]]:
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]


def word(x: float, y: float, width: float, height: float, readable: bool = True) -> icdar.Word:
    return icdar.Word(icdar.hull(square(x, y, width, height)), readable)


def test_annotations_as_published(tmp_path: Path) -> None:
    path = tmp_path / "gt_img_1.txt"
    text = "377,117,463,117,465,130,378,130,Genaxis, Theatre\r\n493,115,519,115,519,131,493,131,###\r\n\r\n"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    words = icdar.read(path)
    assert [each.readable for each in words] == [True, False]
    assert sorted(words[1].corners.tolist()) == [[493, 115], [493, 131], [519, 115], [519, 131]]
    assert icdar.photo(path) == "img_1" and icdar.files(tmp_path) == [path]
    path.write_text("")
    assert icdar.read(path) == []  # a photograph without text


@pytest.mark.parametrize("line", ["1,2,3,4,5,6,7,word", "1,2,3,4,5,6,7,x,word", "1,2,3,4,5,6,7,8", "1 2 3 4 5 6 7 8 w"])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "gt_img_1.txt"
    path.write_text(f"1,2,3,4,5,6,7,8,fine\n{line}\n")
    with pytest.raises(UserError, match=r"gt_img_1\.txt: line 2: found '.*', wanted x1,y1,.*,transcription"):
        icdar.read(path)


def test_matches() -> None:
    words = [word(0, 0, 10, 10), word(40, 0, 10, 10), word(80, 0, 20, 10, readable=False)]
    boxes = [
        square(0, 0, 10, 6),  # overlap .6: right
        square(0, 0, 10, 10),  # the same word again: wrong
        square(40, 0, 10, 5),  # overlap one half: not above it, wrong
        square(88, 0, 20, 10),  # .6 of it in an unreadable word: does not count
        square(95, 0, 20, 10),  # .25 of it there: wrong
    ]
    assert icdar.match(words, boxes) == (1, 4, 2)
    assert icdar.match(words, []) == (0, 0, 2) and icdar.match([], boxes) == (0, 5, 0)


def test_a_word_takes_the_first_free_box() -> None:
    """Both boxes fit both words; the second word takes what the first has left."""
    words = [word(0, 0, 20, 10), word(2, 0, 20, 10)]
    assert icdar.match(words, [square(1, 0, 20, 10), square(0, 0, 20, 10)]) == (2, 2, 2)
    assert icdar.match(words, [square(1, 0, 20, 10)]) == (1, 1, 2)


def test_areas_of_slanted_boxes() -> None:
    """The square |x|, |y| <= 1 and the diamond |x| + |y| <= 1.5 share all but four corners of .5²/2."""
    diamond = icdar.hull([[1.5, 0], [0, 1.5], [-1.5, 0], [0, -1.5]])
    assert icdar.overlap(icdar.hull(square(-1, -1, 2, 2)), diamond) == pytest.approx(3.5)
    assert icdar.overlap(diamond, diamond) == pytest.approx(4.5)
    assert icdar.overlap(diamond, diamond + 10) == 0


def test_corners_in_any_order_and_without_area() -> None:
    crossed = [[0, 0], [10, 10], [10, 0], [0, 10]]
    assert icdar.match([word(0, 0, 10, 10)], [crossed, square(0, 0, 10, 10)[::-1]]) == (1, 2, 1)
    assert icdar.match([word(0, 0, 10, 10, readable=False)], [[[1, 1]] * 4, [[0, 0], [9, 9], [0, 0], [9, 9]]]) == (
        0,
        2,
        0,
    )


def test_figures_are_of_sums(tmp_path: Path) -> None:
    lines = {"img_1": "0,0,10,0,10,10,0,10,a", "img_2": "0,0,10,0,10,10,0,10,a\n40,0,50,0,50,10,40,10,b"}
    for name, text in lines.items():
        (tmp_path / f"gt_{name}.txt").write_text(text)
    boxes: list[list[Any]] = [
        [square(0, 0, 10, 10), square(60, 60, 9, 9), square(80, 60, 9, 9)],
        [square(0, 0, 10, 10)],
    ]
    measure = icdar.HarmonicMean(tmp_path, list(lines), boxes)
    assert measure(np.ones(2)) == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "hmean": 4 / 7})
    assert measure(np.array([0.0, 2.0])) == pytest.approx({"precision": 1, "recall": 1 / 2, "hmean": 2 / 3})
    nothing = icdar.HarmonicMean(tmp_path, list(lines), [[], []])(np.ones(2))
    assert nothing == {"precision": 0, "recall": 0, "hmean": 0}
